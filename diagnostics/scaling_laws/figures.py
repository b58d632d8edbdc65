"""The figure of a scaling grid: error against width with the law, cross-entropy against compute."""

import itertools
from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diagnostics.figures.axes import bar_lengths, caption, legend_entries, plain_ticks, write_caption
from diagnostics.figures.by_depth import Groups
from diagnostics.figures.looks import INK, K_COLOURS, NOTE, REFERENCE, styled
from diagnostics.scaling_laws.fit import FORMS, JOINT, Fit
from diagnostics.scaling_laws.grid import BASE


def plot_scaling(groups: Groups, provenance: Mapping[str, Any]) -> Figure:
    """Normalised MSE against n, a line per k (left); cross-entropy of the SAEs on the model's early exits (right).

    Lines: the joint law fitted to all widths; open squares: the largest width as the law of the others predicts it, 95 % bars.
    """
    losses = [g for g in groups if g["part"] == "loss" and g["condition"] == BASE]
    ks = sorted({g["k"] for g in losses})
    colours = dict(zip(ks, itertools.cycle(K_COLOURS), strict=False))
    exits = [g for g in groups if g["part"] == "exit"]
    with styled():
        figure, axes = plt.subplots(
            1, 2 if exits else 1, figsize=(9.2 if exits else 5.2, 4.1), layout="constrained", squeeze=False
        )
        left = axes[0, 0]
        _law(left, groups, losses, colours)
        if exits:
            _ladder(axes[0, 1], exits, losses, colours)
        figure.legend(*legend_entries([left]), loc="outside upper left", ncols=len(ks) + 2)
        words = f"Bars: 95 % over {max(g['value'].n_prompts for g in losses)} prompts; of predictions, for an SAE trained anew."
        write_caption(figure, caption(provenance, words, place=", ".join(provenance["sites"])))
    return figure


def _law(ax: Axes, groups: Groups, losses: Groups, colours: Mapping[float, str]) -> None:
    fitted = _fitted(groups)
    for i, (k, colour) in enumerate(colours.items()):
        own = sorted((g for g in losses if g["k"] == k and g["what"] == "nmse"), key=lambda g: g["n"])
        n = np.array([g["n"] for g in own], dtype=float)
        values = [g["value"] for g in own]
        label = f"k = {k:g}"
        ax.errorbar(
            n,
            [v.value for v in values],
            bar_lengths(values),
            color=colour,
            marker="o",
            ms=4,
            lw=0,
            elinewidth=1,
            label=label,
        )
        if fitted is not None:
            fine = np.geomspace(n.min(), n.max(), 60)
            ax.plot(fine, fitted.predict(fine, np.full(60, k)), color=colour, lw=1)
        held = [g for g in groups if (g["part"], g["form"], g["what"], g["k"]) == ("held out", JOINT, "loss", k)]
        if held:
            at, predicted = [g["n"] * (1.08 + 0.06 * i) for g in held], [g["value"] for g in held]
            ax.errorbar(
                at, [v.value for v in predicted], bar_lengths(predicted), color=colour, marker="s", mfc="none", ms=5, lw=0, elinewidth=1,
                capsize=2,
            )  # fmt: skip
    ax.plot([], [], color=INK, lw=1, label="law, all widths")
    ax.plot([], [], color=INK, marker="s", mfc="none", lw=0, ms=5, label="predicted")
    widths = sorted({g["n"] for g in losses})
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="latents n",
        ylabel="normalised MSE (1 − FVE)",
        title="error and the joint law",
    )
    ax.set_xticks(widths, [f"{n:g}" for n in widths])
    ax.set_xticks([], minor=True)
    plain_ticks(ax.yaxis)


def _fitted(groups: Groups) -> Fit | None:
    """The joint law of all widths, as its lines give it."""
    own = {g["what"]: g["value"].value for g in groups if g["part"] == "fit" and g["form"] == JOINT}
    if not set(FORMS[JOINT]) <= own.keys():
        return None
    none = np.zeros(0)
    return Fit(JOINT, {name: own[name] for name in FORMS[JOINT]}, 0.0, True, 1, none, none)


def _ladder(ax: Axes, exits: Groups, losses: Groups, colours: Mapping[float, str]) -> None:
    share = np.array([g["share"] for g in exits])
    rungs = np.array([g["value"].value for g in exits])
    ax.plot(100 * share, rungs, color=REFERENCE, marker=".", ms=5, lw=1, zorder=0)
    last = {g["sae"]: g for g in losses if g["what"] == "compute"}
    excess = {g["sae"]: g["value"].value for g in losses if g["what"] == "excess_ce"}
    widths = sorted({g["n"] for g in losses})
    for name, g in last.items():
        if np.isfinite(g["value"].value):
            size = 3 + 5 * widths.index(g["n"]) / max(1, len(widths) - 1)
            ax.plot(
                100 * g["value"].value,
                rungs[-1] + excess[name],
                marker="o",
                ms=size,
                mfc="none",
                color=colours[g["k"]],
                lw=0,
            )
    ax.set(yscale="log", xlabel="forward compute, % of the model", ylabel="cross-entropy of the next token, nats")
    ax.set_title("SAEs on the ladder of early exits")
    ax.text(
        0.03,
        0.04,
        "grey: stopping after each block\nrings: SAEs, larger with n",
        transform=ax.transAxes,
        color=NOTE,
        fontsize=8,
    )
    plain_ticks(ax.yaxis)

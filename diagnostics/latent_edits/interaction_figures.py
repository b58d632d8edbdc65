"""Figures of interactions between latents and of causal concentration."""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diagnostics.figures.axes import BARS, bar_lengths, caption, plain_ticks, sink_rule, write_caption
from diagnostics.figures.looks import MISSING, NOTE, PLACEBO_LABELS, PLACEBO_LOOKS, REFERENCE, SIGNED, looks, styled
from diagnostics.statistics.estimate import FEW_PROMPTS
from diagnostics.statistics.tables import each, few_prompts, lines_of, median_ratio_of, where


def finish(figure: Figure, provenance: Mapping[str, Any], words: str) -> Figure:
    """With the caption below."""
    place, sinks = ", ".join(provenance["sites"]), sink_rule(provenance, "position 0")
    write_caption(figure, caption(provenance, words, place=place, sinks=sinks))
    return figure


def plot_interactions(frame: pd.DataFrame, provenance: Mapping[str, Any]) -> Figure:
    """A row of panels an SAE: distribution of interactions over pairs (left), and against the size of the single effects (right).

    frame: a line for each pair and kind. Placebos: the token's edits turned about x as one, so that every norm and every cosine is kept.
    Right: median ratios in bins of equal width, those of fewer than 20 effective prompts left out.
    """
    saes = list(provenance["saes"])
    style = looks(saes)
    with styled():
        figure, axes = plt.subplots(
            len(saes), 2, figsize=(9.6, 2.7 * len(saes) + 1.2), squeeze=False, sharex="col", layout="constrained"
        )
        for row, sae in zip(axes, saes, strict=True):
            for (kind,), lines in each(lines_of(frame, sae=sae), ["kind"]):
                colour, marker, dash = PLACEBO_LOOKS.get(str(kind), (*style[sae], "-"))
                label = PLACEBO_LABELS.get(str(kind), "latents")
                bottom = (lines["rms_i"] + lines["rms_j"]).to_numpy(float)
                value = np.sort(lines["rms_interaction"].to_numpy(float)[bottom > 0] / bottom[bottom > 0])
                row[0].plot(value, np.arange(1, len(value) + 1) / len(value), color=colour, ls=dash, label=label)
                _binned(row[1], lines.assign(bottom=bottom), colour, marker, dash, label)
            row[0].set(ylabel="share of pairs", ylim=(0, 1.01), xscale="log")
            row[0].set_title(f"{sae}: interaction of a pair at a token")
            row[1].set_title("at equal size of the single effects")
            row[1].set(xscale="log", ylabel="median interaction", ylim=(0, None))
            plain_ticks(row[1].xaxis)
        axes[-1, 0].set_xlabel("rms(joint − sum) / (rms(i) + rms(j))")
        axes[-1, 1].set_xlabel("rms(i) + rms(j), logits")
        axes[0, 0].legend(loc="upper left")
        pairs = len(lines_of(frame, kind="latents"))
        words = (
            f"{pairs:,} pairs of a token's {provenance['per_token']} latents of largest |z|‖d‖. Placebos: their edits turned as one about x. "
            f"Bins of fewer than {FEW_PROMPTS} effective prompts are left out. {BARS}"
        )
        return finish(figure, provenance, words)


@few_prompts()
def _binned(
    ax: Axes, lines: pd.DataFrame, colour: str, marker: str, dash: str, label: str, fewest: int = FEW_PROMPTS
) -> None:
    """Median ratio in bins of log effect size, half a decade each; bins of fewer than 20 effective prompts are left out."""
    lines = where(lines, lines["bottom"] > 0)
    lines = lines.assign(place=np.floor(2 * np.log10(lines["bottom"].to_numpy(float))))
    bins = [
        (10 ** ((place + 0.5) / 2), median_ratio_of(some, "rms_interaction", "bottom"))
        for (place,), some in each(lines, ["place"], sort=True)
    ]
    found = [(at, e) for at, e in bins if e.n_effective >= fewest]
    if not found and not ax.texts:
        ax.text(
            0.5,
            0.5,
            f"fewer than {fewest} effective prompts in every bin",
            transform=ax.transAxes,
            ha="center",
            color=NOTE,
        )
    if found:
        x, y = np.array([at for at, _ in found]), np.array([e.value for _, e in found])
        shift = {"v": 1.05, "^": 1 / 1.05}.get(marker, 1.0)
        ax.errorbar(
            x * shift,
            y,
            bar_lengths([e for _, e in found]),
            color=colour,
            marker=marker,
            ls=dash,
            ms=4,
            lw=1,
            capsize=2,
            label=label,
        )


def plot_matrix(matrix: pd.DataFrame, provenance: Mapping[str, Any], sae: str) -> Figure:
    """Heat map of pairs of latents, in average-linkage order.

    matrix: ratio of sums over the tokens where both are active, minus that of the same edits turned about x towards differences of other
    tokens; nan (grey) where too few tokens have both. Single cells have no interval.
    """
    value = matrix.to_numpy(float)
    end = max(float(np.nanquantile(np.abs(value), 0.98)), 1e-12)
    with styled():
        figure, ax = plt.subplots(figsize=(7.2, 6.9), layout="constrained")
        colours = plt.get_cmap(SIGNED).with_extremes(bad=MISSING)
        drawn = ax.imshow(np.ma.masked_invalid(value), cmap=colours, vmin=-end, vmax=end, interpolation="nearest")
        names = [str(i) for i in matrix.index]
        size = 7 if len(names) <= 30 else 5.5
        ax.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
        ax.set_yticks(range(len(names)), names, fontsize=size)
        ax.set(xlabel="latent", ylabel="latent")
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
        figure.suptitle(f"{sae}: interaction beyond that of pairs of like geometry", x=0.01, ha="left", fontsize=10)
        figure.colorbar(drawn, ax=ax, shrink=0.75, label="interaction − placebo's", extend="both")
        words = f"{len(names)} latents, average linkage. Grey: both active on fewer than {provenance['min_tokens']} tokens. No intervals."
        return finish(figure, provenance, words)


def plot_concentration(
    frame: pd.DataFrame, curves: Mapping[tuple[str, str, str], pd.DataFrame], provenance: Mapping[str, Any], tokens: int
) -> Figure:
    """A row of panels an SAE: latents removed one after another, kept one after another, and single effects added up.

    frame: a line for each number of latents removed or kept; curves: shares of the joint effect by SAE, edit and order, ratios of sums over
    tokens, linear between whole latents. The SAE's error is kept throughout. Placebos: the same edits turned about x as one, in the order
    of size. Right: a point a token.
    """
    saes = list(provenance["saes"])
    style = looks(saes)
    dashes = {"size": "-", "effect": "--", "random": ":"}
    said = {"size": "by |z|‖d‖", "effect": "by single KL", "random": "at random"}
    with styled():
        figure, axes = plt.subplots(
            len(saes), 3, figsize=(11, 2.9 * len(saes) + 1.2), squeeze=False, layout="constrained"
        )
        for row, sae in zip(axes, saes, strict=True):
            some = lines_of(frame, sae=sae)
            for (edit, order), _ in each(some, ["edit", "order"]):
                ax = row[1 if edit == "keep" else 0]
                colour, _, dash = PLACEBO_LOOKS.get(edit, (style[sae][0], "", dashes[order]))
                curve = curves[sae, edit, order]
                ax.plot(
                    curve["share_of_latents"],
                    curve["value"],
                    color=colour,
                    ls=dash,
                    label=PLACEBO_LABELS.get(edit, said[order]),
                )
                if order == "size" and edit not in PLACEBO_LOOKS:
                    ax.fill_between(
                        curve["share_of_latents"], curve["low"], curve["high"], color=colour, alpha=0.15, lw=0
                    )
            for ax, title in zip(row, ("removed", "kept, all others removed"), strict=False):
                ax.axhline(1, color=REFERENCE, lw=0.8)
                ax.set(xlim=(0, 1), xlabel="share of the token's active latents")
                ax.set_title(f"{sae}: {title}")
            row[0].set_ylabel("KL / KL of removing all")
            row[1].set_ylabel("1 − KL / KL of removing all")
            row[0].set_ylim(0, max(1.5, row[0].get_ylim()[1]))
            row[1].set_ylim(max(-1.0, row[1].get_ylim()[0]), 1.05)
            _added_up(row[2], some, style[sae][0])
        axes[0, 0].legend(loc="upper left", fontsize=7, ncols=2)
        axes[0, 1].legend(loc="lower right", fontsize=7)
        axes[0, 2].legend(loc="upper left", fontsize=7)
        words = (
            f"{tokens} tokens, ratios of sums; right: a point a token. Placebos: the same edits turned as one about x, by |z|‖d‖. Bands: 95 % "
            "intervals over prompts."
        )
        return finish(figure, provenance, words)


def _added_up(ax: Axes, lines: pd.DataFrame, colour: str) -> None:
    whole = where(lines, (lines["kl_sum"] > 0) & (lines["kl_all"] > 0))
    for edit in ("remove", *PLACEBO_LOOKS):
        some = lines_of(whole, edit=edit)
        own, marker, _ = PLACEBO_LOOKS.get(edit, (colour, "o", "-"))
        ax.scatter(
            some["kl_all"],
            some["kl_sum"],
            s=9,
            color=own,
            marker=marker,
            alpha=0.6,
            lw=0,
            label=PLACEBO_LABELS.get(edit, "latents"),
        )
    if len(whole):
        ends = np.array([whole[["kl_all", "kl_sum"]].min().min(), whole[["kl_all", "kl_sum"]].max().max()])
        ax.plot(ends, ends, color=REFERENCE, lw=0.8)
    ax.set(xscale="log", yscale="log", xlabel="KL of removing all, nats", ylabel="KL of the summed logit changes, nats")
    ax.set_title("do single effects add up?")

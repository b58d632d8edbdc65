"""Figures of projection ablations: norm exponents by depth, KL against dose."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from diagnostics.figures.axes import (
    SAMPLED,
    Depth,
    caption,
    legend_entries,
    null_models,
    panels,
    patched,
    plain_ticks,
    sae_label,
    write_caption,
)
from diagnostics.figures.looks import (
    FLOORS,
    INK,
    KEY,
    LABELS,
    NORMS,
    NOTE,
    OPEN,
    PLACEBO_LOOKS,
    REFERENCE,
    UNTRAINED,
    looks,
    styled,
)
from diagnostics.statistics.tables import TRAINED
from interventions.errors import ResultError

A_LIMITS = (-1.6, 2.6)
"""Of the axis of exponents: what lies beyond is drawn at its edge as an arrow."""
_NAMES = {
    "observational": ("observational: across tokens", "o", "full"),
    "interventional": ("interventional: the same token rescaled", "D", "none"),
    "placebo_token": ("its placebo, observational", "v", "full"),
}


def _whiskers(
    ax: Axes, x: float, value: float, low: float, high: float, colour: str, marker: str, fill: str, label: str
) -> None:
    """A point with its interval; ends beyond the axis are arrows."""
    bottom, top = A_LIMITS
    face = colour if fill == "full" else OPEN
    ends = np.clip([low, high], bottom, top)
    ax.plot([x, x], ends, color=colour, lw=1.2)
    for end, beyond, sign in ((ends[0], low < bottom, -1), (ends[1], high > top, 1)):
        ax.plot(
            [x], [end], color=colour, marker=("v" if sign < 0 else "^") if beyond else "_", ms=4 if beyond else 6, lw=0
        )
    if bottom <= value <= top:
        ax.plot([x], [value], color=colour, marker=marker, mfc=face, ms=5.5, lw=0, label=label)


def _exponents(ax: Axes, at: np.ndarray, ways: list[Any], name: str, colour: str) -> None:
    words, marker, fill = _NAMES[name]
    label: str | None = words
    for x, way in zip(at, ways, strict=True):
        if way is None:
            continue
        if not way.identified:
            ax.text(x, A_LIMITS[0] + 0.05, "n. i.", fontsize=6.5, color=colour, ha="center")
            continue
        _whiskers(ax, float(x), way.a.value, way.a.low, way.a.high, colour, marker, fill, label or "_")
        label = None


def plot_exponents(
    groups: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any], contexts: Sequence[str]
) -> Figure:
    """The norm exponent a by depth, a panel for each kind of SAE (and context): across tokens, of the same token rescaled, of the
    placebo, and the exponent that the SAE learned.

    groups: of one point, from all models. Bars: 95 % Fieller intervals from the delete-one-prompt jackknife; n. i.: not identified. Grey
    lines: randomly initialised models.
    """
    saes, point = list(provenance["saes"]), groups[0]["point"]
    kinds = list(dict.fromkeys(map(sae_label, saes)))
    style = looks(saes)
    with styled():
        figure, axes = plt.subplots(
            len(contexts),
            len(kinds),
            figsize=(9.6, 3.4 * len(contexts) + 1.4),
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for row, where in zip(axes, contexts, strict=True):
            for ax, name in zip(row, kinds, strict=True):
                here = [g for g in groups if g["context"] == where and sae_label(g["sae"]) == name]
                own = [g for g in here if g["model"] == TRAINED]
                if not own:
                    ax.set_visible(False)
                    continue
                depth = Depth(sorted({g["layer"] for g in own}), point)
                at, step = depth.at(own), 2.2 * depth.step
                colour = style[own[0]["sae"]][0]
                for i, way in enumerate(("observational", "placebo_token", "interventional")):
                    of = {
                        "observational": colour,
                        "placebo_token": PLACEBO_LOOKS["placebo_token"][0],
                        "interventional": INK,
                    }[way]
                    _exponents(ax, at + (i - 1) * step, [g["exponents"].get(way) for g in own], way, of)
                learned = [np.nan if g["learned_a"] is None else g["learned_a"]["mean"] for g in own]
                if np.isfinite(learned).any():
                    ax.plot(
                        at + 2 * step,
                        learned,
                        color=colour,
                        marker="x",
                        ms=6,
                        mew=1.6,
                        lw=0,
                        label="learned by the SAE",
                    )
                for i, label in enumerate(provenance["null_models"]):
                    null = [g for g in here if g["model"] == label]
                    ways = [g["exponents"].get("observational") for g in null]
                    a = [way.a.value if way is not None and way.identified else np.nan for way in ways]
                    known = np.clip(a, *A_LIMITS)
                    ax.plot(depth.at(null), known, color=UNTRAINED, lw=0.9, marker=".", ms=4, zorder=0,
                            label="randomly initialised models, across tokens" if i == 0 else None)  # fmt: skip
                for a, words in ((0, "cosine"), (1, "inner product")):
                    ax.axhline(a, color=REFERENCE, lw=0.8, ls="--", zorder=0)
                    ax.text(
                        1.0, a, f" {words}", transform=ax.get_yaxis_transform(), fontsize=7, color=NOTE, va="center"
                    )
                ax.set_ylim(*A_LIMITS)
                ax.set_title(f"{name} SAE, {LABELS[where]}")
                depth.label(ax)
                ax.set_xlabel(f"block, ablated at {depth.point}")
            row[0].set_ylabel("norm exponent a = β_norm / β_cosine")
        handles, labels = legend_entries(axes.flat)
        own_colour = (_NAMES["observational"][0], "learned by the SAE")  # of each panel's SAE
        handles = [
            Line2D([], [], color=KEY, marker=h.get_marker(), ms=5.5, lw=0) if label in own_colour else h
            for h, label in zip(handles, labels, strict=True)
        ]
        figure.legend(handles, labels, loc="outside upper left", ncols=3)
        n, most = (max(g[count] for g in groups) for count in ("n_latents", "n_pairs"))
        words = (
            f"{n} latents of each SAE ({SAMPLED[provenance['sampling']]}), up to {most:,} (latent, token) pairs, "
            f"{patched(provenance, done='ablated')}. Bars: 95 % Fieller intervals, "
            f"delete-one-prompt jackknife.{null_models(provenance)}"
        )
        write_caption(figure, caption(provenance, words))
    return figure


def plot_dose(rows: pd.DataFrame, provenance: Mapping[str, Any], latents: Sequence[int] | None = None) -> Figure:
    """KL against the length of what is removed, for six latents from rare to frequent (or those given), coloured by ‖x‖.

    rows: of one SAE, context and model. Crosses: the placebo along the difference of two other tokens, of the same norm and angle. Raises
    `ResultError` for latents without rows.
    """
    sae, context, edit = rows["sae"].iloc[0], rows["context"].iloc[0], provenance["reference"]
    chosen = list(latents or [])
    if latents is None:
        by = rows.drop_duplicates("latent").sort_values(["frequency", "latent"])
        chosen = [int(by["latent"].iloc[i]) for i in np.unique(np.linspace(0, len(by) - 1, 6).round().astype(int))]
    drawable = rows.edit.isin([edit, "placebo_token"]) & (rows.kl > 0)
    shown = cast(pd.DataFrame, rows.loc[rows.latent.isin(chosen) & drawable])
    if shown.empty:
        raise ResultError(f"no rows of latents {chosen} of {sae}; known: {sorted(set(rows.latent))[:8]} ...")
    colours = LogNorm(shown["norm"].quantile(0.01), shown["norm"].quantile(0.99))
    with styled():
        figure, axes = panels(len(chosen), 9.6 / min(3, len(chosen)), 2.7, 1.2, sharex=True, sharey=True)
        drawn = None
        for ax, latent in zip(axes.flat, chosen, strict=False):
            own = shown.loc[shown.latent == latent]
            placebo, main = (cast(pd.DataFrame, own.loc[own.edit == e]) for e in ("placebo_token", edit))
            ax.scatter(
                placebo.delta_norm,
                placebo.kl,
                color=FLOORS["placebo"][0],
                marker="x",
                s=9,
                lw=0.7,
                label="placebo of the same dose",
            )
            fires = np.nan_to_num(main.activation.to_numpy()) != 0
            for some, shape, words in (
                (~fires, "o", "ablation, latent not active"),
                (fires, "^", "ablation, latent active"),
            ):
                if not some.any():
                    continue
                drawn = ax.scatter(
                    main.delta_norm[some], main.kl[some], c=main["norm"][some], norm=colours, cmap=NORMS, marker=shape,
                    s=20 if shape == "^" else 11, lw=0.3, edgecolor=INK if shape == "^" else "none", label=words,
                )  # fmt: skip
            often = own.frequency.iloc[0]
            ax.set_title(f"latent {latent}" + (f", fires on {100 * often:.2g} %" if np.isfinite(often) else ""))
            ax.set_xscale("log")
            ax.set_yscale("log")
        for ax in axes[:, 0]:
            ax.set_ylabel("KL(clean ‖ ablated), nats")
        for ax in axes[-1]:
            ax.set_xlabel("‖Δx‖, length of what is removed")
        assert drawn is not None
        bar = figure.colorbar(drawn, ax=axes, label="‖x‖", shrink=0.6)
        plain_ticks(bar.ax.yaxis)
        handles, labels = legend_entries(axes.flat)
        figure.legend(handles, labels, loc="outside upper left", ncols=3)
        n = shown.groupby("latent").size().max() // 2
        words = f"{sae}, {LABELS[context]}: {n} tokens a latent ({SAMPLED[provenance['sampling']]}), {patched(provenance, done='ablated')}."
        write_caption(figure, caption(provenance, words))
    return figure

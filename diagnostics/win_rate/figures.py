"""Figures of win rates of the cosine over the inner product: by depth, and by quartile of ‖x‖."""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from diagnostics.figures.axes import (
    BARS,
    SAMPLED,
    Depth,
    caption,
    legend_entries,
    null_models,
    patched,
    sae_label,
    write_caption,
)
from diagnostics.figures.looks import (
    BAND,
    COLOURS,
    GRID,
    LABELS,
    OPEN,
    PLACEBO_LOOKS,
    REFERENCE,
    UNTRAINED,
    looks,
    styled,
)
from diagnostics.statistics.tables import TRAINED


def _point(
    ax: Axes, x: float, rate: Mapping[str, Any], colour: str, marker: str, label: str | None, face: str | None = None
) -> None:
    """A rate with its interval, of a line of the table."""
    value, low, high = (float(rate[name]) for name in ("win_rate", "low", "high"))
    if np.isfinite(value):
        bars = np.nan_to_num([[value - low], [high - value]]).clip(min=0)
        ax.errorbar([x], [value], bars, color=colour, marker=marker, mfc=face or colour, ms=5, lw=0, elinewidth=1.2,
                    capsize=2, label=label)  # fmt: skip


def _box(ax: Axes, x: float, half: float, low: float, high: float, label: str | None, **look: Any) -> None:
    """A broad band from low to high, behind what it is compared with."""
    if np.isfinite(low) and np.isfinite(high):
        ax.add_patch(Rectangle((x - half, low), 2 * half, high - low, lw=0, zorder=0, label=label, **look))


def plot_win_rate(frame: pd.DataFrame, provenances: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Win rate of the cosine over the inner product by depth: a row for each run, a column for each kind of SAE.

    frame: win rates by run, model, place, SAE, edit and quartile; provenances: by run. Points: the ablations, bars 95 % delete-one-prompt
    jackknife intervals. Bands: from the lowest to the highest end of the intervals of both placebos, which have the same doses and no
    meaning. Grey: randomly initialised models.
    """
    overall = frame.loc[frame["quartile"] == "all"].assign(kind=frame["sae"].map(sae_label))
    kinds, runs = list(dict.fromkeys(overall["kind"])), list(provenances)
    with styled():
        figure, axes = plt.subplots(
            len(runs),
            len(kinds),
            figsize=(9.6, 2.9 * len(runs) + 1.6),
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for row, run in zip(axes, runs, strict=True):
            for ax, kind in zip(row, kinds, strict=True):
                some = overall.loc[(overall["run"] == run) & (overall["kind"] == kind)]
                if not (some["model"] == TRAINED).any():
                    ax.set_visible(False)
                    continue
                many = _depth_panel(ax, some, provenances[run])
                title = f"{kind} SAE" if len(runs) == 1 else f"{run}: {kind} SAE"
                ax.set_title(f"{title}, up to {many} latents")
            row[0].set_ylabel("win rate of the cosine")
        figure.legend(*legend_entries(axes.flat), loc="outside upper left", ncols=4)
        first = provenances[runs[0]]
        words = "First row: (latent, token) pairs" if len(runs) > 1 else "(latent, token) pairs"
        write_caption(figure, _caption(first, words, null_models(first)))
    return figure


def _depth_panel(ax: Axes, some: pd.DataFrame, provenance: Mapping[str, Any]) -> int:
    """One run and kind of SAE; the largest number of latents."""
    main = some["edit"] == provenance["reference"]
    trained = some["model"] == TRAINED
    depth = Depth(sorted(set(some.loc[trained, "layer"])), some.loc[trained, "point"].iloc[0])
    for i, context in enumerate(provenance["context"]):
        shift, colour = (i - 0.5) * 2.4 * depth.step, COLOURS[context]
        here = some.loc[trained & (some["context"] == context)]
        for j, (place, lines) in enumerate(here.groupby(["layer", "sae"], sort=False)):
            x, label = depth.place[place[0]] + shift, LABELS[context] if j == 0 else None
            of_main = lines["edit"] == provenance["reference"]
            _point(ax, x, lines.loc[of_main].iloc[0], colour, "o", label)
            placebos = lines.loc[~of_main]
            low, high = (placebos[end].fillna(placebos["win_rate"]) for end in ("low", "high"))
            words = None if label is None else f"placebos, {label}"
            _box(ax, x, depth.step, low.min(), high.max(), words, color=colour, alpha=0.22)
    for i, null in enumerate(provenance["null_models"]):
        same = some.loc[main & (some["model"] == null) & (some["context"] == "in_place")]
        words = "randomly initialised models, in context" if i == 0 else None
        ax.plot([depth.place[layer] for layer in same["layer"]], same["win_rate"], color=UNTRAINED, lw=0.9, marker=".",
                ms=4, zorder=0, label=words)  # fmt: skip
    ax.axhline(0.5, color=REFERENCE, lw=0.8, zorder=0)
    ax.set_ylim(-0.04, 1.04)
    depth.label(ax)
    ax.set_xlabel(f"block, ablated at {depth.point}")
    return int(some.loc[main & trained, "n_latents"].max())


def plot_paradox(
    frame: pd.DataFrame, provenances: Mapping[str, Mapping[str, Any]], labels: Mapping[str, str], run: str, context: str
) -> Figure:
    """Win rates overall and within each quartile of ‖x‖, a panel for each SAE and depth, beside the placebo's, with the band that range
    restriction alone predicts; above each panel the Simpson labels of the scores.

    frame, provenances: as for `plot_win_rate`; labels: in words, by SAE.
    """
    provenance = provenances[run]
    own = frame.loc[(frame["run"] == run) & (frame["context"] == context) & (frame["model"] == TRAINED)]
    own = own.assign(kind=own["sae"].map(sae_label))
    kinds, layers = list(dict.fromkeys(own["kind"])), sorted(set(own["layer"]))
    style = looks(list(dict.fromkeys(own["sae"])))
    with styled():
        figure, axes = plt.subplots(
            len(kinds), len(layers), figsize=(max(9.6, 3.2 * len(layers)), 2.9 * len(kinds) + 1.5), sharex=True, sharey=True,
            squeeze=False, layout="constrained",
        )  # fmt: skip
        for row, kind in zip(axes, kinds, strict=True):
            for ax, layer in zip(row, layers, strict=True):
                here = own.loc[(own["kind"] == kind) & (own["layer"] == layer)]
                if here.empty:
                    ax.set_visible(False)
                    continue
                sae = here["sae"].iloc[0]
                _quartile_panel(ax, here.loc[here["sae"] == sae], provenance["reference"], style[sae][0])
                ax.set_title(f"{kind} SAE, block {layer}\n{labels[sae]}", fontsize=8.5)
            row[0].set_ylabel("win rate of the cosine")
        for ax in axes[-1]:
            ax.set_xticks(range(5), ["all", "1", "2", "3", "4"])
            ax.set_xlabel("quartile of ‖x‖")
        figure.legend(*legend_entries(axes.flat), loc="outside upper left", ncols=3)
        most = own.loc[(own["edit"] == provenance["reference"]) & (own["quartile"] == "all"), "n_latents"].max()
        write_caption(figure, _caption(provenance, f"{most} latents of each SAE {LABELS[context]}"))
    return figure


def _quartile_panel(ax: Axes, lines: pd.DataFrame, main: str, colour: str) -> None:
    """Of one SAE. Each edit has five lines: all tokens, then the four quartiles."""
    rates = lines.loc[lines["edit"] == main].to_dict("records")
    kind = rates[0]["kind"]
    for i, rate in enumerate(rates):
        words = "what one fit for all norms predicts (95 %)" if i == 0 else None
        _box(ax, i, 0.36, rate["band_low"], rate["band_high"], words, color=BAND)
        _point(ax, i - 0.1, rate, colour, "o", f"ablation, {kind} SAE" if i == 0 else None)
    for i, rate in enumerate(lines.loc[lines["edit"] == "placebo_token"].to_dict("records")):
        grey, marker, _ = PLACEBO_LOOKS["placebo_token"]
        _point(ax, i + 0.18, rate, grey, marker, "its placebo" if i == 0 else None, OPEN)
    ax.axhline(0.5, color=REFERENCE, lw=0.8, zorder=0)
    ax.axvline(0.5, color=GRID, lw=0.8, zorder=0)
    ax.set_ylim(-0.04, 1.04)
    ax.set_xlim(-0.5, 4.5)


def _caption(provenance: Mapping[str, Any], words: str, more: str = "") -> str:
    sampled = SAMPLED[provenance["sampling"]]
    return caption(provenance, f"{words} ({sampled}), {patched(provenance, done='ablated')}. {BARS}{more}")

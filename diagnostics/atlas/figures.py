"""The figure of an atlas: predicted against exact effects, and how well cheap scores find large effects."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diagnostics.atlas.draws import places
from diagnostics.atlas.summary import FIRST, LABELS, calibration
from diagnostics.figures.axes import BARS, bar_lengths, caption, panels, write_caption
from diagnostics.figures.looks import NOTE, REFERENCE, SCORE_LOOKS, styled
from interventions.errors import ResultError

STATISTICS = {
    "rank": "Spearman's ρ with KL\namong a token's latents",
    "recall": f"of a token's {FIRST} largest KLs\namong its {FIRST} largest scores",
    "false_negatives": "of the tenth with the largest KL,\nscored below the median",
}


def plot_atlas(frame: pd.DataFrame, groups: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any]) -> Figure:
    """Above, a panel a depth: exact against predicted effect; below: rank correlation, recall and false negatives of each score.

    frame: a row for each (token, latent) that was subtracted; groups: statistics by SAE. Above: medians and quartiles in 20 bins of equal
    numbers of rows: KL as the sampled Fisher form and exact second order predict it, and the absolute drop of log p of the most likely token as the gradient predicts it;
    grey: y = x. Below: bars are 95 % intervals over prompts. Raises `ResultError` without groups.
    """
    if not groups:
        raise ResultError("no rows in this atlas, so there is nothing to draw")
    n = max(3, len(groups))
    with styled():
        width = 3.4 * n
        figure = plt.figure(figsize=(width, 7.4), layout="constrained")
        above, below = cast(Any, figure.subfigures(2, 1, height_ratios=(1, 1.15)))
        panels = above.subplots(1, n, sharex=True, sharey=True, squeeze=False)[0]
        for ax, g in zip(panels, groups, strict=False):
            _predictions(ax, g, frame.loc[frame["sae"] == g["sae"]])
        for ax in panels[len(groups) :]:
            ax.set_visible(False)
        panels[0].set_ylabel("exact effect, nats")
        panels[0].legend(loc="upper left")
        axes = below.subplots(1, 3)
        for ax, (statistic, words) in zip(axes, STATISTICS.items(), strict=True):
            _by_depth(ax, groups, statistic)
            ax.set_title(words, fontsize=9)
        handles, labels = axes[0].get_legend_handles_labels()
        below.legend(handles, labels, loc="outside lower center", ncols=5)
        words = (
            "Each active latent of each token removed, the SAE's error kept. Above: medians and quartiles in 20 bins of equal numbers of "
            f"rows; grey: y = x. {BARS}"
        )
        write_caption(figure, caption(provenance, words))
    return figure


def _predictions(ax: Axes, group: Mapping[str, Any], rows: pd.DataFrame) -> None:
    shown = []
    for name, effect, words in (
        ("fisher", "kl", "KL, sampled Fisher form"),
        ("second_order", "kl", "KL, exact second order"),
        ("gradient", "top1_drop", "|drop of log p(top token)|, gradient"),
    ):
        if name not in rows or not rows[name].notna().any():
            continue
        some = rows.loc[rows[name].notna()]
        bins = calibration(np.abs(some[name].to_numpy(float)), np.abs(some[effect].to_numpy(float)))
        x, y, low, high = (np.array([b[k] for b in bins]) for k in ("predicted", "median", "low", "high"))
        colour, marker = SCORE_LOOKS[name]
        ax.plot(x, y, color=colour, marker=marker, ms=4, lw=1, label=words)
        ax.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)
        shown += [x[x > 0], y[y > 0]]
    ax.set(xscale="log", yscale="log", xlabel="predicted, nats", title=f"{group['sae']}, block {group['layer']}")
    if shown:
        ends = np.array([min(s.min() for s in shown), max(s.max() for s in shown)])
        ax.plot(ends, ends, color=REFERENCE, lw=0.9, zorder=0)
    said = (
        f"{group['rows']:,} rows of {group['tokens']:,} tokens\n{group['share_below_floor']:.1%} within the noise floor, "
        f"{group['noise_floor']:.0e}\nscores compared on {group['scored_tokens']:,} tokens"
    )
    ax.text(0.98, 0.02, said, transform=ax.transAxes, ha="right", va="bottom", fontsize=6.5, color=NOTE)


def plot_draws(groups: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any]) -> Figure:
    """Rank correlation with KL among a token's latents of the sampled Fisher form, against its number of draws; the last point is exact.

    A panel for each SAE; dashed: the dose's, with its interval. Bars are 95 % delete-one-prompt jackknife intervals. Raises `ResultError`
    for atlases without exact second order.
    """
    if not (own := [g for g in groups if g.get("draws")]):
        raise ResultError("no token of this atlas has exact second order; ask for some with path_share")
    with styled():
        figure, axes = panels(len(own), 2.6, 2.6, 0.8, least=5.2, sharex=True, sharey=True)
        for ax, g in zip(axes.flat, own, strict=False):
            names, rank = list(g["draws"]), [s["rank"] for s in g["draws"].values()]
            (colour, marker), (grey, _) = SCORE_LOOKS["fisher"], SCORE_LOOKS["delta_norm"]
            x, value = places(names), np.array([e.value for e in rank])
            ax.plot(x[:-1], value[:-1], color=colour, lw=1, alpha=0.6)
            for some, (c, m), words in (
                (slice(-1), (colour, marker), "sampled"),
                (slice(-1, None), SCORE_LOOKS["second_order"], "exact"),
            ):
                bars = bar_lengths(rank[some])
                ax.errorbar(
                    x[some], value[some], bars, color=c, marker=m, ms=5, lw=0, elinewidth=1.1, capsize=2, label=words
                )
            dose = g["scores"]["delta_norm"]["rank"]
            ax.axhline(dose.value, color=grey, ls="--", lw=1, label=LABELS["delta_norm"])
            if np.isfinite(dose.low):
                ax.axhspan(dose.low, dose.high, color=grey, alpha=0.15, lw=0)
            ax.set_xticks(x, names)
            ax.set(title=f"{g['sae']}, block {g['layer']}", xlabel="next tokens drawn")
        axes.flat[0].set_ylabel("Spearman's ρ with KL\namong a token's latents")
        axes.flat[0].legend(loc="lower right")
        words = f"½ · mean over drawn next tokens y of (first-order change of log p(y))²; ∞: over all y, exact. {BARS}"
        write_caption(figure, caption(provenance, words))
    return figure


def _by_depth(ax: Axes, groups: Sequence[Mapping[str, Any]], statistic: str) -> None:
    names = list(dict.fromkeys(name for g in groups for name in g["scores"]))
    if all(g["scores"]["z"][statistic].value == g["scores"]["delta_norm"][statistic].value for g in groups):
        names.remove("z")  # unit rows: the dose itself
    for i, name in enumerate(names):
        colour, marker = SCORE_LOOKS[name]
        shift = (i - (len(names) - 1) / 2) * 0.085
        own = [(place, g["scores"][name][statistic]) for place, g in enumerate(groups) if name in g["scores"]]
        value = np.array([e.value for _, e in own])
        bars = bar_lengths([e for _, e in own])
        ax.errorbar(
            np.array([place for place, _ in own]) + shift, value, bars, color=colour, marker=marker, ms=5, lw=0,
            elinewidth=1.1, capsize=1.8, mfc=colour if name != "z" else None, label=LABELS[name],
        )  # fmt: skip
    chance = {"recall": [g["chance_recall"] for g in groups]}
    chance |= {name: [at] * len(groups) for name, at in (("rank", 0.0), ("false_negatives", 0.5))}
    for place, at in enumerate(chance[statistic]):
        label = "chance" if place == 0 else None
        ax.plot([place - 0.42, place + 0.42], [at, at], color=REFERENCE, lw=1, ls="--", label=label)
    ax.set_xticks(range(len(groups)), [g["sae"] for g in groups])
    ax.set_xlim(-0.5, len(groups) - 0.5)
    if statistic != "rank":
        ax.set_ylim(bottom=0)

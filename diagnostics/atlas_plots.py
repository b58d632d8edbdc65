"""The atlas' figure: is what a cheap score predicts what happens, and does it find what matters?"""

import textwrap
from typing import TYPE_CHECKING, Any, cast

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diagnostics.atlas_summary import FIRST, LABELS, calibration
from diagnostics.plots import write_caption
from diagnostics.style import REFERENCE, SCORE_LOOKS, styled
from interventions.errors import ResultError

if TYPE_CHECKING:
    from diagnostics.atlas import CausalAtlas

STATISTICS = {
    "rank": "Spearman's ρ with KL\namong a token's latents",
    "recall": f"of a token's {FIRST} largest KLs\namong its {FIRST} largest scores",
    "false_negatives": "of the tenth with the largest KL,\nscored below the median",
}


def plot_atlas(result: "CausalAtlas") -> Figure:
    """Above, a panel a depth: exact against predicted effect; below: rank correlation, recall and false negatives of each score.

    Above: medians and quartiles in bins of equal numbers of rows: KL as the Fisher form predicts it, and the absolute drop of log p of
    the most likely token as the gradient predicts it; grey: y = x. Below: bars are 95 % delete-one-prompt jackknife intervals.
    """
    groups = result.groups
    if not groups:
        raise ResultError("no rows in this atlas, so there is nothing to draw")
    n = max(3, len(groups))
    with styled():
        width = 3.4 * n
        figure = plt.figure(figsize=(width, 7.4), layout="constrained")
        above, below = cast(Any, figure.subfigures(2, 1, height_ratios=(1, 1.15)))
        panels = above.subplots(1, n, sharex=True, sharey=True, squeeze=False)[0]
        for ax, g in zip(panels, groups, strict=False):
            _predictions(ax, g, result)
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
        write_caption(figure, _caption(result, width))
    return figure


def _predictions(ax: Axes, group: dict[str, Any], result: "CausalAtlas") -> None:
    rows = result.frame.loc[result.frame.sae == group["sae"]]
    shown = []
    for name, effect, words in (
        ("fisher", "kl", "KL, sampled Fisher form"),
        ("gradient", "top1_drop", "|drop of log p(top token)|, gradient"),
    ):
        some = rows.loc[rows[name].notna()]
        if not len(some):
            continue
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


def _by_depth(ax: Axes, groups: list[dict[str, Any]], statistic: str) -> None:
    names = list(dict.fromkeys(name for g in groups for name in g["scores"]))
    if all(g["scores"]["z"][statistic].value == g["scores"]["delta_norm"][statistic].value for g in groups):
        names.remove("z")  # unit rows: the dose itself
    for i, name in enumerate(names):
        colour, marker = SCORE_LOOKS[name]
        shift = (i - (len(names) - 1) / 2) * 0.085
        own = [(place, g["scores"][name][statistic]) for place, g in enumerate(groups) if name in g["scores"]]
        value = np.array([e.value for _, e in own])
        bars = np.nan_to_num(np.array([[e.value - e.low, e.high - e.value] for _, e in own]).T).clip(min=0)
        ax.errorbar(
            np.array([place for place, _ in own]) + shift, value, bars, color=colour, marker=marker, ms=5, lw=0,
            elinewidth=1.1, capsize=1.8, mfc=colour if name != "z" else None, label=LABELS[name],
        )  # fmt: skip
    chance = {
        "rank": [0.0] * len(groups),
        "recall": [g["chance_recall"] for g in groups],
        "false_negatives": [0.5] * len(groups),
    }
    for place, at in enumerate(chance[statistic]):
        ax.plot(
            [place - 0.42, place + 0.42],
            [at, at],
            color=REFERENCE,
            lw=1,
            ls="--",
            label="chance" if place == 0 else None,
        )
    ax.set_xticks(range(len(groups)), [f"{g['sae']}" for g in groups])
    ax.set_xlim(-0.5, len(groups) - 0.5)
    if statistic != "rank":
        ax.set_ylim(bottom=0)


def _caption(result: "CausalAtlas", inches: float) -> str:
    p, g = result.provenance, result.groups
    sink = f"‖x‖ > {p['sink_filter']:g} × median left out" if p["sink_filter"] else "none"
    counts = "; ".join(
        f"{x['sae']}: {x['rows']:,} rows of {x['tokens']:,} tokens ({x['share_below_floor']:.1%} of rows within the noise floor of {x['noise_floor']:.0e} nats), scores compared on {x['scored_tokens']:,} of them"
        for x in g
    )
    delta = f", logits within {p['replay_delta']:.0e} of full forward passes" if p["replay_delta"] else ""
    paths = " and ".join(sorted(set("+".join(p["path"].values()).split("+"))))
    sentence = (
        f"{p['model']} ({p['model_note'] or p['norm']}; {p['dtype']}), {p['prompts']} prompts ({p['text'].get('name', 'given')}), seed {p['seed']}, "
        f"sink filter: {sink}. Every active latent of every token subtracted once, the SAE's error kept. {counts}. Above: medians and quartiles in 20 "
        f"bins of equal numbers of rows; grey: y = x. Below: 95 % delete-one-prompt jackknife intervals. Effects by {paths}{delta}."
    )
    return textwrap.fill(sentence, int(16 * inches), break_on_hyphens=False)

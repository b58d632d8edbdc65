"""The figure of direction and norm patches: KL by depth beside their placebos, and what the ratios are worth."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from diagnostics.figures.axes import BARS, CAP, Depth, caption, null_models, patched, points, write_caption
from diagnostics.figures.by_depth import Groups
from diagnostics.figures.looks import COLOURS, LABELS, MARKERS, NOISE, REFERENCE, UNTRAINED, styled
from interventions.errors import ResultError

NULL_DASHES = {"in_place": "-", "single_token": ":"}


def plot_direction_norm(
    groups: Groups, nulls: Sequence[Groups], provenance: Mapping[str, Any], point: str = "resid_post"
) -> Figure:
    """KL of the patches and their placebos by depth (above, a column a context), direction ÷ norm and ÷ placebo (below).

    groups: of the random pairs at one point, from the trained model; nulls: the same of each randomly initialised model, a grey line each.
    Points are medians over pairs, bars 95 % intervals over prompts; a lower bound, whose
    denominator lies within the noise floor, is an open marker with an arrow. The strip under the KL panels holds the noise floor.
    Raises `ResultError` without groups.
    """
    if not groups:
        raise ResultError(
            "no random pairs in this result, which the figure shows; run with pair_sets that hold 'random'"
        )
    contexts = list(dict.fromkeys(g["context"] for g in groups))
    depth = Depth(sorted({g["layer"] for g in groups}), point)
    with styled():
        figure = plt.figure(figsize=(9.6, 9.2), layout="constrained")
        grid = figure.add_gridspec(3, 2, height_ratios=[4, 1.1, 4.2])
        tops = [figure.add_subplot(grid[0, column]) for column in range(len(contexts))]
        for column, (ax, context) in enumerate(zip(tops, contexts, strict=True)):
            strip = figure.add_subplot(grid[1, column])
            _kl_panel(ax, strip, [g for g in groups if g["context"] == context], depth, context)
            if column:
                ax.set_ylabel("")
                strip.set_ylabel("")
        ends = np.array([ax.get_ylim() for ax in tops])
        for ax in tops:
            ax.set_ylim(ends[:, 0].min(), ends[:, 1].max())
        handles, labels = tops[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=2)
        left, right = (figure.add_subplot(grid[2, column]) for column in range(2))
        _ratio_panel(left, groups, nulls, contexts, depth)
        _placebo_panel(right, groups, nulls, contexts, depth)
        used = max(g["n_pairs"] for g in groups)
        words = (
            f"{used} random pairs of tokens {patched(provenance, point=point)}. {BARS} Open with arrow: lower bound."
        )
        write_caption(figure, caption(provenance, words + null_models(provenance)))
    return figure


def _kl_panel(ax: Axes, strip: Axes, groups: Groups, depth: Depth, context: str) -> None:
    x, floor = depth.at(groups), np.array([g["noise_floor"] for g in groups])
    lowest = floor.copy()
    for i, name in enumerate(("direction", "placebo_token", "placebo_direction", "norm", "placebo_norm")):
        estimates = [g["edits"][name]["median_kl"] for g in groups]
        value = np.array([e.value for e in estimates])
        effect = value > 10 * floor
        some = [e for e, keep in zip(estimates, effect, strict=True) if keep]
        points(ax, x[effect], some, COLOURS[name], LABELS[name], MARKERS[name], (i - 2) * depth.step)
        noise = ~effect & (value > 0)
        strip.plot(x[noise], value[noise], color=COLOURS[name], marker=MARKERS[name], ms=4, lw=0)
        lowest = np.minimum(lowest, np.where(noise, value, lowest))
    strip.plot(x, np.where(floor > 0, floor, np.nan), color=NOISE, lw=1, ls="--")
    strip.text(
        0.01,
        0.93,
        "noise floor: 99th percentile of self-swaps",
        transform=strip.transAxes,
        fontsize=7,
        color=NOISE,
        va="top",
    )
    for panel in (ax, strip):
        panel.set_yscale("log")
    positive = lowest[lowest > 0]
    if len(positive):
        strip.set_ylim(positive.min() / 4, floor.max() * 40)
    strip.yaxis.set_major_locator(LogLocator(numticks=4))
    strip.minorticks_off()
    ax.tick_params(labelbottom=False)
    ax.set_xticks([depth.place[layer] for layer in depth.layers])
    ax.set_xlim(strip.get_xlim())
    ax.set_ylabel("KL(clean ‖ intervened), nats")
    strip.set_ylabel("nats")
    ax.set_title(f"{LABELS[context]}: median KL over pairs")
    depth.label(strip)


def _grey(ax: Axes, nulls: Sequence[Groups], context: str, value: Any, depth: Depth, label: str) -> None:
    """A thin grey line for each randomly initialised model: what it also shows is architecture."""
    for i, groups in enumerate(nulls):
        some = [g for g in groups if g["context"] == context]
        y = np.array([min(value(g).value, CAP) for g in some])
        ax.plot(depth.at(some), np.where(y > 0, y, np.nan), color=UNTRAINED, lw=0.9, ls=NULL_DASHES[context], marker=".",
                ms=3, zorder=0, label=label if i == 0 else None)  # fmt: skip


def _ratio_panel(ax: Axes, groups: Groups, nulls: Sequence[Groups], contexts: list[str], depth: Depth) -> None:
    for i, context in enumerate(contexts):
        some = [g for g in groups if g["context"] == context]
        estimates = [g["ratios"]["direction ÷ norm"]["median"].estimate for g in some]
        points(ax, depth.at(some), estimates, COLOURS[context], LABELS[context], "o", (i - 0.5) * depth.step)
    for context in contexts:
        ratio = lambda g: g["ratios"]["direction ÷ norm"]["median"].estimate  # noqa: E731
        _grey(ax, nulls, context, ratio, depth, f"randomly initialised models, {LABELS[context]}")
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, 0.7), high * 20 if high >= CAP else high * 3)
    ax.axhline(1, color=REFERENCE, lw=0.8)
    ax.set_ylabel("direction patch ÷ norm patch")
    ax.set_title("unequal doses: ratio of KLs, median over pairs")
    ax.legend(loc="upper left")
    depth.label(ax)


def _placebo_panel(ax: Axes, groups: Groups, nulls: Sequence[Groups], contexts: list[str], depth: Depth) -> None:
    shift = 0
    for context in contexts:
        some = [g for g in groups if g["context"] == context]
        for name, label in (("placebo_token", "tangent between tokens"), ("placebo_direction", "isotropic tangent")):
            estimates = [g["ratios"][f"direction ÷ {name}"]["median"].estimate for g in some]
            dash = "-" if name == "placebo_token" else ":"
            points(ax, depth.at(some), estimates, COLOURS[context], f"{LABELS[context]}, {label}", MARKERS[name],
                    (shift - 1.5) * depth.step, dash=dash)  # fmt: skip
            shift += 1
    ratio = lambda g: g["ratios"]["direction ÷ placebo_token"]["median"].estimate  # noqa: E731
    _grey(ax, nulls, contexts[0], ratio, depth, f"randomly initialised models, {LABELS[contexts[0]]}, between tokens")
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, 0.9), max(high, 1.1) * (max(high, 1.1) / min(low, 0.9)) ** 0.7)  # room for the legend
    bottom, top = ax.get_ylim()
    fine = top / bottom < 100  # on a longer axis these would overlap
    marks = (0.25, 0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8) if fine else (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)
    ticks = [t for t in marks if low * 0.9 <= t <= high * 1.2]
    ax.set_yticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()
    ax.axhline(1, color=REFERENCE, lw=0.8)
    ax.set_ylabel("direction patch ÷ its placebo")
    ax.set_title("equal doses: ratio of KLs, median over pairs")
    ax.legend(loc="upper left")
    depth.label(ax)

"""What figures share: points with their intervals, the axis of depth, grey lines of untrained networks, the caption."""

import textwrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from diagnostics.statistics import Estimate
from diagnostics.style import CAPTION_SIZE, LABELS

CAP = 1e6
"""Ratios beyond are drawn at the top as lower bounds: their denominator is nothing but rounding."""


def points(
    ax: Axes, x: np.ndarray, estimates: list[Estimate], colour: str, label: str, marker: str, shift: float = 0.0, *,
    dash: Any = "-", log: bool = True, thin: bool = False,
) -> None:  # fmt: skip
    """A line with intervals; a lower bound is an open marker with an arrow up.

    log: the axis is; what is not above 0 is left out, and what is above `CAP` is drawn there as a bound. thin: as lines that others are compared with.
    """
    cap, floor = (CAP, 0.0) if log else (np.inf, -np.inf)
    value = np.array([min(e.value, cap) for e in estimates])
    low = np.array([min(e.low, cap) for e in estimates])
    high = np.array([min(e.high, cap) for e in estimates])
    bound = np.array([e.bound or e.value > cap for e in estimates], dtype=bool)
    shown = np.isfinite(value) & (value > floor)
    under = np.where(np.isfinite(low), value - low, 0)
    over = np.where(np.isfinite(high), high - value, 0)
    bars = np.vstack([under, over]).clip(min=0)
    solid, x = shown & ~bound, x + shift
    ax.plot(x[solid], value[solid], color=colour, lw=0.8 if thin else 1, ls=dash, alpha=0.6)
    ax.errorbar(
        x[solid], value[solid], bars[:, solid], color=colour, marker=marker, 
        ms=3 if thin else 4, lw=0, elinewidth=0.7 if thin else 1.2, capsize=0 if thin else 2, label=label, zorder=1 if thin else None,
    )  # fmt: skip
    ax.plot(x[shown & bound], value[shown & bound], color=colour, marker=marker, ms=5, mfc="white", lw=0)
    for xi, yi in zip(x[shown & bound], value[shown & bound], strict=True):
        ax.annotate("", (xi, yi * 9), (xi, yi * 1.5), arrowprops={"arrowstyle": "->", "color": colour})


def plain_ticks(axis: Axis) -> None:
    """Of a log axis that spans few decades: round numbers, as many as there is room for."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6, 8) if high / low < 8 else (1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


class Depth:
    """Where a layer stands on the x axis: to scale, or in order where two would overlap."""

    def __init__(self, layers: list[int], point: str = "resid_post"):
        self.point = point
        gaps = np.diff(layers)
        self.layers = layers
        self.to_scale = not len(gaps) or gaps.min() >= 0.06 * gaps.sum()
        self.place = {layer: float(layer if self.to_scale else i) for i, layer in enumerate(layers)}
        self.step = 0.015 * max(np.ptp(list(self.place.values())), 1)

    def at(self, groups: list[dict[str, Any]]) -> np.ndarray:
        return np.array([self.place[g["layer"]] for g in groups])

    def label(self, ax: Axes) -> None:
        ax.set_xticks([self.place[layer] for layer in self.layers], [str(layer) for layer in self.layers])
        what = "block whose output is patched" if self.point == "resid_post" else f"block, patched at {self.point}"
        ax.set_xlabel(what + ("" if self.to_scale else " (not to scale)"))


def write_caption(figure: Figure, words: str) -> None:
    """The caption, under all panels."""
    figure.supxlabel(words, fontsize=CAPTION_SIZE, x=0.01, ha="left")


def caption(
    provenance: dict[str, Any],
    rows: str,
    bounds: bool = False,
    *,
    bars: bool = True,
    point: str | None = None,
    context: str | None = None,
    inches: float = 9.6,
) -> str:
    """What a reader of the figure must know, from how it was made.

    rows: what was drawn, in words; bounds: lower bounds are; bars: intervals are; point and context: of the one that the figure shows (default:
    all); inches: width of the figure.
    """
    p, text = provenance, provenance["text"]
    paths = sorted(set("+".join(p["path"].values()).split("+")))
    delta = f", logits within {p['replay_delta']:.0e} of full forward passes" if p["replay_delta"] else ""
    sink = f"‖x‖ > {p['sink_filter']:g} × median dropped" if p["sink_filter"] else "none"
    points = [point] if point else list(dict.fromkeys(site.split(".")[1] for site in p["sites"]))
    shown = f" {LABELS[context]}" if context else ""
    read = {1: "the edited position", "last": "the last position"}.get(p["horizon"], f"{p['horizon']} positions (sums)")
    nulls = (
        f"Grey: networks of the same shape with random weights ({len(p['null_models'])}). " if p["null_models"] else ""
    )
    sentence = (
        f"{p['model']} ({p['model_note'] or p['norm']}; {p['dtype']}), {rows} {p['prompts']} prompts "
        f"({text.get('name', 'given')}{', chat template' if text.get('chat_template') else ''}), seed {p['seed']}, sink filter: {sink}; "
        f"patched{shown} at {', '.join(points)}, read at {read}. {'Bars: 95 % delete-one-prompt jackknife intervals. ' if bars else ''}{nulls}"
        f"{'Open marker with arrow: lower bound, the denominator lies within the noise floor. ' if bounds else ''}Effects by {' and '.join(paths)}{delta}."
    )
    return textwrap.fill(sentence, int(16 * inches), break_on_hyphens=False)

"""What figures share: grids of panels, points with intervals, the axis of depth, legends, the caption."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from diagnostics.figures.looks import CAPTION_SIZE, LABELS, OPEN
from diagnostics.statistics.estimate import Estimate

CAP = 1e6
"""Larger ratios are drawn at the top as lower bounds: their denominator is rounding error."""
_FAR = 1e12
"""past the upper edge of any panel"""


def points(
    ax: Axes, x: np.ndarray, estimates: list[Estimate], colour: str, label: str, marker: str, shift: float = 0.0, *,
    dash: Any = "-", log: bool = True, thin: bool = False,
) -> None:  # fmt: skip
    """A line with intervals; a lower bound is an open marker with an arrow up, an interval without an upper end a bar to the panel's edge.

    log: the axis is logarithmic: values that are not above 0 are left out, those above `CAP` drawn there as bounds. thin: for controls.
    """
    cap, floor = (CAP, 0.0) if log else (np.inf, -np.inf)
    value, low, high = (np.array([min(getattr(e, end), cap) for e in estimates]) for end in ("value", "low", "high"))
    bound = np.array([e.bound or e.value > cap for e in estimates], dtype=bool)
    shown = np.isfinite(value) & (value > floor)
    open_end = np.isinf([e.high for e in estimates])
    bars = _lengths(value, low, np.where(open_end, value, high))
    solid, x = shown & ~bound, x + shift
    ax.plot(x[solid], value[solid], color=colour, lw=0.8 if thin else 1, ls=dash, alpha=0.6)
    ax.errorbar(
        x[solid], value[solid], bars[:, solid], color=colour, marker=marker, 
        ms=3 if thin else 4, lw=0, elinewidth=0.7 if thin else 1.2, capsize=0 if thin else 2, label=label, zorder=1 if thin else None,
    )  # fmt: skip
    upward = [[(xi, yi), (xi, _FAR)] for xi, yi in zip(x[solid & open_end], value[solid & open_end], strict=True)]
    ax.add_artist(LineCollection(upward, colors=colour, linewidths=0.7 if thin else 1.2))  # limits of the axes stay
    ax.plot(x[shown & bound], value[shown & bound], color=colour, marker=marker, ms=5, mfc=OPEN, lw=0)
    for xi, yi in zip(x[shown & bound], value[shown & bound], strict=True):
        ax.annotate("", (xi, yi * 9), (xi, yi * 1.5), arrowprops={"arrowstyle": "->", "color": colour})


def bar_lengths(estimates: Sequence[Estimate]) -> np.ndarray:
    """Lengths below and above each value, `[2, estimate]`, for `Axes.errorbar`; 0 where there is no finite end."""
    return _lengths(*(np.array([getattr(e, end) for e in estimates]) for end in ("value", "low", "high")))


def _lengths(value: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    lengths = np.stack([value - low, high - value])
    return np.where(np.isfinite(lengths), lengths, 0).clip(min=0)


def panels(n: int, wide: float, high: float, more: float, least: float = 0.0, **shared: Any) -> tuple[Figure, Any]:
    """A figure of n panels, three to a row, and its axes `[row, column]`; those without a panel are hidden.

    wide, high: of a panel, in inches; more: height for legend and caption; least: width of the figure; shared: as for `plt.subplots`.
    """
    columns = min(3, n)
    rows = -(-n // columns)
    size = max(wide * columns, least), high * rows + more
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **shared)
    for ax in axes.flat[n:]:
        ax.set_visible(False)
    return figure, axes


def sae_label(name: str) -> str:
    """The last part of an SAE's name, for figures of one depth."""
    return name.rsplit("/", 1)[-1]


def legend_entries(axes: Iterable[Axes]) -> tuple[list[Any], list[str]]:
    """Handles and labels of several panels, each label once."""
    found: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


def legend_above(figure: Figure, ax: Axes, columns: int) -> None:
    """The legend of one panel above all; randomly initialised models come last."""
    pairs = list(zip(*ax.get_legend_handles_labels(), strict=True))
    pairs.sort(key=lambda pair: pair[1].startswith("untrained"))
    figure.legend(*zip(*pairs, strict=True), loc="outside upper left", ncols=columns)


def plain_ticks(axis: Axis) -> None:
    """Round numbers as ticks of a log axis that spans few decades."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6, 8) if high / low < 8 else (1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


class Depth:
    """Places of layers on the x axis: to scale, or in order where two would overlap."""

    def __init__(self, layers: list[int], point: str = "resid_post"):
        self.point = point
        gaps = np.diff(layers)
        self.layers = layers
        self.to_scale = not len(gaps) or gaps.min() >= 0.06 * gaps.sum()
        self.place = {layer: float(layer if self.to_scale else i) for i, layer in enumerate(layers)}
        self.step = 0.015 * max(np.ptp(list(self.place.values())), 1)

    def at(self, groups: Iterable[Mapping[str, Any]]) -> np.ndarray:
        return np.array([self.place[g["layer"]] for g in groups])

    def label(self, ax: Axes) -> None:
        ax.set_xticks([self.place[layer] for layer in self.layers], [str(layer) for layer in self.layers])
        what = "block whose output is patched" if self.point == "resid_post" else f"block, patched at {self.point}"
        ax.set_xlabel(what + ("" if self.to_scale else " (not to scale)"))


def write_caption(figure: Figure, words: str) -> None:
    """The caption, under all panels, in lines as wide as the figure."""
    figure.supxlabel(wrapped(words, float(figure.get_size_inches()[0])), fontsize=CAPTION_SIZE, x=0.01, ha="left")


def wrapped(words: str, inches: float) -> str:
    """A caption in lines as wide as the figure."""
    kept = words.replace(" %", "\xa0%")
    return textwrap.fill(kept, int(17.5 * inches), break_on_hyphens=False).replace("\xa0%", " %")


SAMPLED = {"stratified": "stratified by frequency, norm and |cos|", "active": "the most frequent, at active tokens"}
"""How latents and tokens were sampled."""
BARS = "Bars: 95 % intervals over prompts."


def caption(
    provenance: Mapping[str, Any], words: str, *, texts: str | None = None, place: str = "", sinks: str | None = None
) -> str:
    """The caption of a figure from its provenance: model, texts, seed and sink filter, then the figure's own sentences.

    words: the sentences. texts: what was measured (default: prompts and seed). place: such as the site. sinks: default `sink_rule`.
    """
    p = provenance
    model = f"{p['model']} ({p['model_note'] or p['norm']}; {p['dtype']})"
    texts = texts or f"{p['prompts']} prompts of {text_names(p)}, seed {p['seed']}"
    first = ", ".join(filter(None, [model, place, texts, sinks or sink_rule(p)]))
    return f"{first}. {words}" + (f" By {path_said([p])}." if isinstance(p.get("path"), Mapping) else "")


def write_pairs_caption(figure: Figure, provenance: Mapping[str, Any], words: str) -> None:
    """The caption of a figure of pairs of prompts: model, how many pairs of what, seed, how many pairs were left out, then the figure's own sentences."""
    pairs, dropped = provenance["texts"]["pairs"], sum(provenance.get("pairs_dropped", {}).values())
    given = "given" if pairs.get("task") in (None, "given") else f"of {pairs['task']}"
    n = f"{pairs['pairs']} pair{'' if pairs['pairs'] == 1 else 's'}"
    texts = f"{n} {'of ' + pairs['source'] if 'source' in pairs else given}, seed {provenance['seed']}"
    write_caption(figure, caption(provenance, words, texts=texts, sinks=f"{dropped or 'none'} left out"))


def text_names(provenance: Mapping[str, Any]) -> str:
    """Names of the texts: `boolq and sotu, chat template`."""
    texts = list(provenance["texts"].values()) if "texts" in provenance else [provenance["text"]]
    templates = any(t.get("chat_template") for t in texts)
    return " and ".join(t.get("name", "given text") for t in texts) + (", chat template" if templates else "")


def sink_rule(provenance: Mapping[str, Any], *others: str) -> str:
    """Which positions are left out. others: positions beside the sinks (default: the first of each prompt, where they are skipped)."""
    p, limit = provenance, provenance["sink_filter"]
    if limit and (skipped := p.get("skip_first")) and not others:
        others = ("position 0" if skipped == 1 else f"the first {skipped} positions",)
    left = [*others, f"‖x‖ > {limit:g} × median"] if limit else [*others]
    return f"{' and '.join(left)} left out" if left else "no sink filter"


def path_said(provenances: Iterable[Mapping[str, Any]]) -> str:
    """The paths that ran, and the largest logit difference from full forward passes: `replay, logits within 5e-06`."""
    every = list(provenances)
    paths = sorted({path for p in every for kinds in p["path"].values() for path in kinds.split("+")})
    delta = max((p.get("replay_delta") or p.get("path_delta") or 0.0 for p in every), default=0.0)
    said = ["the blocks above" if path == "blocks" else path for path in paths]
    return " and ".join(said) + (f", logits within {delta:.0e}" if delta else "")


def patched(
    provenance: Mapping[str, Any], *, point: str | None = None, context: str | None = None, done: str = "patched"
) -> str:
    """Where activations were edited and effects read: `patched in context at resid_post, read at the edited position`.

    point, context: those that the figure shows; default: all points, and no word of the context.
    """
    p = provenance
    points = [point] if point else list(dict.fromkeys(site.split(".")[1] for site in p["sites"]))
    where = f" {LABELS[context]}" if context else ""
    read = {1: "the edited position", "last": "the last position"}.get(p["horizon"], f"{p['horizon']} positions (sums)")
    return f"{done}{where} at {', '.join(points)}, read at {read}"


def null_models(provenance: Mapping[str, Any]) -> str:
    """How many randomly initialised models the grey lines show, if any."""
    n = len(provenance["null_models"])
    return f" Grey: {n} randomly initialised model{'s' if n > 1 else ''}." if n else ""

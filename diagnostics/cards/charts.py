"""Charts of a card as inline SVG, coloured by the card's style sheet in light and dark themes."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.ticker import LogLocator, MaxNLocator

from diagnostics.cards.content import Histogram
from diagnostics.cards.words import short
from diagnostics.results.templates import part
from diagnostics.statistics.estimate import Estimate

WIDTH, HEIGHT = 420, 200
LEFT, RIGHT, TOP, BOTTOM = 56, 8, 10, 38
_SHOWN_POINTS = 400
Mark = tuple[str, dict[str, str], str]
"""Tag, attributes, and words: the text of a label, the tooltip of a bar."""


class Axis:
    """Maps values to places on a linear or logarithmic axis."""

    def __init__(self, low: float, high: float, start: float, stop: float, log: bool = False):
        self.log, self.start, self.stop = log, start, stop
        self.low, self.high = (np.log10(low), np.log10(high)) if log else (low, high)
        self.span = self.high - self.low or 1.0

    def __call__(self, value: float) -> float:
        at = np.log10(value) if self.log else value
        return float(self.start + (self.stop - self.start) * (at - self.low) / self.span)

    def ticks(self, n: int = 4) -> list[float]:
        """About n round values within the axis."""
        if self.log:
            low, high = 10**self.low, 10**self.high
            subs = (1.0,) if self.high - self.low > 1.5 else (1.0, 2.0, 5.0)
            ticks = LogLocator(10, subs=subs).tick_values(low, high)
            inside = [float(t) for t in ticks if low <= t <= high]
            return inside[:: max(1, -(-len(inside) // (n + 1)))]
        found = MaxNLocator(n, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.high)
        room = 1e-9 * self.span
        return [float(t) for t in found if self.low - room <= t <= self.high + room]


def z_chart(histogram: Histogram) -> Markup:
    """Histogram of z where the latent is active, positive and negative in their colours."""
    edges, counts = histogram
    x, y = _axes(float(edges[0]), float(edges[-1]), 0, float(max(counts.max(initial=0), 1)))
    bars = [
        _bar(x(a), x(b), y(n), y(0), "pos" if a + b > 0 else "neg", f"z {short(a)} to {short(b)}: {int(n)} tokens")
        for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)
        if n
    ]
    return _svg("Histogram of z where the latent is active", bars, x, y, "z where active", "tokens")


def norm_chart(histograms: tuple[Histogram, Histogram]) -> Markup:
    """‖x‖ where the latent is active over ‖x‖ of all tokens, as shares of each."""
    active, every = histograms
    top = float(max(active.counts.max(initial=0), every.counts.max(initial=0), 1e-9))
    x, y = _axes(float(every.edges[0]), float(every.edges[-1]), 0, top, log_x=True)
    bars = [
        _bar(x(a), x(b), y(n), y(0), "all", f"‖x‖ {short(a)} to {short(b)}: {n:.1%} of all tokens")
        for a, b, n in zip(every.edges[:-1], every.edges[1:], every.counts, strict=True)
        if n
    ]
    heights = [y(float(n)) for n in active.counts]
    places = [x(float(e)) for e in active.edges]
    steps = [f"M{places[0]:.1f},{y(0):.1f}"]
    steps += [f"V{h:.1f}H{p:.1f}" for h, p in zip(heights, places[1:], strict=True)]
    bars.append(("path", {"class": "step", "d": f"{''.join(steps)}V{y(0):.1f}"}, ""))
    return _svg("‖x‖ where the latent is active and of all tokens", bars, x, y, "‖x‖", "share of tokens")


def quartile_chart(shares: Sequence[Estimate]) -> Markup:
    """Share of the latent's firing in each quartile of ‖x‖, with intervals, and a line at 25 %."""
    ends = [e.high if np.isfinite(e.high) else e.value for e in shares]
    x, y = _axes(0, 4, 0, max(0.5, *(float(np.nan_to_num(end)) for end in ends)))
    drawn = []
    for q, e in enumerate(shares):
        if not np.isfinite(e.value):
            continue
        drawn.append(_bar(x(q + 0.18), x(q + 0.82), y(e.value), y(0), "plain", f"quartile {q + 1}: {e}"))
        if np.isfinite(e.low):
            drawn.append(_line(x(q + 0.5), y(max(e.low, 0)), x(q + 0.5), y(e.high), "whisker"))
    drawn.append(_line(x(0), y(0.25), x(4), y(0.25), "dashed"))
    names = [(x(q + 0.5), f"Q{q + 1}") for q in range(4)]
    return _svg("Share of firing by quartile of ‖x‖", drawn, x, y, "quartile of ‖x‖", "share of firing", names)


def effect_chart(rows: pd.DataFrame) -> Markup:
    """KL of removing z·d against |z|, each token beside its placebo; both logarithmic."""
    own = rows.loc[np.isfinite(rows.kl.to_numpy(float))].iloc[:_SHOWN_POINTS]
    values = np.concatenate([own.kl.to_numpy(float), own.kl_placebo.dropna().to_numpy(float)])
    size = own.z.abs().to_numpy(float)
    if not len(own) or not (values > 0).any():
        return Markup()
    floor = max(float(values[values > 0].min()), float(values.max()) * 1e-7)
    low, high = float(size.min()), float(size.max())
    x, y = _axes(low / 1.06, high * 1.06, floor / 1.5, float(values.max()) * 1.5, log_x=True, log_y=True)
    tokens = own[["z", "kl", "kl_placebo"]].to_numpy(float).tolist()
    rings = [(x(abs(z)), y(max(placebo, floor))) for z, _, placebo in tokens if np.isfinite(placebo)]
    points = [_mark("circle", "placebo", cx=at, cy=height, r=2) for at, height in rings]
    points += [
        _mark("circle", "dot pos" if z > 0 else "dot neg", cx=x(abs(z)), cy=y(max(kl, floor)), r=2.3)
        for z, kl, _ in tokens
    ]
    return _svg("KL of removing the latent against its activation", points, x, y, "|z|", "KL (nats)")


def _axes(
    low: float, high: float, bottom: float, top: float, log_x: bool = False, log_y: bool = False
) -> tuple[Axis, Axis]:
    return Axis(low, high, LEFT, WIDTH - RIGHT, log_x), Axis(bottom, top, HEIGHT - BOTTOM, TOP, log_y)


def _mark(tag: str, kind: str, words: str = "", **places: float) -> Mark:
    return tag, {"class": kind, **{name: f"{place:.1f}" for name, place in places.items()}}, words


def _bar(x0: float, x1: float, y0: float, y1: float, kind: str, words: str) -> Mark:
    return _mark("rect", f"bar {kind}", words, x=x0, y=y0, width=max(x1 - x0 - 0.6, 0.6), height=max(y1 - y0, 0))


def _line(x0: float, y0: float, x1: float, y1: float, kind: str) -> Mark:
    return _mark("line", kind, x1=x0, y1=y0, x2=x1, y2=y1)


def _label(words: str, x: float, y: float, anchor: str = "middle", **more: str) -> Mark:
    return "text", {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor, **more}, words


def _svg(
    title: str,
    marks: Sequence[Mark],
    x: Axis,
    y: Axis,
    x_label: str,
    y_label: str,
    names: Sequence[tuple[float, str]] | None = None,
) -> Markup:
    left, right, bottom = LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM
    if names is None:
        names = [(x(t), short(t)) for t in x.ticks()]
    up = (TOP + bottom) / 2
    drawn = [
        *(_line(left, y(t), right, y(t), "grid") for t in y.ticks()),
        *marks,
        _line(left, bottom, right, bottom, "axis"),
        *(_label(short(t), left - 5, y(t) + 3.5, "end") for t in y.ticks()),
        *(_label(name, place, bottom + 14) for place, name in names),
        _label(x_label, (left + right) / 2, HEIGHT - 5, **{"class": "label"}),
        _label(y_label, 10, up, **{"class": "label", "transform": f"rotate(-90 10 {up})"}),
    ]
    return part("cards/chart.svg", title=title, width=WIDTH, height=HEIGHT, marks=drawn)

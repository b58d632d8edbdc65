"""Figures of edges: senders × receivers, and the strongest edges as a graph."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from diagnostics.figures.axes import bar_lengths, path_said, write_caption
from diagnostics.figures.looks import GRID, INK, MISSING, NOTE, NULL, REFERENCE, SIGNED, styled

_MOST = 40
"""senders, and receivers, of a matrix"""


def _caption(figure: Figure, provenance: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], words: str) -> None:
    p = provenance
    n = max((line["pairs"] for line in lines), default=0)
    first = f"{p['model']} ({p['dtype']}), {n} pairs, {lines[0]['direction']}, MLPs between {p['mlps']}."
    write_caption(figure, f"{first} {words} By {path_said([p])}.")


def _label(line: Mapping[str, Any], end: str) -> str:
    if end == "sender" or line["label"] in ("all", "last"):
        return str(line[end])
    return f"{line[end]} at {line['label']}"


def _row(layer: int, through: str) -> float:
    """Height of a node: embedding at the bottom, a block's MLP above its heads."""
    return layer + (0.5 if through == "mlp_out" else 0.0)


def plot_matrix(lines: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any]) -> Figure:
    """Shares of edges, senders down, receivers across: the rows and columns with the strongest edges, in the model's order."""
    if not lines:
        return _empty()
    names, places = {}, {}
    for end in ("sender", "receiver"):
        kept = list(dict.fromkeys(_label(line, end) for line in lines))[:_MOST]
        height = {
            _label(g, end): (_row(g[f"{end}_layer"], str(g[end]).split(".")[-1]), i) for i, g in enumerate(lines[::-1])
        }
        names[end] = sorted(kept, key=lambda name, height=height: height[name][0])
        places[end] = {name: i for i, name in enumerate(names[end])}
    values = np.full((len(names["sender"]), len(names["receiver"])), np.nan)
    clear = np.zeros(values.shape, dtype=bool)
    for g in lines:
        at = [places[end].get(_label(g, end)) for end in ("sender", "receiver")]
        if None not in at:
            values[at[0], at[1]] = g["share"].value
            clear[at[0], at[1]] = g["share"].low > 0 or g["share"].high < 0
    limit = max(float(np.nanmax(np.abs(values))), 1e-9)
    with styled():
        size = 2.2 + 0.26 * values.shape[1], 1.6 + 0.19 * values.shape[0]
        figure, ax = plt.subplots(figsize=(max(5.0, size[0]), max(3.0, size[1])), layout="constrained")
        ax.set_facecolor(MISSING)
        image = ax.imshow(values, cmap=SIGNED, vmin=-limit, vmax=limit, aspect="auto")
        ax.set_xticks(range(values.shape[1]), names["receiver"], rotation=90, fontsize=7)
        ax.set_yticks(range(values.shape[0]), names["sender"], fontsize=7)
        ax.scatter(*np.nonzero(clear)[::-1], s=3, color=INK)
        ax.set(xlabel="receiver", ylabel="sender")
        figure.colorbar(image, ax=ax, label="share of m_clean − m_corrupt")
        left = len({_label(g, "sender") for g in lines}), len({_label(g, "receiver") for g in lines})
        shown = (
            f" {values.shape[0]} of {left[0]} senders, {values.shape[1]} of {left[1]} receivers."
            if left > values.shape
            else ""
        )
        _caption(figure, provenance, lines, f"Dots: 95 % interval over pairs clear of 0. Grey: no edge.{shown}")
    return figure


def plot_graph(lines: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any]) -> Figure:
    """Edges as arrows from sender to receiver, layers upward; width and colour by share."""
    lines = [g for g in lines if np.isfinite(g["share"].value) and g["share"].value != 0]
    if not lines:
        return _empty()
    n_layers = max(g["receiver_layer"] for g in lines) + 1
    rows: dict[str, float] = {}
    for g in lines:
        sends, gets = _node(g, "sender"), _node(g, "receiver")
        rows[sends] = -1.0 if sends == "embedding" else _row(g["sender_layer"], sends.split(".")[-1])
        rows[gets] = float(n_layers) if gets == "logits" else _row(g["receiver_layer"], gets.split(".")[-1])
    levels = sorted(set(rows.values()))
    at: dict[str, tuple[float, float]] = {}
    for height, level in enumerate(levels):
        here = sorted(name for name, row in rows.items() if row == level)
        shift = 0.25 if height % 2 else 0.0  # arrows do not run through the nodes between
        at |= {name: (i - (len(here) - 1) / 2 + shift, float(height)) for i, name in enumerate(here)}
    limit = max(abs(g["share"].value) for g in lines)
    colours = plt.get_cmap(SIGNED)
    with styled():
        wide = max(x for x, _ in at.values()) - min(x for x, _ in at.values())
        figure, ax = plt.subplots(figsize=(max(5.0, 1.3 * wide + 2.5), 1.4 + 0.62 * len(levels)), layout="constrained")
        for i, g in enumerate(reversed(lines)):
            part, (x0, y0), (x1, y1) = abs(g["share"].value) / limit, at[_node(g, "sender")], at[_node(g, "receiver")]
            look = {"arrowstyle": "-|>", "lw": 0.5 + 3 * part, "color": colours(0.5 + 0.5 * g["share"].value / limit)}
            bend = 0.12 * (1 if i % 2 else -1) if y1 - y0 > 1 else 0.0
            ax.annotate("", (x1, y1 - 0.18), (x0, y0 + 0.18), arrowprops=look | {"connectionstyle": f"arc3,rad={bend}"})
            if g["through"] in "qkv":
                ax.text(x1 + 0.2 * (x0 - x1), y1 + 0.2 * (y0 - y1) - 0.1, g["through"], fontsize=6, color=NOTE)
        box = {"boxstyle": "round,pad=.25", "fc": "white", "ec": INK, "lw": 0.6}
        for name, (x, y) in at.items():
            ax.text(x, y, name, ha="center", va="center", fontsize=7, bbox=box)
        ax.set(xlim=(-wide / 2 - 1, wide / 2 + 1), ylim=(-0.6, len(levels) - 0.4))
        ax.axis("off")
        words = f"The {len(lines)} strongest edges; width and colour: share of m_clean − m_corrupt, at most {limit:.2g} (red +, blue −)."
        _caption(figure, provenance, lines, words)
    return figure


def plot_faithfulness(
    groups: Sequence[Mapping[str, Any]], random: Mapping[str, np.ndarray], provenance: Mapping[str, Any]
) -> Figure:
    """Share kept by the circuit alone and share lost without it, beside random circuits of its size."""
    with styled():
        figure, ax = plt.subplots(figsize=(5.4, 3.4), layout="constrained")
        for i, g in enumerate(groups):
            share = g["share"]
            null = random[g["edit"]]
            spread = np.linspace(-0.15, 0.15, len(null)) if len(null) > 1 else np.zeros(len(null))
            ax.scatter(i + spread, null, s=10, color=NULL, label=None if i else "random circuits of the same size")
            bars = bar_lengths([share])
            ax.errorbar(
                [i], [share.value], bars, color=INK, marker="o", ms=5, capsize=3, label=None if i else "circuit"
            )
            if np.isfinite(g["nothing_kept"]):
                ax.plot(
                    [i - 0.25, i + 0.25], [g["nothing_kept"]] * 2, color=REFERENCE, ls=":", label="everything ablated"
                )
        for at in (0, 1):
            ax.axhline(at, color=GRID, lw=0.8, zorder=0)
        names = {"keep": "all but the circuit ablated", "remove": "the circuit ablated"}
        ax.set_xticks(range(len(groups)), [names[g["edit"]] for g in groups])
        ax.set(xlim=(-0.5, len(groups) - 0.5), ylabel="share kept (left), lost (right)")
        ax.legend(loc="best")
        p = provenance
        words = f"{len(p['circuit'])} components of {', '.join(p['scope'])}; ablated to {p['ablate']}. Bars: 95 % intervals over pairs."
        first = f"{p['model']} ({p['dtype']}), {groups[0]['pairs']} pairs."
        write_caption(figure, f"{first} {words} By {path_said([p])}.")
    return figure


def _node(line: Mapping[str, Any], end: str) -> str:
    """A head is one node, whatever it sends at or receives through."""
    layer, head = line[f"{end}_layer"], line[f"{end}_head"]
    return f"{layer}.{head}" if head >= 0 else str(line[end]).replace("mlp_out", "mlp")


def _empty() -> Figure:
    with styled():
        figure, ax = plt.subplots(figsize=(5, 3), layout="constrained")
        ax.text(0.5, 0.5, "no edge carries anything", ha="center", color=NOTE)
        ax.axis("off")
    return figure

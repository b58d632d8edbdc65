"""Figures of edges: senders × receivers, and the strongest edges as a graph."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from diagnostics.figures.axes import bar_lengths, legend_above, write_pairs_caption
from diagnostics.figures.looks import GRID, INK, NOTE, NULL, OPEN, REFERENCE, SIGNED, styled
from diagnostics.figures.maps import draw_cells, mark_largest_control
from diagnostics.pairs.shares import standing_out, tested

_MOST = 40
"""senders, and receivers, of a matrix"""
_DIRECTIONS = {"denoise": "clean into corrupt", "noise": "corrupt into clean"}
Table = Any
"""a DataFrame of edges, strongest first"""


def _label(line: Mapping[Any, Any], end: str) -> str:
    if end == "sender" or line["label"] in ("all", "last"):
        return str(line[end])
    return f"{line[end]} at {line['label']}"


def _how(provenance: Mapping[str, Any]) -> str:
    later = ", later writes frozen" if provenance["later"] == "frozen" else ""
    return f"MLPs between {provenance['mlps']}{later}"


def _row(layer: int, through: str) -> float:
    """Height of a node: a block's MLP above its heads."""
    return layer + (0.5 if through == "mlp_out" else 0.0)


def plot_matrix(edges: Table, provenance: Mapping[str, Any]) -> Figure:
    """Shares of edges of one direction, senders down, receivers across, those with the strongest edges, in the model's order.

    Edges that do not beat their control are dimmed; marks on the colour bar: the largest share of a control.
    """
    lines, compared = edges.to_dict("records"), tested(edges)
    names: dict[str, list[str]] = {}
    for end in ("sender", "receiver"):
        height = {_label(g, end): _row(g[f"{end}_layer"], g[end].split(".")[-1]) for g in lines}
        names[end] = sorted(list(height)[:_MOST], key=lambda name, height=height: height[name])
        names[f"every {end}"] = list(height)
    values = np.full((len(names["sender"]), len(names["receiver"])), np.nan)
    clear = np.zeros(values.shape, dtype=bool)
    for g in lines:
        sender, receiver = (_label(g, end) for end in ("sender", "receiver"))
        if sender in names["sender"] and receiver in names["receiver"]:
            at = names["sender"].index(sender), names["receiver"].index(receiver)
            values[at], clear[at] = g["share"], g["beats"] or not compared
    limit = max(float(np.nanmax(np.abs(values))), 1e-9)
    norm = Normalize(-limit, limit)
    with styled():
        size = 2.2 + 0.26 * values.shape[1], 1.8 + 0.19 * values.shape[0]
        figure, ax = plt.subplots(figsize=(max(6.5, size[0]), max(3.2, size[1])), layout="constrained")
        draw_cells(ax, values, clear, norm)
        ax.set_xticks(range(values.shape[1]), names["receiver"], rotation=90, fontsize=7)
        ax.set_yticks(range(values.shape[0]), names["sender"], fontsize=7)
        ax.set(xlabel="receiver", ylabel="sender")
        ax.set_title(f"{lines[0]['direction']}: {_DIRECTIONS[lines[0]['direction']]}")
        bar = figure.colorbar(plt.cm.ScalarMappable(norm, SIGNED), ax=ax, label="share of m_clean − m_corrupt")
        words = f"{_how(provenance)}. "
        if compared:
            mark_largest_control(bar, min(float(edges["null"].iloc[0]), limit))
            words += "Dimmed: does not differ from its control (FDR 5 %). Bar's lines: largest control. "
        words += "Grey: no edge."
        left = [
            f"{len(names[end])} of {len(names[f'every {end}'])} {end}s"
            for end in ("sender", "receiver")
            if len(names[f"every {end}"]) > _MOST
        ]
        words += f" Shown: {' and '.join(left)}." if left else ""
        write_pairs_caption(figure, provenance, words)
    return figure


def plot_graph(edges: Table, provenance: Mapping[str, Any], n: int) -> Figure:
    """The n strongest edges of one direction among those that beat their controls (of all, where none was tested) as arrows from
    sender to receiver, layers upward; width by share."""
    direction, chosen = str(edges["direction"].iloc[0]), standing_out(edges)
    chosen = chosen[np.isfinite(chosen["share"]) & (chosen["share"] != 0)]
    lines = chosen.head(n).to_dict("records")
    top = max((g["receiver_layer"] for g in lines), default=0) + 1.0
    rows: dict[str, float] = {}
    for g in lines:
        sends, gets = _node(g, "sender"), _node(g, "receiver")
        rows[sends] = -1.0 if sends == "embedding" else _row(g["sender_layer"], g["sender"].split(".")[-1])
        rows[gets] = top if gets == "logits" else _row(g["receiver_layer"], g["through"])
    levels = sorted(set(rows.values()))
    at: dict[str, tuple[float, float]] = {}
    for height, level in enumerate(levels):
        here = sorted(name for name, row in rows.items() if row == level)
        shift = 0.25 if height % 2 else 0.0  # arrows do not run through the nodes between
        at |= {name: (i - (len(here) - 1) / 2 + shift, float(height)) for i, name in enumerate(here)}
    limit = max((abs(g["share"]) for g in lines), default=1.0)
    colours = plt.get_cmap(SIGNED)
    with styled():
        wide = max((2 * abs(x) for x, _ in at.values()), default=1.0)
        across = max(6.5, 1.1 * wide + 2.5)
        figure, ax = plt.subplots(figsize=(across, 1.6 + 0.62 * len(levels)), layout="constrained")
        # Inches of a level per inch of a step aside: arrows bend on paper, not in data.
        steep = 0.62 * (wide + 2) / across
        for i, g in enumerate(reversed(lines)):
            part, (x0, y0), (x1, y1) = abs(g["share"]) / limit, at[_node(g, "sender")], at[_node(g, "receiver")]
            look = {
                "arrowstyle": "-|>,head_length=.3,head_width=.12",
                "lw": 0.7 + 2.5 * part,
                "alpha": 0.35 + 0.65 * part,
            }
            look["color"] = colours(0.92 if g["share"] > 0 else 0.08)
            bend = 0.12 * (1 if i % 2 else -1) if y1 - y0 > 1 else 0.0
            ax.annotate("", (x1, y1 - 0.18), (x0, y0 + 0.18), arrowprops=look | {"connectionstyle": f"arc3,rad={bend}"})
            if g["through"] in ("q", "k", "v"):
                across_middle = (x0 + x1) / 2 + bend / 2 * (y1 - y0 - 0.36) * steep
                up_middle = (y0 + y1) / 2 - bend / 2 * (x1 - x0) / steep
                letter = {"fontsize": 6, "color": NOTE, "ha": "center", "va": "center"}
                ax.text(
                    across_middle,
                    up_middle,
                    g["through"],
                    bbox={"boxstyle": "round,pad=.1", "fc": OPEN, "ec": "none"},
                    **letter,
                )
        box = {"boxstyle": "round,pad=.25", "fc": OPEN, "ec": INK, "lw": 0.6}
        for name, (x, y) in at.items():
            ax.text(x, y, name, ha="center", va="center", fontsize=7, bbox=box)
        ax.set(xlim=(-wide / 2 - 1, wide / 2 + 1), ylim=(-0.6, max(len(levels), 1) - 0.4))
        ax.axis("off")
        ax.set_title(f"{direction}: {_DIRECTIONS[direction]}")
        among = "that beat their controls" if tested(edges) else "(not tested: no controls, or fewer than 10 pairs)"
        words = f"The {len(lines)} strongest of {len(chosen)} edges {among}, {_how(provenance)}. Width: |share|, at most {limit:.2g}; red: above 0, blue: below."
        if not lines:
            words = f"{_how(provenance)}. None of {len(edges)} edges beats its control (FDR 5 %)."
            ax.text(0, 0, "no edge beats its control", ha="center", va="center", color=NOTE)
        write_pairs_caption(figure, provenance, words)
    return figure


def plot_faithfulness(
    groups: Sequence[Mapping[str, Any]], random: Mapping[str, np.ndarray], provenance: Mapping[str, Any]
) -> Figure:
    """Share kept by the circuit alone and share lost without it, beside random circuits of its size."""
    with styled():
        figure, ax = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
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
        legend_above(figure, ax, 3)
        ax.set_title("a circuit alone, and the model without it")
        p = provenance
        words = f"{len(p['circuit'])} components of {', '.join(p['scope'])}; ablated to {p['ablate']}. Bars: 95 % intervals over pairs."
        write_pairs_caption(figure, p, words)
    return figure


def _node(line: Mapping[Any, Any], end: str) -> str:
    """A head is one node, whether it sends or receives through q. Heads of k and v, which several queries may share, are nodes of their own."""
    layer, head = line[f"{end}_layer"], line[f"{end}_head"]
    if end == "receiver" and line["through"] in ("k", "v"):
        return f"{layer}.kv{head}"
    return f"{layer}.{head}" if head >= 0 else str(line[end]).replace("mlp_out", "mlp")

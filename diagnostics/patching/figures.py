"""Maps of cells: block by position, or block by head at each position, both directions; and cheap scores beside exact effects."""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Bool
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy import ndarray

from diagnostics.figures.axes import write_pairs_caption
from diagnostics.figures.looks import BAND, INK, KEY, NOTE, OPEN, REFERENCE, SIGNED, styled
from diagnostics.figures.maps import draw_cells, mark_largest_control
from diagnostics.patching.summary import cell_name

Table = Any
"""a DataFrame of cells, or of an audit"""
_TITLES = {"denoise": "denoise: clean into corrupt", "noise": "noise: corrupt into clean"}
_SCORES = {
    "gradient": "gradient × difference", "ig5": "integrated, 5 steps", "ig20": "integrated, 20 steps", "dla": "direct attribution",
}  # fmt: skip
_MOST_LABELS, _NAMED = 6, 8
_FAR = 0.15
"""of the largest share: cells whose score is further off are named, `_FARTHEST` at most, no two closer than that"""
_FARTHEST = 3


def plot_maps(cells: Table, provenance: Mapping[str, Any]) -> Figure:
    """Shares of one site's cells; by head: a panel for each position that holds the largest cells.

    Cells that beat their control are outlined, the others dimmed; cells in which nothing differs are grey. One colour scale for
    all, with a mark at the largest share of a control. The strongest heads are named.
    """
    directions = list(dict.fromkeys(cells["direction"]))
    by_head = bool((cells["head"] >= 0).any())
    order = cells.groupby("label")["position"].mean().sort_values(kind="stable").index.tolist()
    site, n, pool = str(cells["site"].iloc[0]), int(cells["n"].max()), int(cells["pool"].iloc[0])
    written = provenance.get("words", [{}] * (pool + 1))[pool]
    tested = bool(cells["q"].notna().any())
    largest = float(cells["share"].abs().max()) or 1.0
    norm, zeros = Normalize(-largest, largest), False
    if by_head:
        size = cells.groupby("label")["share"].agg(lambda s: s.abs().max())
        shown = [label for label in order if label in set(size.nlargest(_MOST_LABELS).index)]
    else:
        shown = order
    with styled():
        if by_head:
            wide = max(6.4, 1.3 + 1.8 * len(shown))
            figure, axes = plt.subplots(
                len(directions), len(shown), figsize=(wide, 0.6 + 3.1 * len(directions)), layout="constrained", sharex=True, sharey=True, squeeze=False
            )  # fmt: skip
            for row, direction in zip(axes, directions, strict=True):
                for ax, label in zip(row, shown, strict=True):
                    some = cells[(cells["direction"] == direction) & (cells["label"] == label)]
                    zeros |= _draw(ax, some, "head", sorted(cells["head"].unique()), norm, tested)
                    if direction == directions[0]:
                        ax.set_title(written.get(label, label))
                    _name_strongest(ax, some, tested, largest)
                row[0].set_ylabel(f"{_TITLES[direction]}\nblock, patched at {site}")
            for ax in axes[-1]:
                ax.set_xlabel("head")
        else:
            wide = max(7.0, 1.2 + 0.34 * len(shown) * len(directions))
            figure, axes = plt.subplots(
                1, len(directions), figsize=(wide, 4.6), layout="constrained", sharey=True, squeeze=False
            )
            for ax, direction in zip(axes[0], directions, strict=True):
                zeros |= _draw(ax, cells[cells["direction"] == direction], "label", shown, norm, tested)
                ax.set_title(_TITLES[direction])
                ax.set_xticks(range(len(shown)), [written.get(label, label) for label in shown])
                ax.set_xlabel("token")
                ax.tick_params(axis="x", labelrotation=90)
            axes[0][0].set_ylabel(f"block, patched at {site}")
        bar = figure.colorbar(plt.cm.ScalarMappable(norm, SIGNED), ax=axes, shrink=0.8, pad=0.02)
        bar.set_label(f"share of the {provenance['metric'].replace('_', ' ')}\nΣ effect / Σ (clean − corrupt)")
        if tested:
            mark_largest_control(bar, float(cells["null"].max()))
        pools = provenance.get("pools", [])
        words = f"{n} of them {pools[pool]}. " if len(pools) > 1 else ""
        if tested:
            words += "Outlined: beats its control (FDR 5 %). Bar's lines: largest control. "
        else:
            words += "Not tested: fewer than 10 pairs, or no controls. "
        if zeros:
            words += "Grey: 0 exactly. "
        if by_head and len(shown) < len(order):
            words += f"{len(shown)} of {len(order)} positions shown. "
        write_pairs_caption(figure, provenance, words.strip())
    return figure


def plot_beside_control(some: Table, provenance: Mapping[str, Any]) -> Figure:
    """The heads of one direction at one position: their shares, and those of their controls, in the same colours.

    Nothing is dimmed. The strongest heads that beat their controls are named on both sides.
    """
    heads, layers = (sorted(some[name].unique()) for name in ("head", "layer"))
    largest = float(some["share"].abs().max()) or 1.0
    norm = Normalize(-largest, largest)
    with styled():
        figure, axes = plt.subplots(
            1, 2, figsize=(6.8, 1 + 0.16 * len(layers)), layout="constrained", sharex=True, sharey=True
        )
        for ax, column, title in zip(
            axes, ("share", "control"), ("the head's output, patched", "control: moved as far"), strict=True
        ):
            values = some.pivot(index="layer", columns="head", values=column).to_numpy(float)
            draw_cells(ax, values, np.isfinite(values), norm, origin="lower")
            _name_strongest(ax, some, bool(some["q"].notna().any()), largest, column)
            ax.set_title(title)
            ax.set_xlabel("head")
            ax.set_xticks(range(len(heads)), [str(head) for head in heads])
            every = slice(None, None, max(1, round(len(layers) / 6)))
            ax.set_yticks(range(len(layers))[every], [str(layer) for layer in layers[every]])
        axes[0].set_ylabel("block")
        bar = figure.colorbar(plt.cm.ScalarMappable(norm, SIGNED), ax=axes, pad=0.02)
        bar.set_label(f"share of the {provenance['metric'].replace('_', ' ')}")
        write_pairs_caption(figure, provenance, f"At {some['label'].iloc[0]}.")
    return figure


def _draw(ax: Axes, cells: Table, across: str, columns: list[Any], norm: Normalize, tested: bool) -> bool:
    """A panel, measured blocks upward; returns whether any cell is 0 exactly."""
    layers = sorted(cells["layer"].unique())
    share, beats = (
        cells.assign(beats=cells["beats"].astype(float))
        .pivot_table(index="layer", columns=across, values=name, observed=True)
        .reindex(index=layers, columns=columns)
        .to_numpy(float)
        for name in ("share", "beats")
    )
    clear = beats > 0
    draw_cells(ax, share, clear | (not tested), norm, origin="lower")
    ax.set_facecolor(BAND)  # told apart from shares near 0
    ax.add_collection(LineCollection(_outline(clear), colors=NOTE, linewidths=0.5), autolim=False)
    ax.set_xticks(range(len(columns)), [str(column) for column in columns])
    some = slice(None, None, max(1, round(len(layers) / 6)))
    ax.set_yticks(range(len(layers))[some], [str(layer) for layer in layers[some]])
    return bool(np.isnan(share).any())


def _outline(inside: Bool[ndarray, "row column"]) -> list[Any]:
    """Borders between cells inside and outside, as segments."""
    padded = np.pad(inside, 1)
    upright = np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1]) - 0.5
    level = np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1]) - 0.5
    return [[(x, y), (x, y + 1)] for y, x in upright] + [[(x, y), (x + 1, y)] for y, x in level]


def _name_strongest(ax: Axes, cells: Table, tested: bool, largest: float, drawn: str = "share") -> None:
    """Write the numbers of the heads with the largest shares into their cells; drawn: the column that the panel shows."""
    layers = sorted(cells["layer"].unique())
    some = cells[cells["beats"]] if tested else cells
    some = some[some["share"].abs() > 0.3 * largest]
    some = some.loc[some["share"].abs().sort_values(ascending=False).index[:_NAMED]]
    for _, cell in some.iterrows():
        colour = OPEN if abs(cell[drawn]) > 0.7 * largest else INK
        place = cell["head"], layers.index(cell["layer"])
        ax.text(*place, f"{cell['layer']}.{cell['head']}", ha="center", va="center", fontsize=5, color=colour)


def plot_audit(cells: Table, audit: Table, provenance: Mapping[str, Any]) -> Figure:
    """Each score against the exact share, a point for each cell; black: cells that beat their controls, or all where none is tested.

    The cells whose score is furthest from the exact share are named.
    """
    scores = list(dict.fromkeys(audit["score"]))
    families = audit.drop_duplicates(["direction", "site"])[["direction", "site"]].to_numpy().tolist()
    tested = bool(cells["q"].notna().any())
    turned = len(scores) == 1  # one row
    shape = (1, len(families)) if turned else (len(families), len(scores))
    with styled():
        size = max(7.0, 2.3 * shape[1]), 0.8 + (2.6 if shape[1] < 3 else 2.1) * shape[0]
        figure, axes = plt.subplots(*shape, figsize=size, layout="constrained", squeeze=False)
        for (direction, site), row in zip(families, axes.T if turned else axes, strict=True):
            some = cells[(cells["direction"] == direction) & (cells["site"] == site)]
            clear = some["beats"].to_numpy() if tested else np.ones(len(some), dtype=bool)
            for ax, score in zip(row, scores, strict=True):
                line = audit[(audit["direction"] == direction) & (audit["site"] == site) & (audit["score"] == score)]
                if line.empty:
                    ax.set_axis_off()
                    continue
                x, y = some["share"].to_numpy(), some[score].to_numpy()
                ax.plot(x[~clear], y[~clear], ".", color=REFERENCE, ms=2.5, rasterized=True)
                ax.plot(x[clear], y[clear], ".", color=INK, ms=3.5, rasterized=True)
                ends = np.array([np.nanmin(x), np.nanmax(x)])
                ax.plot(ends, ends, color=KEY, lw=0.8)
                ax.axhline(0, color=REFERENCE, lw=0.5)
                ax.axvline(0, color=REFERENCE, lw=0.5)
                ax.set_title(f"{_SCORES[score]}: ρ = {line['spearman'].iloc[0]:.2f}", fontsize=8)
                _name_farthest(ax, some[clear], score)
            row[0].set_ylabel(f"{site}, {direction}\nscore, as a share")
        for ax in axes[-1]:
            ax.set_xlabel("exact share")
        words = "Black: beats its control. " if tested else ""
        words += "Line: score = exact. ρ: rank correlation over cells that were run."
        write_pairs_caption(figure, provenance, words)
    return figure


def _name_farthest(ax: Axes, cells: Table, score: str) -> None:
    """Write beside the cells that a score misjudges most what they are, but for those that lie where another one is named."""
    largest = cells["share"].abs().max()
    off = (cells[score] - cells["share"]).abs().sort_values(ascending=False)
    named: list[ndarray] = []
    for at in off[off > _FAR * largest].index:
        cell = cells.loc[at]
        point = np.array([cell["share"], cell[score]])
        if len(named) == _FARTHEST or any(np.abs(point - other).max() < _FAR * largest for other in named):
            continue
        named.append(point)
        name = cell_name(cell).split(" ", 1)[1]
        look = {"ha": "right", "va": "bottom", "rotation": -25, "rotation_mode": "anchor"}
        ax.annotate(name, tuple(point), (-3, 1), textcoords="offset points", fontsize=5.5, color=NOTE, **look)

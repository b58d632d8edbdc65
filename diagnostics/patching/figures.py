"""Maps of cells: block by position, or block by head at each position, both directions; and cheap scores beside exact effects."""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from diagnostics.figures.axes import write_pairs_caption
from diagnostics.figures.looks import INK, KEY, OPEN, REFERENCE, SIGNED, styled
from diagnostics.figures.maps import draw_cells, mark_largest_control

Table = Any
"""a DataFrame of cells, or of an audit"""
_TITLES = {"denoise": "denoise: clean into corrupt", "noise": "noise: corrupt into clean"}
_MOST_LABELS, _NAMED = 6, 8


def plot_maps(cells: Table, provenance: Mapping[str, Any]) -> Figure:
    """Shares of one site's cells; by head: a panel for each position that holds the largest cells.

    Cells that do not beat their control are dimmed, cells in which nothing differs are grey. One colour scale for all, with a
    mark at the largest share of a control. The strongest heads are named.
    """
    directions = list(dict.fromkeys(cells["direction"]))
    by_head = bool((cells["head"] >= 0).any())
    order = cells.groupby("label")["position"].mean().sort_values(kind="stable").index.tolist()
    tested = bool(cells["q"].notna().any())
    largest = float(cells["share"].abs().max()) or 1.0
    norm = Normalize(-largest, largest)
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
                    _draw(ax, some, "head", sorted(cells["head"].unique()), norm, tested)
                    if direction == directions[0]:
                        ax.set_title(str(label))
                    _name_strongest(ax, some, tested, largest)
                row[0].set_ylabel(f"{_TITLES[direction]}\nblock")
            for ax in axes[-1]:
                ax.set_xlabel("head")
        else:
            wide = max(6.4, 1.2 + 0.34 * len(shown) * len(directions))
            figure, axes = plt.subplots(
                1, len(directions), figsize=(wide, 4.6), layout="constrained", sharey=True, squeeze=False
            )
            for ax, direction in zip(axes[0], directions, strict=True):
                _draw(ax, cells[cells["direction"] == direction], "label", shown, norm, tested)
                ax.set_title(_TITLES[direction])
                ax.set_xlabel("token")
                ax.tick_params(axis="x", labelrotation=90)
            axes[0][0].set_ylabel("block")
        bar = figure.colorbar(plt.cm.ScalarMappable(norm, SIGNED), ax=axes, shrink=0.8, pad=0.02)
        bar.set_label(f"share of {provenance['metric'].replace('_', ' ')}, Σ effect / Σ (clean − corrupt)")
        if tested:
            mark_largest_control(bar, float(cells["null"].max()))
        site, n = str(cells["site"].iloc[0]), int(cells["n"].max())
        pools = provenance.get("pools", [])
        kind = f", {pools[int(cells['pool'].iloc[0])]}" if len(pools) > 1 else ""
        words = f"{site}, {n} pairs{kind}. "
        if tested:
            words += "Dimmed: does not differ from its control (FDR 5 %). Bar's lines: largest control. "
        words += "Grey: 0 exactly."
        if by_head and len(shown) < len(order):
            words += f" {len(shown)} of {len(order)} positions shown."
        write_pairs_caption(figure, provenance, words)
    return figure


def _draw(ax: Axes, cells: Table, across: str, columns: list[Any], norm: Normalize, tested: bool) -> None:
    layers = np.arange(int(cells["layer"].min()), int(cells["layer"].max()) + 1)
    grid = cells.pivot_table(index="layer", columns=across, values="share", observed=True).reindex(
        index=layers, columns=columns
    )
    seen = cells.assign(beats=cells["beats"].astype(float)).pivot_table(
        index="layer", columns=across, values="beats", observed=True
    )
    clear = (seen.reindex(index=layers, columns=columns).fillna(0.0) > 0).to_numpy() | (not tested)
    extent = (-0.5, len(columns) - 0.5, layers[0] - 0.5, layers[-1] + 0.5)
    draw_cells(ax, grid.to_numpy(float), clear, norm, origin="lower", extent=extent)
    ax.set_xticks(range(len(columns)), [str(column) for column in columns])


def _name_strongest(ax: Axes, cells: Table, tested: bool, largest: float) -> None:
    """Write the numbers of the strongest heads beside them."""
    some = cells[cells["beats"]] if tested else cells
    some = some[some["share"].abs() > 0.3 * largest]
    some = some.loc[some["share"].abs().sort_values(ascending=False).index[:_NAMED]]
    for _, cell in some.iterrows():
        dark = abs(cell["share"]) > 0.7 * largest
        ax.text(
            cell["head"],
            cell["layer"],
            f"{cell['layer']}.{cell['head']}",
            ha="center",
            va="center",
            fontsize=5,
            color=OPEN if dark else INK,
        )


def plot_audit(cells: Table, audit: Table, provenance: Mapping[str, Any]) -> Figure:
    """Each score against the exact share, a point for each cell; black: cells that beat their controls."""
    scores = list(dict.fromkeys(audit["score"]))
    families = audit.drop_duplicates(["direction", "site"])[["direction", "site"]].to_numpy().tolist()
    with styled():
        figure, axes = plt.subplots(
            len(families), len(scores), figsize=(max(4.0, 2.3 * len(scores)), 0.7 + 2.1 * len(families)), layout="constrained", squeeze=False
        )  # fmt: skip
        for row, (direction, site) in zip(axes, families, strict=True):
            some = cells[(cells["direction"] == direction) & (cells["site"] == site)]
            beats = some["beats"].to_numpy()
            for ax, score in zip(row, scores, strict=True):
                line = audit[(audit["direction"] == direction) & (audit["site"] == site) & (audit["score"] == score)]
                if line.empty:
                    ax.set_axis_off()
                    continue
                x, y = some["share"].to_numpy(), some[score].to_numpy()
                ax.plot(x[~beats], y[~beats], ".", color=REFERENCE, ms=2.5, rasterized=True)
                ax.plot(x[beats], y[beats], ".", color=INK, ms=3.5, rasterized=True)
                ends = np.array([np.nanmin(x), np.nanmax(x)])
                ax.plot(ends, ends, color=KEY, lw=0.8)
                ax.axhline(0, color=REFERENCE, lw=0.5)
                ax.axvline(0, color=REFERENCE, lw=0.5)
                ax.set_title(f"{score}: ρ = {line['spearman'].iloc[0]:.2f}", fontsize=8)
            row[0].set_ylabel(f"{site}, {direction}\nscore, as a share")
        for ax in axes[-1]:
            ax.set_xlabel("exact share")
        words = "Black: beats its control. Line: score = exact. ρ: rank."
        write_pairs_caption(figure, provenance, words)
    return figure

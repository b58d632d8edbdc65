"""Panels by depth: the lines of a table with their intervals, and the legend."""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from diagnostics.figures.axes import Depth, plain_ticks, points, write_caption
from diagnostics.figures.by_depth import DepthPanel, DepthPlan, Looks
from diagnostics.figures.looks import KEY, LABELS, OPEN, REFERENCE, UNTRAINED, legend_label, sae_kind, styled
from diagnostics.statistics.estimate import Estimate
from diagnostics.statistics.tables import TRAINED

RUN_LOOKS = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"), ((0, (5, 1, 1, 1, 1, 1)), "v"), ((0, (1, 3)), "P"))
"""Dashes and marker of the runs of one figure, the first one first."""
GREY_MARKERS = (".", "x", "+", "1", "2", "3")
LINE = ["series", "run", "role", "network"]
"""What the points of one line share, within a panel."""
ROW_LABELS = {**LABELS, "alone": "this token alone", "everywhere": "all tokens at once"}


def shape_of(table: pd.DataFrame) -> tuple[int, int]:
    """Rows and columns of panels: a row for each context (corpus, SAE); four panels of one row are drawn two by two."""
    rows, columns = table["row"].nunique(), table["panel"].nunique()
    return (2, 2) if (rows, columns) == (1, 4) else (rows, columns)


def width_of(table: pd.DataFrame) -> float:
    """Of its figure, in inches."""
    columns = shape_of(table)[1]
    return max(7.8, (3.4 if columns < 4 else 2.9) * columns)


def draw(plan: DepthPlan, table: pd.DataFrame, looks: Looks, names: Mapping[str, str], words: str) -> Figure:
    """The figure: every line with its intervals, the caption below. names: of the runs, in the order of their looks."""
    rows = list(dict.fromkeys(table["row"]))
    columns = [name for name in plan.panels if (table["panel"] == name).any()]
    shape, wide = shape_of(table), width_of(table)
    with styled():
        figure, grid = plt.subplots(*shape, figsize=(wide, 2.7 * shape[0] + 1.9), squeeze=False, layout="constrained")
        axes = grid.reshape(len(rows), len(columns))
        depth, drawing = _Axis(table), _Drawing(plan, table, looks, list(names))
        for line, row in zip(axes, rows, strict=True):
            for j, (ax, column) in enumerate(zip(line, columns, strict=True)):
                panel = plan.panels[column]
                drawing.panel(ax, table.loc[(table["row"] == row) & (table["panel"] == column)], panel, depth)
                named = row and (len(rows) > 1 or row in ROW_LABELS) and j == 0
                ax.set_title(f"{ROW_LABELS.get(row, row)}: {panel.title}" if named else panel.title, fontsize=9)
                ax.set_ylabel(panel.label)
        for j, column in enumerate(columns):
            _scale(list(axes.flat if plan.one_scale else axes[:, j]), plan.panels[column])
        for ax in grid[-1]:
            depth.label(ax, plan.done)
        for ax in grid[:-1].flat:
            depth.ticks(ax)
        handles = drawing.handles(names)
        figure.legend(handles=handles, loc="outside upper left", ncols=max(2, int(wide / 2.7)), handlelength=2.6)
        write_caption(figure, words)
    return figure


class _Axis:
    """Depth: blocks, or, where models of several depths are drawn, block l as its share l/(L − 1) of the way up."""

    def __init__(self, table: pd.DataFrame):
        self.relative = table["n_layers"].nunique() > 1
        self.depth = Depth(sorted(int(layer) for layer in set(table["layer"])))
        gaps = np.diff(sorted(set(self.at(table))))
        lines = table.loc[table["network"] == TRAINED, ["series", "run"]].drop_duplicates()
        self.step = 0.0 if not len(gaps) else min(0.03 * gaps.sum(), 0.7 * gaps.min() / len(lines))
        if not len(gaps):  # one depth: lines stand side by side
            self.step = 0.04

    def at(self, table: pd.DataFrame) -> np.ndarray:
        if self.relative:
            return table["depth"].to_numpy(float)
        return np.array([self.depth.place[layer] for layer in table["layer"]])

    def ticks(self, ax: Axes) -> None:
        if not self.relative:
            self.depth.label(ax)
            ax.set_xlabel("")
        if len(self.depth.layers) == 1 and not self.relative:
            place = self.depth.place[self.depth.layers[0]]
            ax.set_xlim(place - 0.5, place + 0.5)
        ax.tick_params(labelbottom=False)

    def label(self, ax: Axes, done: str) -> None:
        self.ticks(ax)
        ax.tick_params(labelbottom=True)
        scale = "" if self.relative or self.depth.to_scale else " (not to scale)"
        ax.set_xlabel(
            f"depth l / (L − 1), output of block l {done}" if self.relative else f"block, its output {done}{scale}"
        )


class _Drawing:
    """The looks of one figure's lines: colour by series, dash and marker by run where there are several."""

    def __init__(self, plan: DepthPlan, table: pd.DataFrame, looks: Looks, runs: list[str]):
        self.plan, self.table, self.looks, self.runs = plan, table, looks, runs
        grey = table.loc[table["network"] != TRAINED]
        crowded = len(grey) and grey.groupby(["row", "panel"])["series"].nunique().max() > 1
        self.greys = list(dict.fromkeys(grey["series"])) if crowded and plan.looks else []
        """series of randomly initialised models that need different markers"""

    def panel(self, ax: Axes, table: pd.DataFrame, panel: DepthPanel, depth: _Axis) -> None:
        for special in panel.lines:
            ax.axhline(special, color=REFERENCE, lw=0.8, zorder=0)
        if panel.log:
            ax.set_yscale("log")
        trained = table.loc[table["network"] == TRAINED]
        lines = list(dict.fromkeys(trained[["series", "run"]].itertuples(index=False, name=None)))
        for (series, run, role, _), own in trained.groupby(LINE, sort=False):
            colour, marker = self.looks[str(series)]
            dash, by_run = self._of_run(str(run))
            x = depth.at(own) + (lines.index((series, run)) - (len(lines) - 1) / 2) * depth.step
            if role == "main":
                _line(ax, own, x, panel, colour, by_run if len(self.runs) > 1 else marker, dash)
            else:
                _placebo(ax, own, x, colour)
        for (series, run, _, _), own in table.loc[table["network"] != TRAINED].groupby(LINE, sort=False):
            marker = GREY_MARKERS[self.greys.index(str(series)) % len(GREY_MARKERS) if self.greys else 0]
            marker = marker if self.plan.looks else self.looks[str(series)][1]
            _line(ax, own, depth.at(own), panel, UNTRAINED, marker, self._of_run(str(run))[0], thin=True)

    def _of_run(self, run: str) -> tuple[Any, str]:
        return RUN_LOOKS[self.runs.index(run) % len(RUN_LOOKS)]

    def said(self, series: str) -> str:
        """What a series is called."""
        return self.plan.labels.get(series, series) if self.plan.labels else sae_kind(series)

    def handles(self, names: Mapping[str, str]) -> list[Line2D]:
        """Of colours; then of runs, where there are several; then of what is open or grey."""
        found: dict[tuple[str, str], Line2D] = {}
        for series in dict.fromkeys(self.table.loc[self.table["network"] == TRAINED, "series"]):
            colour, marker = self.looks[series]
            marker, label = marker if len(names) == 1 else "", legend_label(self.said(series))
            found.setdefault(("series", label), Line2D([], [], color=colour, marker=marker, ms=4, lw=1.2, label=label))
        for run, name in names.items() if len(names) > 1 else ():
            dash, marker = self._of_run(run)
            found["run", run] = Line2D([], [], color=KEY, ls=dash, marker=marker, ms=4, lw=1, label=legend_label(name))
        if (self.table["role"] != "main").any():
            found["placebos", ""] = Line2D([], [], color=KEY, lw=6, alpha=0.25, label="placebos of the same colour")
        for series, marker in zip(self.greys, GREY_MARKERS * len(self.greys), strict=False):
            label = f"randomly initialised: {self.said(series)}"
            found["untrained", label] = Line2D([], [], color=UNTRAINED, marker=marker, ms=4, lw=0.9, label=label)
        if not self.greys and (self.table["network"] != TRAINED).any():
            label = "randomly initialised models"
            found["untrained", ""] = Line2D([], [], color=UNTRAINED, marker=".", ms=4, lw=0.9, label=label)
        return list(found.values())


def _line(
    ax: Axes, own: pd.DataFrame, x: np.ndarray, panel: DepthPanel, colour: str, marker: str, dash: Any, *, thin: bool = False
) -> None:  # fmt: skip
    order = np.argsort(x)
    own, x = own.iloc[order], x[order]
    drawn = own["state"].isin(("value", "lower bound")).to_numpy()
    found = [
        Estimate(r["value"], r["low"], r["high"], np.nan, r["n"], r["n_prompts"], r["state"] == "lower bound")
        for r in own.to_dict("records")
    ]
    label = _named(own)
    some = [e for e, keep in zip(found, drawn, strict=True) if keep]
    points(ax, x[drawn], some, colour, label, marker, dash=dash, log=panel.log, thin=thin)
    under = (own["state"] == "no effect").to_numpy()
    if under.any():  # at the bottom, whatever its scale
        ax.plot(
            x[under], np.full(int(under.sum()), 0.02), color=colour, marker=marker, mfc=OPEN, ms=3 if thin else 5, lw=0,
            transform=ax.get_xaxis_transform(), label=f"no effect|{label}",
        )  # fmt: skip


def _placebo(ax: Axes, own: pd.DataFrame, x: np.ndarray, colour: str) -> None:
    """A broad pale bar over each interval with a stroke at the value, behind the main lines."""
    shown = (own["state"] == "value").to_numpy()
    value, *ends = (own[column].to_numpy(float)[shown] for column in ("value", "low", "high"))
    ends = [np.where(np.isnan(end), value, end) for end in ends]
    ax.errorbar(
        x[shown], value, [value - ends[0], ends[1] - value], color=colour, marker="_", ms=6, lw=0, elinewidth=6, alpha=0.25,
        zorder=0.5, label=_named(own),
    )  # fmt: skip


def _named(own: pd.DataFrame) -> str:
    return "|".join(str(own[name].iloc[0]) for name in LINE)


def _scale(axes: list[Axes], panel: DepthPanel) -> None:
    """One scale for the panels of a column; room for the arrows of lower bounds."""
    low, high = min(ax.get_ylim()[0] for ax in axes), max(ax.get_ylim()[1] for ax in axes)
    if any(ax.texts for ax in axes):
        high *= 12
    if panel.limits:
        low, high = panel.limits if panel.whole else (max(low, panel.limits[0]), min(high, panel.limits[1]))
    for ax in axes:
        ax.set_ylim(low, high)
        if panel.log and high / low < 300:
            plain_ticks(ax.yaxis)

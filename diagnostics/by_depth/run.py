"""`depth_figures`: figures by depth from any results, with a line for each model, text and SAE."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from diagnostics.by_depth.panels import draw, width_of
from diagnostics.by_depth.runs import caption, identity, labels, said_of
from diagnostics.figures.axes import CAP
from diagnostics.figures.by_depth import DepthPlan, DepthPoint, Looks
from diagnostics.figures.files import save_figures
from diagnostics.figures.looks import looks
from diagnostics.results.result import BaseResult
from diagnostics.statistics.estimate import Estimate
from interventions.errors import ResultError
from interventions.files import claim_folder, write_csv

Runs = dict[str, Mapping[str, Any]]
_PLACE = ["setting", "row", "panel", "series", "role", "network", "point", "layer"]


@dataclass(frozen=True)
class DepthFigure:
    """One figure by depth, and the table that it draws."""

    name: str
    """name of its files"""
    plan: DepthPlan
    table: pd.DataFrame
    """a line a point: setting, row and panel, series, role, network, run and its label, layer, depth l/(L − 1), value, low, high, n, n_prompts, n_effective;
    state: `value`, `lower bound`, `no effect` (within 10 noise floors), `not identified`, `undefined`; the last two are not drawn"""
    runs: Runs
    """provenance of each run drawn"""
    looks: Looks
    """colour and marker of each series"""

    @property
    def caption(self) -> str:
        """The caption, from the provenance of all runs drawn."""
        return caption(self.plan, self.table, self.runs, width_of(self.table))

    def plot(self) -> Figure:
        """The matplotlib Figure."""
        return draw(self.plan, self.table, self.looks, labels(self.runs), self.caption)


@dataclass(frozen=True)
class DepthFigures:
    """All figures by depth that some results allow."""

    figures: dict[str, DepthFigure]
    """by name"""
    notes: list[str] = field(default_factory=list)
    """what was not drawn, or drawn separately, and why"""

    def plot(self) -> Iterator[Figure]:
        """The figures, one after another."""
        return (figure.plot() for figure in self.figures.values())

    def table(self) -> str:
        """The figures and notes as text, for a terminal."""
        lines = []
        for name, figure in self.figures.items():
            drawn = figure.table["state"].isin(("value", "lower bound", "no effect")).sum()
            runs = ", ".join(dict.fromkeys(figure.table["run"]))
            lines.append(f"{name}: {drawn} of {len(figure.table)} values, of {runs}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def as_dict(self) -> dict[str, Any]:
        """Captions and drawn values of every figure, and the notes, as JSON can hold them."""
        figures = {
            name: {"caption": " ".join(figure.caption.split()), "table": figure.table.to_dict("records")}
            for name, figure in self.figures.items()
        }
        return {"figures": figures, "notes": self.notes}

    def write(self, folder: str | Path, *, overwrite: bool = True) -> list[str]:
        """Each figure as PNG (200 dpi), SVG, PDF and the table that it draws as CSV; the names of the files.

        Text in a CSV that a spreadsheet would run as a formula begins with an apostrophe. Raises `ResultError` for a CSV that is there,
        unless `overwrite`.
        """
        claim_folder(folder, [f"{name}.csv" for name in self.figures], overwrite)
        folder = Path(folder)
        names = []
        for name, figure in self.figures.items():
            names += save_figures(folder, {name: figure.plot()})
            write_csv(folder / f"{name}.csv", figure.table)
            names.append(f"{name}.csv")
        return names


def depth_figures(results: Mapping[str, BaseResult], figures: Iterable[str] | None = None) -> DepthFigures:
    """All figures by depth that the results allow, each from all results that can be compared.

    results: by folder, as from `saved_results`. figures: names of `saved.PLANS`; default: all. Values and intervals are those of the
    results. Runs that differ in model, wrapper, text, seed or sink filter are lines of one panel, named in legend and caption; runs
    that differ only in depth are one line; those that differ in site, horizon, dose, sampling or edit get separate figures, with a
    note. Repeated results are left out with a note.

    Raises `ResultError` for a figure that is not known, and where nothing can be drawn.
    """
    from diagnostics.saved import PLANS

    asked = list(PLANS) if figures is None else list(figures)
    if unknown := [name for name in asked if name not in PLANS]:
        raise ResultError(f"no figure {unknown[0]!r}; known: {', '.join(PLANS)}")
    drawn: dict[str, DepthFigure] = {}
    notes: list[str] = []
    used: set[str] = set()
    for name in asked:
        plan, own = PLANS[name], {place: result for place, result in results.items() if name in result.DEPTH}
        table, runs = _table(name, plan, own, notes)
        used |= set(own)
        if len(table):
            missing = [panel.title for key, panel in plan.panels.items() if not (table["panel"] == key).any()]
            notes += [f"{name}: no values for the panel {title!r} in these results" for title in missing]
            drawn |= _by_setting(name, plan, table, runs, notes)
    for place, result in results.items():
        if place not in used:
            of = "" if len(asked) == len(PLANS) else f" of those asked for ({', '.join(asked)})"
            notes.append(f"{place}: a {type(result).__name__} has no figure by depth{of}")
    if not drawn:
        raise ResultError(f"nothing to draw by depth: {'; '.join(notes) or 'no results were given'}")
    return DepthFigures(drawn, list(dict.fromkeys(notes)))


def found_results(folders: Iterable[str | Path]) -> dict[str, BaseResult]:
    """All results in some folders and below them, by place; with the folder's path where places are not unique.

    Damaged results are left out with a warning each. Raises `ResultError` where no result is left.
    """
    from diagnostics.saved import sound_and_damaged

    folders = [Path(folder) for folder in folders]
    found: dict[str, BaseResult] = {}
    damaged: list[str] = []
    for folder in folders:
        sound, broken = sound_and_damaged(
            folder, lambda result: [result.depth_points(figure) for figure in result.DEPTH]
        )
        for place, result in sound.items():
            known = place if place not in found else f"{folder}/{place}"
            found[known] = result
        damaged += [f"{place} is left out: {why}" for place, why in broken.items()]
    if not found:
        raise ResultError("; ".join(damaged) or "no folder of results; give at least one")
    for said in damaged:
        warnings.warn(said, stacklevel=2)
    return found


def _table(
    name: str, plan: DepthPlan, results: Mapping[str, BaseResult], notes: list[str]
) -> tuple[pd.DataFrame, Runs]:
    """A line a point of every result; provenance of the runs by their places."""
    lines: list[dict[str, Any]] = []
    runs: Runs = {}
    for place, result in results.items():
        points = result.depth_points(name)
        if not points:
            notes.append(f"{place}: holds nothing of what the figure of {result.NAME} shows")
        for run in dict.fromkeys(point.run for point in points):
            where = f"{place}/{run}" if run else place
            p = result.provenance[run] if run else result.provenance
            own = _lines(plan, [point for point in points if point.run == run], p)
            if twin := next(
                (other for other in runs if _same(lines, other, own) and identity(runs[other]) == identity(p)), None
            ):
                notes.append(f"{where}: the same result as {twin}, drawn once")
                continue
            runs[where] = p
            lines += [line | {"run": where} for line in own]
    return pd.DataFrame(lines), runs


def _same(lines: list[dict[str, Any]], run: str, own: list[dict[str, Any]]) -> bool:
    drawn = [{k: v for k, v in line.items() if k != "run"} for line in lines if line["run"] == run]
    return pd.DataFrame(drawn).equals(pd.DataFrame(own))


def _lines(plan: DepthPlan, points: list[DepthPoint], p: Mapping[str, Any]) -> list[dict[str, Any]]:
    blocks = p["n_layers"]
    return [
        {
            "setting": said_of({"point": m.point, "horizon": p.get("horizon", 1), **m.settings}), "row": m.row, "panel": m.panel,
            "series": m.series, "role": m.role, "network": m.network, "point": m.point, "layer": m.layer, "n_layers": blocks,
            "depth": m.layer / max(blocks - 1, 1), "value": m.estimate.value, "low": m.estimate.low, "high": m.estimate.high,
            "state": _state(m, plan.panels[m.panel].lowest), "n": m.estimate.n_rows, "n_prompts": m.estimate.n_prompts,
            "n_effective": m.estimate.n_effective,
        }
        for m in points
    ]  # fmt: skip


def _state(point: DepthPoint, lowest: float) -> str:
    e = point.estimate
    if not isinstance(e, Estimate):
        return "value" if e.kind == "bounded" else "not identified"
    if np.isnan(e.value):
        return "undefined"
    if point.noise or e.value <= lowest:
        return "no effect"
    return "lower bound" if e.bound or e.value > CAP else "value"


def _by_setting(
    name: str, plan: DepthPlan, table: pd.DataFrame, runs: Runs, notes: list[str]
) -> dict[str, DepthFigure]:
    """A figure for each setting."""
    settings = list(dict.fromkeys(table["setting"]))
    if len(settings) > 1:
        notes.append(f"{name}: drawn separately, since settings differ: {'; '.join(settings)}")
    found = {}
    for setting in settings:
        own = table.loc[table["setting"] == setting].reset_index(drop=True)
        own, some = _joined(own, runs)
        if plan.looks is None:
            own["series"] = _short(own, "series")
        elif plan.rows_are_saes:
            own["row"] = _short(own, "row")
        style = looks(sorted(set(own["series"]))) if plan.looks is None else plan.looks
        own = own.assign(label=own["run"].map(labels(some)))
        file = "_".join([name, *filter(None, [_own_words(setting, settings)])])
        found[file] = DepthFigure(file, plan, own, some, style)
    return found


def _own_words(setting: str, settings: list[str]) -> str:
    """The parts of a setting that not all have, for a file's name."""
    common = set.intersection(*(set(other.split(", ")) for other in settings))
    own = ", ".join(part for part in setting.split(", ") if part not in common)
    return "-".join("".join(c if c.isalnum() else " " for c in own).split())


def _joined(table: pd.DataFrame, runs: Runs) -> tuple[pd.DataFrame, Runs]:
    """Merges runs that differ only in depths and SAEs, under the name of the first, unless two of their points coincide."""
    by: dict[str, list[str]] = {}
    for run in dict.fromkeys(table["run"]):
        by.setdefault(identity(runs[run]), []).append(run)
    first, whole = {}, {}
    for alike in by.values():
        apart = table.loc[table["run"].isin(alike)].duplicated(_PLACE).any()
        first |= {run: run if apart else alike[0] for run in alike}
        whole |= {run: runs[run] for run in alike} if apart else {alike[0]: _merged([runs[run] for run in alike])}
    return table.assign(run=table["run"].map(first)), whole


def _merged(every: list[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Merged provenance of one line's runs: all paths, and the largest difference."""
    deltas = [p[name] for p in every for name in ("replay_delta", "path_delta") if p.get(name)]
    paths = {f"{i} {site}": path for i, p in enumerate(every) for site, path in p["path"].items()}
    return {**every[0], "path": paths, "replay_delta": max(deltas, default=None)}


def _short(table: pd.DataFrame, column: str) -> pd.Series:
    """The last parts of SAEs' names, or whole names where two of one run and depth share the last part."""
    short = table[column].str.rsplit("/", n=1).str[-1]
    where = [name for name in (*_PLACE, "run") if name != column]
    pairs = table.assign(short=short).drop_duplicates([*where, column])
    meet = pairs.duplicated([*where, "short"], keep=False)
    ambiguous = set(pairs.loc[meet, "short"])
    return short.where(~short.isin(ambiguous), table[column].str.replace("/", " "))

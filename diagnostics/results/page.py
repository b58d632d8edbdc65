"""A result as a notebook shows it: model, text and settings, tables, caveats, figure."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Protocol

import pandas as pd
from matplotlib.figure import Figure

from diagnostics.figures.pictures import Picture, picture
from diagnostics.results.caveats import HasCaveats, caveats
from diagnostics.results.html_tables import folded_html
from diagnostics.results.templates import render
from diagnostics.results.words import HasProvenance, listed, measured_on, provenances
from interventions.errors import MechdiagError

_MOST_LINES = 400


class HasTables(HasCaveats, Protocol):
    """What a page shows; every result has it."""

    NAME: ClassVar[str]
    TITLE: ClassVar[str]
    NOTE: ClassVar[str]

    def tables(self) -> dict[str, pd.DataFrame]: ...

    def finding(self) -> str: ...

    def plot(self) -> Any: ...


def shown(result: HasTables) -> str:
    """A result as an HTML fragment with its style sheet. The figure is inlined and closed, so that a notebook shows it once."""
    known = caveats(result)  # first: it collects warnings of statistics that are computed once
    with quiet():
        tables = result.tables()
    names = listed(part for p in provenances(result).values() for part in measured_on(p)[:2])
    figures, no_figure = pictures(lambda: {names: result.plot()})
    return render(
        "results/result.html",
        title=titled(result),
        lead=result.finding(),
        runs=measured(result),
        tables=[
            (folded_html(frame.head(_MOST_LINES), title), min(len(frame), _MOST_LINES), len(frame))
            for title, frame in tables.items()
        ],
        note=result.NOTE,
        known=known,
        figures=figures,
        no_figure=no_figure,
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings of the statistics, which are among the caveats."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def measured(result: HasProvenance) -> list[tuple[str, str]]:
    """Each run's name with its model, text, place, seed and path."""
    runs = {name: measured_on(p) for name, p in provenances(result).items()}
    return [(name, " · ".join(parts)) for name, parts in runs.items() if parts]


def titled(result: HasTables) -> str:
    """The title of a result's class."""
    return result.TITLE or result.NAME


def pictures(draw: Callable[[], Mapping[str, Figure]]) -> tuple[dict[str, Picture], str]:
    """Figures by name as data, or none and the reason."""
    try:
        with quiet():
            figures = draw()
    except MechdiagError as error:
        return {}, str(error)
    return {name: picture(figure) for name, figure in figures.items()}, ""

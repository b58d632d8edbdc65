"""A result as a notebook shows it: what was measured on what, its tables, what a reader must know, its figure."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping

from matplotlib.figure import Figure

from diagnostics.caveats import caveats
from diagnostics.html_figures import Picture, picture
from diagnostics.html_tables import table_html
from diagnostics.questions import QUESTIONS
from diagnostics.results import Shown
from diagnostics.settings_words import listed, measured_on, provenances
from diagnostics.templates import render
from interventions.errors import MechdiagError

_MOST_LINES = 400


def shown(result: Shown) -> str:
    """A result as a fragment with its style sheet. The figure is drawn, closed, and part of it: it does not appear a second time."""
    known = caveats(result)  # before anything else forms the statistics, whose warnings it keeps
    with quiet():
        tables = result.tables()
    names = listed(part for p in provenances(result).values() for part in measured_on(p)[:2])
    figures, no_figure = pictures(lambda: {names: result.plot()})
    return render(
        "results/result.html",
        title=titled(result),
        runs=measured(result),
        tables=[
            (table_html(frame.head(_MOST_LINES), title), min(len(frame), _MOST_LINES), len(frame))
            for title, frame in tables.items()
        ],
        note=result.NOTE,
        known=known,
        figures=figures,
        no_figure=no_figure,
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What statistics warn of is among the caveats, once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def measured(result: Shown) -> list[tuple[str, str]]:
    """Each run's name with its model, text, place, seed and path."""
    runs = {name: measured_on(p) for name, p in provenances(result).items()}
    return [(name, " · ".join(parts)) for name, parts in runs.items() if parts]


def titled(result: Shown) -> str:
    """What its kind is called."""
    return QUESTIONS.get(result.NAME, (result.NAME, ""))[0]


def pictures(draw: Callable[[], Mapping[str, Figure]]) -> tuple[dict[str, Picture], str]:
    """Figures by name, and why there are none, where they cannot be drawn."""
    try:
        with quiet():
            figures = draw()
    except MechdiagError as error:
        return {}, str(error)
    return {name: picture(figure) for name, figure in figures.items()}, ""

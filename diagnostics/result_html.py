"""A result as a notebook shows it: what was measured on what, its tables, what a reader must know, its figure."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from html import escape

from diagnostics.card_style import STYLE
from diagnostics.caveats import caveats
from diagnostics.html_figures import picture
from diagnostics.html_tables import table_html
from diagnostics.results import BaseResult
from diagnostics.settings_words import listed, measured_on, provenances
from interventions.errors import MechdiagError

RESULT_STYLE = """
.mdc td,.mdc th{vertical-align:top}
.mdc th.words,.mdc td.words{text-align:left}
.mdc .ci{color:var(--soft);font-size:.92em}
.mdc caption{text-align:left;font-weight:600;padding:.6em 0 .2em}
.mdc .long{overflow:auto;max-height:27em}
.mdc .long thead th{position:sticky;top:0;background:var(--page)}
.mdc img{display:block;max-width:100%;height:auto;background:#fff;border-radius:4px;padding:6px;margin:.8em 0 .2em}
.mdc .note{white-space:normal}
.mdc ul.caveats{margin:.6em 0;padding:.5em .8em .5em 1.9em;border-left:3px solid var(--minus);background:var(--panel);font-size:.9em;
list-style:disc}
.mdc ul.caveats li{overflow-wrap:anywhere;margin:.15em 0}
"""
_MOST_LINES = 400


def shown(result: BaseResult) -> str:
    """A result as a fragment with its style sheet. The figure is drawn, closed, and part of it: it does not appear a second time."""
    title = titled(result)
    known = warned(result)  # before anything else forms the statistics, whose warnings it keeps
    return (
        f'<div class="mdc"><style>{STYLE}{RESULT_STYLE}</style><h3>{escape(title)}</h3>{measured(result)}'
        f"{_tables(result)}{note(result)}{known}{_figure(result, title)}</div>"
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What statistics warn of is among the caveats, once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def measured(result: BaseResult) -> str:
    """Model, text, place, seed and path of each run, a line each."""
    lines = {name: measured_on(p) for name, p in provenances(result).items()}
    return "".join(
        f"<p class=soft>{f'<b>{escape(name)}</b>: ' if name else ''}{escape(' · '.join(parts))}</p>"
        for name, parts in lines.items()
        if parts
    )


def note(result: BaseResult) -> str:
    """How the numbers are to be read."""
    return f'<p class="soft note">{escape(result.NOTE)}</p>' if result.NOTE else ""


def titled(result: BaseResult) -> str:
    """What its kind is called."""
    return result.TITLE or result.NAME


def to_know(lines: Sequence[str]) -> str:
    """Lines as a list that stands out; nothing where there are none."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul class=caveats>{items}</ul>" if items else ""


def warned(result: BaseResult) -> str:
    """What a reader must know, as a list."""
    return to_know(caveats(result))


def _tables(result: BaseResult) -> str:
    parts = []
    with quiet():
        tables = result.tables()
    for title, frame in tables.items():
        some = frame.head(_MOST_LINES)
        parts.append(f'<div class="scroll long">{table_html(some, title)}</div>')
        if len(some) < len(frame):
            parts.append(f"<p class=soft>The first {len(some)} of {len(frame):,} lines; all are in tables().</p>")
    return "".join(parts)


def _figure(result: BaseResult, title: str) -> str:
    try:
        with quiet():
            figure = result.plot()
    except MechdiagError as error:
        return f"<p class=soft>No figure: {escape(str(error))}</p>"
    names = listed(part for p in provenances(result).values() for part in measured_on(p)[:2])
    return picture(figure, f"{title}: {names}")

"""Tables of results as HTML: numbers on the right, intervals in a softer colour, the value a click sorts by in `data-v`."""

import re
from typing import Any

import pandas as pd
from markupsafe import Markup

from diagnostics.results.narrow import NUMBER, cell_text, fitting, is_words, keys, sort_value, without_constants
from diagnostics.results.templates import part

_WHOLE = re.compile(NUMBER.pattern + r"(?: ?%)?(?P<rest>.*)", re.IGNORECASE | re.DOTALL)


def table_html(frame: pd.DataFrame, caption: str = "", *, most: int | None = None, sortable: bool = False) -> Markup:
    """A frame as a table. most: rows after so many have the class `more`; sortable: column heads are buttons."""
    cells = [[cell_text(value) for value in line] for line in frame.itertuples(index=False, name=None)]
    values = [[sort_value(value) for value in line] for line in frame.itertuples(index=False, name=None)]
    columns = [(str(name), not is_words(frame.iloc[:, i])) for i, name in enumerate(frame.columns)]
    lines = [
        [(*_parts(text, value), value) for text, value in zip(line, numbers, strict=True)]
        for line, numbers in zip(cells, values, strict=True)
    ]
    return part("results/table.html", caption=caption, columns=columns, lines=lines, most=most, sortable=sortable)


_ROOM = 724
"""px of a table in a notebook's cell of 760"""


def folded_html(frame: pd.DataFrame, caption: str = "") -> Markup:
    """A frame as a table that fits 760 px; further columns in a second one, with its first columns of words, behind a fold."""
    if frame.empty:
        return table_html(frame, caption)
    said = ""
    shown, rest = fitting(frame, _ROOM, _px)
    if len(shown.columns) < len(frame.columns):
        said, frame = without_constants(frame)
        shown, rest = fitting(frame, _ROOM, _px)
    named = [str(name) for name in rest.columns[len(keys(frame)) :]]
    head = " ".join(filter(None, [caption, f"({said})" if said else ""]))
    return part(
        "results/folded.html",
        table=table_html(shown, head),
        rest=table_html(rest) if named else "",
        named=named,
        none=False,
    )


def _px(column: pd.Series, name: str) -> float:
    """About the width of a column, in px: heads break between words, cells do not."""
    cells = [_split(cell) for cell in column]
    widest = max((_PX * (len(number) + 0.92 * len(rest)) for number, rest in cells), default=0)
    return max(widest, _PX * max(map(len, name.split()), default=0)) + 2 * _PADDING


_PX, _PADDING = 7.2, 8
"""of a digit of 13.5 px, in a wide font; beside a cell"""


def _split(cell: Any) -> tuple[str, str]:
    return _parts(cell_text(cell), sort_value(cell))


def _parts(text: str, value: float | None) -> tuple[str, str]:
    """A number and what follows it (its interval), or words and nothing."""
    found = _WHOLE.match(text)
    rest = found["rest"] if value is not None and found and found["rest"].strip() else ""
    return text.removesuffix(rest), rest

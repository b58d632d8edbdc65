"""Tables of results as HTML: numbers on the right, intervals in a softer colour, what a click sorts by in `data-v`."""

import re
from html import escape
from typing import Any

import numpy as np
import pandas as pd

_NUMBER = re.compile(r"(?:≥ ?|< ?)?([-−+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:e[-+]?\d+)?)(?= ?%|\s|$)", re.IGNORECASE)
_WHOLE = re.compile(_NUMBER.pattern + r"(?: ?%)?(?P<rest>.*)", re.IGNORECASE | re.DOTALL)


def sort_value(cell: Any) -> float | None:
    """What a cell is sorted by: its number, of an estimate its value (`1.2 [1, 1.4]`, `≥ 3`, `42%`); None for words."""
    if isinstance(cell, (bool, np.bool_)) or cell is None:
        return None
    if isinstance(cell, (int, float, np.integer, np.floating)):
        return float(cell) if np.isfinite(cell) else None
    found = _NUMBER.match(str(cell).strip())
    return None if found is None else float(found[1].replace(",", "").replace("−", "-"))


def cell_text(cell: Any) -> str:
    """A cell as it is read: three digits, nothing for what is missing."""
    if cell is None or (isinstance(cell, (float, np.floating)) and np.isnan(cell)):
        return ""
    if isinstance(cell, (float, np.floating)):
        return f"{cell:.3g}"
    if isinstance(cell, (int, np.integer)) and not isinstance(cell, bool):
        return f"{cell:,}" if abs(cell) >= 10_000 else str(cell)
    return str(cell)


def table_html(frame: pd.DataFrame, caption: str = "", *, most: int | None = None, sortable: bool = False) -> str:
    """A table. most: lines beyond so many carry the class `more`; sortable: heads are buttons."""
    columns = list(frame)
    cells = [[cell_text(value) for value in line] for line in frame.itertuples(index=False, name=None)]
    values = [[sort_value(value) for value in line] for line in frame.itertuples(index=False, name=None)]
    numeric = [_is_numeric([line[i] for line in cells], [line[i] for line in values]) for i in range(len(columns))]
    head = "".join(_head(str(name), right, sortable) for name, right in zip(columns, numeric, strict=True))
    body = []
    for n, (line, value) in enumerate(zip(cells, values, strict=True)):
        row = "".join(_cell(text, number, right) for text, number, right in zip(line, value, numeric, strict=True))
        body.append(f"<tr{' class=more' if most is not None and n >= most else ''}>{row}</tr>")
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _is_numeric(texts: list[str], values: list[float | None]) -> bool:
    there = [value is not None for text, value in zip(texts, values, strict=True) if text]
    return bool(there) and 2 * sum(there) >= len(there)


def _head(name: str, right: bool, sortable: bool) -> str:
    inner = f"<button type=button>{escape(name)}</button>" if sortable else escape(name)
    state = " aria-sort=none" if sortable else ""
    return f"<th scope=col{'' if right else ' class=words'}{state}>{inner}</th>"


def _cell(text: str, value: float | None, right: bool) -> str:
    shown, found = escape(text), _WHOLE.match(text)
    if value is not None and found and found["rest"].strip():
        rest = found["rest"]
        shown = f"{escape(text[: len(text) - len(rest)])}<span class=ci>{escape(rest)}</span>"
    key = f' data-v="{value!r}"' if right and value is not None else ""
    return f"<td{'' if right else ' class=words'}{key}>{shown}</td>"

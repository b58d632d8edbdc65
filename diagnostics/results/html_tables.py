"""Tables of results as HTML: numbers on the right, intervals in a softer colour, the value a click sorts by in `data-v`."""

import re
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from diagnostics.results.templates import part

_NUMBER = re.compile(r"(?:≥ ?|< ?)?([-−+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:e[-+]?\d+)?)(?= ?%|\s|$)", re.IGNORECASE)
_WHOLE = re.compile(_NUMBER.pattern + r"(?: ?%)?(?P<rest>.*)", re.IGNORECASE | re.DOTALL)


def sort_value(cell: Any) -> float | None:
    """The number by which a cell is sorted, of an estimate its value (`1.2 [1, 1.4]`, `≥ 3`, `42%`); None for words."""
    if isinstance(cell, (bool, np.bool_)) or cell is None:
        return None
    if isinstance(cell, (int, float, np.integer, np.floating)):
        return float(cell) if np.isfinite(cell) else None
    found = _NUMBER.match(str(cell).strip())
    return None if found is None else float(found[1].replace(",", "").replace("−", "-"))


def cell_text(cell: Any) -> str:
    """A cell as text: three digits; empty where missing."""
    if cell is None or (isinstance(cell, (float, np.floating)) and np.isnan(cell)):
        return ""
    if isinstance(cell, (float, np.floating)):
        return f"{cell:.3g}"
    if isinstance(cell, (int, np.integer)) and not isinstance(cell, bool):
        return f"{cell:,}" if abs(cell) >= 10_000 else str(cell)
    return str(cell)


def table_html(frame: pd.DataFrame, caption: str = "", *, most: int | None = None, sortable: bool = False) -> Markup:
    """A frame as a table. most: rows after so many have the class `more`; sortable: column heads are buttons."""
    cells = [[cell_text(value) for value in line] for line in frame.itertuples(index=False, name=None)]
    values = [[sort_value(value) for value in line] for line in frame.itertuples(index=False, name=None)]
    columns = [
        (str(name), _is_numeric([line[i] for line in cells], [line[i] for line in values]))
        for i, name in enumerate(frame)
    ]
    lines = [
        [(*_parts(text, value), value) for text, value in zip(line, numbers, strict=True)]
        for line, numbers in zip(cells, values, strict=True)
    ]
    return part("results/table.html", caption=caption, columns=columns, lines=lines, most=most, sortable=sortable)


def _is_numeric(texts: list[str], values: list[float | None]) -> bool:
    there = [value is not None for text, value in zip(texts, values, strict=True) if text]
    return bool(there) and 2 * sum(there) >= len(there)


def _parts(text: str, value: float | None) -> tuple[str, str]:
    """A number and what follows it (its interval), or words and nothing."""
    found = _WHOLE.match(text)
    rest = found["rest"] if value is not None and found and found["rest"].strip() else ""
    return text.removesuffix(rest), rest

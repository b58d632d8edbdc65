"""Tables and lines that fit: 100 columns of a terminal, 760 px of a page. What does not fit is named."""

import re
import textwrap
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import pandas as pd

from diagnostics.results.words import COLUMNS, listed, wrapped
from diagnostics.statistics.estimate import MISSING

_MOST_TURNED = 3
"""a wide table of so few lines is shown turned: a line for each of its columns"""


NUMBER = re.compile(r"(?:≥ ?|< ?)?([-−+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:e[-+]?\d+)?)(?= ?%|\s|$)", re.IGNORECASE)
"""a number at the start of a cell: `1.2 [1, 1.4]`, `≥ 3`, `42%`"""


def sort_value(cell: Any) -> float | None:
    """The number by which a cell is sorted, of an estimate its value (`1.2 [1, 1.4]`, `≥ 3`, `42%`); None for words."""
    if isinstance(cell, (bool, np.bool_)) or cell is None:
        return None
    if isinstance(cell, (int, float, np.integer, np.floating)):
        return float(cell) if np.isfinite(cell) else None
    found = NUMBER.match(str(cell).strip())
    return None if found is None else float(found[1].replace(",", "").replace("−", "-"))


def cell_text(cell: Any) -> str:
    """A cell as text: three digits; a dash where missing."""
    if cell is None or (isinstance(cell, (float, np.floating)) and np.isnan(cell)):
        return MISSING
    if isinstance(cell, (float, np.floating)):
        return f"{cell:.3g}"
    if isinstance(cell, (int, np.integer)) and not isinstance(cell, bool):
        return f"{cell:,}" if abs(cell) >= 10_000 else str(cell)
    return str(cell) or MISSING


def text_table(frame: pd.DataFrame, columns: int = COLUMNS) -> str:
    """A table as text, heads of several words over several lines.

    Where it is wider than `columns`: words that are the same in every line stand above it; then a table of up to three lines is turned,
    and of a longer one the last columns are named below it.
    """
    if frame.empty:
        return "none"
    if _width(frame) <= columns:
        return _aligned(frame)
    said, frame = without_constants(frame)
    lines = [wrapped(f"({said})", columns)] if said else []
    turned = frame.T.reset_index().astype(object)
    if len(frame) <= _MOST_TURNED and _width(turned, headed=False) <= columns:
        return "\n".join([*lines, _aligned(turned, headed=False)])
    shown, rest = fitting(frame, columns, lambda column, name: _column_width(column, name) + 2)
    names = list(rest.columns[len(keys(frame)) :])
    further = (
        [wrapped(f"Not shown: {listed(names, len(names))}. See summary() or mechdiag report.", columns)]
        if names
        else []
    )
    return "\n".join([*lines, _aligned(shown), *further])


def without_constants(frame: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    """The columns of words that are the same in every line, in words, and the table without them."""
    if len(frame) < 2:
        return "", frame
    same = [name for name in frame if isinstance(frame[name].iloc[0], str) and frame[name].nunique(dropna=False) == 1]
    same = [name for name in same if is_words(frame[name])]
    if not same or len(same) == len(frame.columns):
        return "", frame
    said = listed((f"{name} {cell_text(frame[name].iloc[0])}" for name in same), len(same))
    return f"in every line: {said}", frame.drop(columns=same)


def keys(frame: pd.DataFrame) -> list[Any]:
    """The columns of words that a table begins with: what its lines are about."""
    found = []
    for name in frame:
        if not is_words(frame[name]):
            break
        found.append(name)
    return found or [frame.columns[0]]


def fitting(
    frame: pd.DataFrame, room: float, width: Callable[[pd.Series, str], float]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The first columns that fit, and the others with the `keys` before them (no others: only the keys)."""
    total, n = 0.0, 0
    for i, name in enumerate(frame.columns):
        total += width(frame.iloc[:, i], str(name))
        if total > room and n >= 1:
            break
        n = i + 1
    names, first = list(frame.columns), keys(frame)
    rest = [name for name in names[n:] if name not in first]
    return cast(pd.DataFrame, frame[names[:n]]), cast(pd.DataFrame, frame[[*first, *rest]])


def is_words(column: pd.Series) -> bool:
    """Whether most cells of a column that are not missing are words, not numbers."""
    texts = [cell_text(cell) for cell in column]
    there = [
        sort_value(cell) is not None for cell, text in zip(column, texts, strict=True) if text not in ("", MISSING)
    ]
    return not there or 2 * sum(there) < len(there)


def _len(text: str) -> int:
    return sum(not unicodedata.combining(c) for c in text)


def _column_width(column: pd.Series, name: str) -> int:
    return max([_len(cell_text(cell)) for cell in column] + [_len(word) for word in name.split()], default=0)


def _width(frame: pd.DataFrame, headed: bool = True) -> int:
    wide = [_column_width(frame.iloc[:, i], str(name) if headed else "") for i, name in enumerate(frame.columns)]
    return sum(wide) + 2 * (len(wide) - 1)


def _aligned(frame: pd.DataFrame, headed: bool = True) -> str:
    """Words on the left, numbers on the right, two spaces between columns."""
    columns: list[Sequence[str]] = []
    heads = []
    for i, name in enumerate(frame.columns):
        column = frame.iloc[:, i]
        width = _column_width(column, str(name) if headed else "")
        heads.append(textwrap.wrap(str(name), width, break_long_words=False, break_on_hyphens=False) if headed else [])
        columns.append([cell_text(cell) for cell in column])
    deep = max(map(len, heads))
    columns = [
        ["" for _ in range(deep - len(head))] + head + list(cells) for head, cells in zip(heads, columns, strict=True)
    ]
    padded = []
    for i, cells in enumerate(columns):
        width = max(map(_len, cells))
        left = is_words(frame.iloc[:, i]) or (not headed and i == 0)
        padded.append([c + " " * (width - _len(c)) if left else " " * (width - _len(c)) + c for c in cells])
    return "\n".join("  ".join(line).rstrip() for line in zip(*padded, strict=True))

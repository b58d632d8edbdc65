"""Lines of a tidy table, as tables; estimates as columns."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import pandas as pd

from diagnostics.statistics import CensoredMedian, Estimate, FiellerInterval

TRAINED = "trained"
"""In the column `model`: the model itself, beside `random 0` … for randomly initialised ones."""


def where(frame: pd.DataFrame, mask: Any) -> pd.DataFrame:
    """The lines at which a mask holds."""
    return cast(pd.DataFrame, frame.loc[mask])


def lines_of(frame: pd.DataFrame, **values: Any) -> pd.DataFrame:
    """The lines whose columns have these values: `lines_of(frame, sae="15/cosine", edit="keep")`."""
    return where(frame, np.logical_and.reduce([frame[name].to_numpy() == value for name, value in values.items()]))


def each(
    frame: pd.DataFrame, keys: Sequence[str], sort: bool = False
) -> Iterator[tuple[tuple[Any, ...], pd.DataFrame]]:
    """The values of some columns that occur together, and the lines that have them; in order of appearance, or ascending."""
    for key, some in frame.groupby(list(keys), sort=sort):
        yield cast(tuple[Any, ...], key), some


def totals(frame: pd.DataFrame, keys: Any, columns: Sequence[str]) -> pd.DataFrame:
    """Sums of columns, a line for each value of the keys, ascending."""
    return cast(pd.DataFrame, frame.groupby(keys, sort=True)[list(columns)].sum())


def with_ends(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line's estimates as columns: `x`, `x_low`, `x_high`.

    `x_bound` is True where x is only a lower bound; `x_kind`: of a `FiellerInterval`. Everything else stays as it is.
    """
    found: dict[str, Any] = {}
    for name, value in line.items():
        value = value.estimate if isinstance(value, CensoredMedian) else value
        if not isinstance(value, Estimate | FiellerInterval):
            found[name] = value
            continue
        found |= {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
        if isinstance(value, FiellerInterval):
            found[f"{name}_kind"] = value.kind
        elif value.bound:
            found[f"{name}_bound"] = True
    return found

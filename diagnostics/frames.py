"""Lines of a tidy table, as tables."""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import pandas as pd


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

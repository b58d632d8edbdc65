"""Rows of a tidy table selected, grouped and summed, and estimates from the sums."""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import pandas as pd
from numpy import ndarray

from diagnostics.statistics.estimate import CensoredMedian, Estimate, FiellerInterval
from diagnostics.statistics.jackknife import from_deletions
from diagnostics.statistics.measures import median, median_ratio


@contextlib.contextmanager
def few_prompts() -> Iterator[None]:
    """No warning of intervals from 10 to 19 effective prompts, in a block or decorated function: a summary shows their number."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="an interval from .* prompts")
        yield


TRAINED = "trained"
"""In the column `model`: the model itself, beside `random 0` … for randomly initialised ones."""


PLACEBOS = ("placebo_token", "placebo_isotropic")
"""Matched controls (placebos): edits of the same norm and angle to x as the edit beside them, in a random direction of two kinds: along
the difference of two other tokens' activations, and isotropic."""


def one_table(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Tables below one another, rows numbered from 0; without rows where none has any."""
    return pd.concat([f for f in parts if len(f)] or parts[:1] or [pd.DataFrame()], ignore_index=True)


def of_saes(parts: Sequence[pd.DataFrame], saes: Iterable[str]) -> pd.DataFrame:
    """`one_table`, names of SAEs (in this order) and points as categories."""
    frame = one_table(parts)
    frame["sae"] = pd.Categorical(frame.sae, categories=list(saes))
    frame["point"] = pd.Categorical(frame.point)
    return frame


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

    `x_bound` is True where x is only a lower bound; `x_kind`: of a `FiellerInterval`. A mean without an interval has
    `x_influence` in place of the ends. n_effective: the fewest effective prompts behind one of them. Everything else stays as it is.
    """
    found: dict[str, Any] = {}
    effective: list[float] = []
    for name, value in line.items():
        value = value.estimate if isinstance(value, CensoredMedian) else value
        if not isinstance(value, Estimate | FiellerInterval):
            found[name] = value
            continue
        effective.append(value.n_effective)
        if isinstance(value, Estimate) and np.isfinite(value.influence):
            found |= {name: value.value, f"{name}_influence": value.influence}
        else:
            found |= {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
        if isinstance(value, FiellerInterval):
            found[f"{name}_kind"] = value.kind
        elif value.bound:
            found[f"{name}_bound"] = True
    if effective and "n_effective" not in found:
        found["n_effective"] = min((n for n in effective if n > 0), default=np.nan)  # 0: no row
    return found


def from_sums(
    table: pd.DataFrame, columns: Sequence[str], statistic: Callable[..., ndarray], transform: Any = None
) -> Estimate:
    """A function of sums of columns over all lines, with its delete-one-prompt jackknife interval."""
    by_prompt = totals(table, "target_prompt", columns).to_numpy(float)
    sizes = table.groupby("target_prompt", sort=True).size().to_numpy()
    whole = by_prompt.sum(0)
    with np.errstate(all="ignore"):
        theta, left = float(statistic(*whole)), statistic(*(whole - by_prompt).T)
    return from_deletions(theta, np.asarray(left, dtype=float), sizes, transform=transform)


def mean_of(table: pd.DataFrame, column: str, transform: Any = None) -> Estimate:
    """The mean of a column without a long tail, with its delete-one-prompt jackknife interval."""
    return from_sums(table.assign(one=1.0), [column, "one"], lambda a, n: a / n, transform)


def median_of(table: pd.DataFrame, column: str) -> Estimate:
    """The median of a column, with its interval over prompts."""
    return median(table[column].to_numpy(float), table["target_prompt"].to_numpy(int))


def median_ratio_of(table: pd.DataFrame, top: str, bottom: str) -> Estimate:
    """The median over lines of the ratio of two columns ≥ 0, with its interval over prompts; lines with 0/0 are left out."""
    above, below = (table[name].to_numpy(float) for name in (top, bottom))
    return median_ratio(above, below, 0.0, table["target_prompt"].to_numpy(int))


def columns_of(estimates: Sequence[Estimate]) -> dict[str, list[float]]:
    """Values and ends of intervals, as a table's columns."""
    return {name: [getattr(e, name) for e in estimates] for name in ("value", "low", "high")}

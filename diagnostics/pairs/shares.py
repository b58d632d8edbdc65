"""Shares of the difference between two prompts, cell by cell: their intervals over pairs, their controls, false discoveries."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy import ndarray
from scipy import stats

from diagnostics.statistics.estimate import MIN_PROMPTS, Estimate, with_interval

FALSE_DISCOVERIES = 0.05
Table = Any
"""a DataFrame"""


def share_of_sums(effect: Float[ndarray, "pair"], total: Float[ndarray, "pair"]) -> Estimate:
    """Σ effect / Σ total over pairs, with the interval of the delete-one-pair jackknife; both in the metric's unit.

    t with `n_effective` − 1 degrees of freedom, n_effective = (Σ |effect|)²/Σ effect²: how many pairs of equal effect would carry as
    much. No interval below 10. Source: ours.
    """
    n = len(effect)
    effective, value, far, se = (float(x[0]) for x in _ratios(effect, total, np.zeros(n, dtype=int), 1))
    known = np.isfinite(far)
    return Estimate(
        *(value, value - far, value + far, se if known else np.nan, n, n),
        df=effective - 1 if known else np.nan, n_effective=effective,
    )  # fmt: skip


def _ratios(
    top: Float[ndarray, "line"], bottom: Float[ndarray, "line"], which: Int[ndarray, "line"], n_cells: int
) -> tuple[Float[ndarray, "cell"], ...]:
    """Effective pairs, Σ top / Σ bottom of each cell, half its jackknife interval, its standard error; a pair is one line of a cell."""
    n, sum_x, sum_y, size, square = (
        np.bincount(which, v, minlength=n_cells) for v in (np.ones(len(top)), top, bottom, np.abs(top), top * top)
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        value = sum_x / sum_y
        without = (sum_x[which] - top) / (sum_y[which] - bottom)
        mean = np.bincount(which, without, minlength=n_cells) / n
        se = np.sqrt((n - 1) / n * np.bincount(which, (without - mean[which]) ** 2, minlength=n_cells))
        effective = np.where(square > 0, size**2 / square, 0.0).round(9)
    far = np.where(effective >= MIN_PROMPTS, stats.t.ppf(0.975, np.maximum(effective - 1, 1)) * se, np.nan)
    return effective, value, far, se


def compared(
    patched: Table, controls: Table, cell: Sequence[str], family: Sequence[str], scores: Sequence[str] = ()
) -> pd.DataFrame:
    """A line for each cell, by `cell` as index, beside its controls.

        share = Σ effect / Σ total over pairs      effect, total = m_clean − m_corrupt: of each pair

    patched: a line for each pair × cell, whose `run` says whether anything differs there (else it counts as 0). controls: lines of the
    cells that were run, by number `control`. cell, family: columns that tell cells apart, and those of cells tested together (all in `cell`).
    `share_low`, `share_high`, `effective`: as in `share_of_sums`. n: pairs. effect: mean, in the metric's unit. dose: median. position:
    mean. control: the share of all controls together. difference: share less control, over the pairs that have one, with p of a t-test
    over pairs and q, the false discovery rate within the family (Benjamini and Hochberg); none below 10 pairs. beats: q ≤ 5 % and |share|
    above |control|. null: the largest |share| of a single control in the family. Scores: Σ score / Σ total.
    """
    cell, family = list(cell), list(family)
    own = _sums(patched, cell, list(scores))
    if len(controls):
        mean = controls.groupby([*cell, "pair"], observed=True, sort=True)[["effect", "total"]].mean()
        ran = patched[patched["run"]].set_index([*cell, "pair"])[["effect", "total"]]
        own = own.join(_differences(ran.join(mean.add_suffix("_control"), how="inner"), cell))
        each = controls.groupby([*cell, "control"], observed=True)[["effect", "total"]].sum()
        largest = (each["effect"] / each["total"]).abs().groupby(family).max().rename("null")
        own = own.join(largest, on=family)
    else:
        own = own.assign(
            control=np.nan, difference=np.nan, difference_low=np.nan, difference_high=np.nan, p=np.nan, null=np.nan
        )
    own["q"] = np.nan
    for _, some in own.groupby(family, sort=False):
        known = some["p"].dropna()
        if len(known):
            own.loc[known.index, "q"] = stats.false_discovery_control(known.to_numpy())
    own["beats"] = (own["q"] <= FALSE_DISCOVERIES) & (own["share"].abs() > own["control"].abs())
    return own


def tested(cells: Table) -> bool:
    """Whether any cell was compared with a control: there are controls, and 10 pairs or more."""
    return bool(cells["q"].notna().any())


def standing_out(cells: Table) -> Table:
    """The cells that beat their controls; all, where none was tested. Largest |share| first."""
    some = cells[cells["beats"]] if tested(cells) else cells
    return some.loc[some["share"].abs().sort_values(ascending=False, kind="stable").index]


def _sums(rows: Table, cell: list[str], scores: list[str]) -> pd.DataFrame:
    grouped = rows.groupby(cell, observed=True, sort=True)
    found = grouped.agg(
        n=("effect", "size"), effect=("effect", "mean"), dose=("dose", "median"), position=("position", "mean")
    )
    found["effective"], found["share"], far, _ = _of_groups(rows, "effect", grouped)
    found["share_low"], found["share_high"] = found["share"] - far, found["share"] + far
    sums = grouped[["total", *scores]].sum()
    for name in scores:
        found[name] = np.where(grouped[name].count() == found["n"], sums[name] / sums["total"], np.nan)
    return found


def _of_groups(rows: Table, top: str, grouped: Any) -> tuple[Float[ndarray, "cell"], ...]:
    x, y = rows[top].to_numpy(float), rows["total"].to_numpy(float)
    return _ratios(x, y, grouped.ngroup().to_numpy(), grouped.ngroups)


def _differences(paired: Table, cell: list[str]) -> pd.DataFrame:
    rows = paired.assign(gap=paired["effect"] - paired["effect_control"])
    grouped = rows.groupby(cell, observed=True, sort=True)
    found = grouped.agg(gap_mean=("gap", "mean"), gap_sd=("gap", "std"), pairs=("gap", "size"))
    sums = grouped[["effect_control", "total"]].sum()
    found["control"] = sums["effect_control"] / sums["total"]
    _, found["difference"], far, _ = _of_groups(rows, "gap", grouped)
    found["difference_low"], found["difference_high"] = found["difference"] - far, found["difference"] + far
    n = found["pairs"].to_numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        t = found["gap_mean"].to_numpy() / (found["gap_sd"].to_numpy() / np.sqrt(n))
    found["p"] = np.where(n >= MIN_PROMPTS, 2 * stats.t.sf(np.abs(t), np.maximum(n - 1, 1)), np.nan)
    return found.drop(columns=["gap_mean", "gap_sd", "pairs"])


def with_intervals(lines: pd.DataFrame) -> pd.DataFrame:
    """Columns share, share_low and share_high as one."""
    told = [with_interval(*ends) for ends in lines[["share", "share_low", "share_high"]].to_numpy(float)]
    return lines.assign(share=told).drop(columns=["share_low", "share_high"])

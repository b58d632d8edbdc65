"""Statistics of cells: shares of the whole difference, their intervals over pairs, their controls, and what cheap scores make of them."""

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray
from scipy import stats

from diagnostics.statistics.estimate import MIN_PROMPTS

Table = Any
"""a DataFrame"""
CELL = ("pool", "direction", "site", "layer", "head", "label")
FAMILY = ("pool", "direction", "site")
"""Cells that are tested together."""
FALSE_DISCOVERIES = 0.05
_SCORES = ("gradient", "ig5", "ig20", "dla")
_TOP = 0.01


def cells(frame: Table) -> pd.DataFrame:
    """A line for each cell that was run in any pair; in pairs where nothing differs there it counts as 0.

        share = Σ effect / Σ total over pairs      effect, total = m_clean − m_corrupt: of each pair

    `share_low`, `share_high`: 95 %, from the jackknife over pairs, t with `effective` − 1 degrees of freedom; nan below 10. effective:
    (Σ |effect|)²/Σ effect², how many pairs of equal effect would carry as much.
    effect: mean, in the metric's unit. dose: median ‖Δx‖/‖x‖. control: the share of all controls together. difference: share less
    control, over the pairs that have one, with p of a t-test over pairs and q, the false discovery rate within the family
    (direction × site; Benjamini and Hochberg). beats: q ≤ 5 % and |share| above |control|. null: the largest |share| of
    a single control among the family's cells. position: mean over pairs. Scores: Σ score / Σ total.
    """
    patched = frame[frame["control"] == 0]
    grouped = patched.groupby(list(CELL), observed=True, sort=True)
    own = _sums(patched[grouped["run"].transform("any")], [name for name in _SCORES if name in frame])
    controls = frame[frame["control"] > 0]
    if len(controls):
        mean = controls.groupby([*CELL, "pair"], observed=True, sort=True)[["effect", "total"]].mean()
        ran = patched[patched["run"]].set_index([*CELL, "pair"])[["effect", "total"]]
        own = own.join(_differences(ran.join(mean.add_suffix("_control"), how="inner")))
        each = controls.groupby([*CELL, "control"], observed=True)[["effect", "total"]].sum()
        largest = (each["effect"] / each["total"]).abs().groupby(list(FAMILY)).max().rename("null")
        own = own.join(largest, on=list(FAMILY))
    else:
        own = own.assign(
            control=np.nan, difference=np.nan, difference_low=np.nan, difference_high=np.nan, p=np.nan, null=np.nan
        )
    own["q"] = np.nan
    for _, family in own.groupby(list(FAMILY), sort=False):
        known = family["p"].dropna()
        if len(known):
            own.loc[known.index, "q"] = stats.false_discovery_control(known.to_numpy())
    own["beats"] = (own["q"] <= FALSE_DISCOVERIES) & (own["share"].abs() > own["control"].abs())
    return own.reset_index()


def _sums(rows: Table, scores: list[str]) -> pd.DataFrame:
    grouped = rows.groupby(list(CELL), observed=True, sort=True)
    found = grouped.agg(
        n=("effect", "size"), effect=("effect", "mean"), dose=("dose", "median"), position=("position", "mean")
    )
    found["effective"], found["share"], found["share_low"], found["share_high"] = _ratio(rows, "effect", grouped)
    sums = grouped[["total", *scores]].sum()
    for name in scores:
        found[name] = np.where(grouped[name].count() == found["n"], sums[name] / sums["total"], np.nan)
    return found


def _ratio(rows: Table, top: str, grouped: Any) -> tuple[Float[ndarray, "cell"], ...]:
    """Effective pairs, Σ top / Σ total of each cell, and its jackknife interval; every pair is one line of a cell."""
    n = grouped[top].size().to_numpy()
    which = grouped.ngroup().to_numpy()
    x, y = rows[top].to_numpy(float), rows["total"].to_numpy(float)
    sum_x, sum_y, size, square = (np.bincount(which, v, minlength=len(n)) for v in (x, y, np.abs(x), x * x))
    with np.errstate(divide="ignore", invalid="ignore"):
        value = sum_x / sum_y
        without = (sum_x[which] - x) / (sum_y[which] - y)
        mean = np.bincount(which, without, minlength=len(n)) / n
        se = np.sqrt((n - 1) / n * np.bincount(which, (without - mean[which]) ** 2, minlength=len(n)))
        effective = np.where(square > 0, size**2 / square, 0.0).round(9)
    far = np.where(effective >= MIN_PROMPTS, stats.t.ppf(0.975, np.maximum(effective - 1, 1)) * se, np.nan)
    return effective, value, value - far, value + far


def _differences(paired: Table) -> pd.DataFrame:
    rows = paired.assign(gap=paired["effect"] - paired["effect_control"])
    grouped = rows.groupby(list(CELL), observed=True, sort=True)
    found = grouped.agg(gap_mean=("gap", "mean"), gap_sd=("gap", "std"), pairs=("gap", "size"))
    sums = grouped[["effect_control", "total"]].sum()
    found["control"] = sums["effect_control"] / sums["total"]
    _, found["difference"], found["difference_low"], found["difference_high"] = _ratio(rows, "gap", grouped)
    n = found["pairs"].to_numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        t = found["gap_mean"].to_numpy() / (found["gap_sd"].to_numpy() / np.sqrt(n))
    found["p"] = np.where(n >= MIN_PROMPTS, 2 * stats.t.sf(np.abs(t), np.maximum(n - 1, 1)), np.nan)
    return found.drop(columns=["gap_mean", "gap_sd", "pairs"])


def audit(found: Table) -> pd.DataFrame:
    """What each cheap score makes of the cells: a line for each direction × site × score.

    spearman: rank correlation with the exact share over the cells that were run. missed: of the cells whose exact |share| is in the
    top 1 %, those whose |score| lies below the median. wrong_signs: of the cells that beat their controls (of the top 1 % where there
    are no controls), those whose score has the other sign. slope: of the score on the exact share, through the origin.
    """
    lines = []
    for key, family in found.groupby(list(FAMILY), sort=False):
        exact = family["share"].to_numpy()
        top = np.abs(exact) >= np.quantile(np.abs(exact), 1 - _TOP)
        counted = family["beats"].to_numpy() if family["q"].notna().any() else top
        for name in [name for name in _SCORES if name in family]:
            score = family[name].to_numpy()
            if not np.isfinite(score).all():
                continue
            low = np.abs(score) <= np.median(np.abs(score))
            constant = np.ptp(score) == 0 or np.ptp(exact) == 0
            lines.append({
                **dict(zip(FAMILY, key, strict=True)),
                "score": name,
                "cells": len(family),
                "spearman": np.nan if constant else _rank_correlation(score, exact),
                "spearman_size": np.nan if constant else _rank_correlation(np.abs(score), np.abs(exact)),
                "top": int(top.sum()),
                "missed": int((top & low).sum()),
                "counted": int(counted.sum()),
                "wrong_signs": int((counted & (np.sign(score) != np.sign(exact))).sum()),
                "slope": float((score * exact).sum() / (exact * exact).sum()) if (exact != 0).any() else np.nan,
            })  # fmt: skip
    return pd.DataFrame(lines)


def _rank_correlation(x: ndarray, y: ndarray) -> float:
    found: Any = stats.spearmanr(x, y)
    return float(found.statistic)


def strongest(found: Table, n: int = 10) -> pd.DataFrame:
    """The cells of each direction × site with the largest |share| among those that beat their controls (of all, without controls)."""
    some = found[found["beats"]] if found["q"].notna().any() else found
    order = some["share"].abs().sort_values(ascending=False, kind="stable").index
    return some.loc[order].groupby(list(FAMILY), sort=False).head(n)


def families(found: Table, frame: Table) -> list[dict[str, Any]]:
    """How many cells of each direction × site were run, how many beat their controls, and the null of the largest control."""
    lines: list[dict[str, Any]] = []
    filled = frame[~frame["run"]].groupby(list(FAMILY)).size()
    for key, family in found.groupby(list(FAMILY), sort=False):
        top = family.loc[family["share"].abs().idxmax()]
        lines.append({
            **dict(zip(FAMILY, key, strict=True)),
            "pairs": int(family["n"].max()),
            "cells": len(family),
            "zero_in_pairs": int(filled.get(key, 0)),
            "beat_control": int(family["beats"].sum()),
            "null": float(family["null"].iloc[0]),
            "largest": float(top["share"]),
            "largest_low": float(top["share_low"]),
            "largest_high": float(top["share_high"]),
            "largest_at": cell_name(top),
        })  # fmt: skip
    return lines


def cell_name(cell: Any) -> str:
    """`20.0 at END` for head 0 of block 20, `mlp_out 17 at S2` for a block's site."""
    head = int(cell["head"])
    where = f"{int(cell['layer'])}.{head}" if head >= 0 else f"{int(cell['layer'])}"
    return f"{cell['site']} {where} at {cell['label']}"

"""Statistics of cells: shares of the whole difference, their intervals over pairs, their controls, and what cheap scores make of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy import ndarray
from scipy import stats

from diagnostics.pairs.shares import compared, standing_out, tested
from diagnostics.statistics.estimate import with_interval

Table = Any
"""a DataFrame"""
CELL = ("pool", "direction", "site", "layer", "head", "label")
FAMILY = ("pool", "direction", "site")
"""Cells that are tested together."""
_SCORES = ("gradient", "ig5", "ig20", "dla")
_TOP = 0.01


def cells(frame: Table) -> pd.DataFrame:
    """A line for each cell that was run in any pair; in pairs where nothing differs there it counts as 0.

    Columns as in `compared`; dose: ‖Δx‖/‖x‖; family: direction × site.
    """
    patched = frame[frame["control"] == 0]
    ran = patched.groupby(list(CELL), observed=True)["run"].transform("any")
    scores = [name for name in _SCORES if name in frame]
    return compared(patched[ran], frame[frame["control"] > 0], CELL, FAMILY, scores).reset_index()


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
        counted = family["beats"].to_numpy() if tested(family) else top
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
    return standing_out(found).groupby(list(FAMILY), sort=False).head(n)


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


def shown(families: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """A line for each direction × site: the largest share beside the largest of a control."""
    lines = [
        {
            "direction": g["direction"], "site": g["site"], "pairs": g["pairs"],
            "largest share": with_interval(g["largest"], g["largest_low"], g["largest_high"]), "largest of a control": g["null"],
            "at": g["largest_at"], "beat their control": f"{g['beat_control']} of {g['cells']} cells", "zero in pairs": g["zero_in_pairs"],
            "pool": g["pool"],
        }
        for g in families
    ]  # fmt: skip
    return pd.DataFrame(lines)


def cell_name(cell: Any) -> str:
    """`20.0 at END` for head 0 of block 20, `mlp_out 17 at S2` for a block's site."""
    head = int(cell["head"])
    where = f"{int(cell['layer'])}.{head}" if head >= 0 else f"{int(cell['layer'])}"
    return f"{cell['site']} {where} at {cell['label']}"

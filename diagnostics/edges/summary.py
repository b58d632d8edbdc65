"""Edges over pairs: a share each, with its interval, the pair as the cluster."""

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray
from scipy import stats

from diagnostics.statistics.estimate import MIN_PROMPTS, Estimate
from diagnostics.statistics.jackknife import from_deletions
from diagnostics.statistics.tables import few_prompts

EDGE = (
    "direction", "sender", "sender_layer", "sender_head", "receiver", "receiver_layer", "receiver_head", "through", "label",
)  # fmt: skip
"""What tells edges apart. Edges of single positions are pooled within a pool of pairs only."""
FALSE_DISCOVERIES = 0.05
Table = Any
"""a DataFrame"""


@few_prompts()
def share_of_sums(effect: Float[ndarray, "pair"], total: Float[ndarray, "pair"]) -> Estimate:
    """Σ effect / Σ total over pairs, with the interval of the delete-one-pair jackknife; both in the metric's unit.

    No interval below 10 pairs. Source: ours.
    """
    top, bottom = effect.sum(), total.sum()
    with np.errstate(all="ignore"):
        theta, left = float(np.divide(top, bottom)), (top - effect) / (bottom - total)
    return from_deletions(theta, left, np.ones(len(effect)))


def edge_shares(frame: Table) -> pd.DataFrame:
    """A line for each edge, strongest first within a direction.

        share = Σ effect / Σ total over pairs        effect, total = m_clean − m_corrupt: of each pair

    `share_low`, `share_high`: 95 %, from the jackknife over pairs, t with n − 1 degrees of freedom (as `share_of_sums`, all edges at
    once); nan below 10 pairs. q: false discovery rate of share ≠ 0 among the edges of the direction that were run (Benjamini and Hochberg).
    effect: mean. pairs: how many; run: in how many of them the sender's write differs.
    """
    pooled = frame.assign(pool=np.where(frame["position"].to_numpy() < 0, -1, frame["pool"]))
    grouped = pooled.groupby([*EDGE, "pool"], sort=False)
    found = grouped.agg(pairs=("effect", "size"), run=("run", "sum"), effect=("effect", "mean"))
    which, n = grouped.ngroup().to_numpy(), found["pairs"].to_numpy()
    x, y = (frame[name].to_numpy(float) for name in ("effect", "total"))

    def summed(values: ndarray) -> ndarray:
        return np.bincount(which, values, minlength=len(n))

    with np.errstate(divide="ignore", invalid="ignore"):
        share = summed(x) / summed(y)
        without = (summed(x)[which] - x) / (summed(y)[which] - y)
        se = np.sqrt((n - 1) / n * summed((without - (summed(without) / n)[which]) ** 2))
        enough, freedom = n >= MIN_PROMPTS, np.maximum(n - 1, 1)
        far = np.where(enough, stats.t.ppf(0.975, freedom) * se, np.nan)
        p = np.where(enough & (se > 0), 2 * stats.t.sf(np.abs(share) / se, freedom), np.nan)
    found = found.assign(share=share, share_low=share - far, share_high=share + far, q=np.nan).reset_index()
    for direction in dict.fromkeys(frame["direction"]):
        tested = np.flatnonzero((found["direction"] == direction).to_numpy() & np.isfinite(p))
        if len(tested):
            found.loc[tested, "q"] = stats.false_discovery_control(p[tested])
    turn = {direction: i for i, direction in enumerate(dict.fromkeys(frame["direction"]))}
    order = np.lexsort((-np.abs(found["share"].to_numpy()), found["direction"].map(turn).to_numpy()))
    return found.iloc[order].reset_index(drop=True)

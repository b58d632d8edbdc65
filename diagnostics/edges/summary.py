"""Edges over pairs: a share each, with its interval, the pair as the cluster."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.statistics.estimate import Estimate
from diagnostics.statistics.jackknife import from_deletions
from diagnostics.statistics.tables import few_prompts

EDGE = (
    "direction", "sender", "sender_layer", "sender_head", "receiver", "receiver_layer", "receiver_head", "through", "label",
)  # fmt: skip
"""What tells edges apart. Edges of single positions are pooled within a pool of pairs only."""


@few_prompts()
def share_of_sums(effect: np.ndarray, total: np.ndarray) -> Estimate:
    """Σ effect / Σ total over pairs [pair], with the interval of the delete-one-pair jackknife; logits ÷ logits.

    No interval below 10 pairs. Source: ours.
    """
    top, bottom = effect.sum(), total.sum()
    with np.errstate(all="ignore"):
        theta, left = float(np.divide(top, bottom)), (top - effect) / (bottom - total)
    return from_deletions(theta, left, np.ones(len(effect)))


def edge_shares(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Each edge's share, strongest first within a direction."""
    pooled = frame.assign(pool=np.where(frame["position"].to_numpy() < 0, -1, frame["pool"]))
    found = []
    for key, some in pooled.groupby([*EDGE, "pool"], sort=False):
        effect, total = (some[name].to_numpy(float) for name in ("effect", "total"))
        line = dict(zip((*EDGE, "pool"), _plain(key), strict=True))
        found.append(
            line
            | {
                "pairs": len(some),
                "run": int(some["run"].sum()),
                "share": share_of_sums(effect, total),
                "effect": float(effect.mean()),
            }
        )
    order = {direction: i for i, direction in enumerate(dict.fromkeys(frame["direction"]))}
    return sorted(found, key=lambda line: (order[line["direction"]], -abs(line["share"].value)))


def _plain(key: Sequence[Any]) -> list[Any]:
    return [x.item() if hasattr(x, "item") else x for x in key]

"""Edges over pairs: a share each, with its interval, the pair as the cluster."""

from typing import Any

import numpy as np
import pandas as pd

from diagnostics.pairs.shares import compared

EDGE = (
    "direction", "sender", "sender_layer", "sender_head", "receiver", "receiver_layer", "receiver_head", "through", "label",
)  # fmt: skip
"""What tells edges apart. Edges of single positions are pooled within a pool of pairs only."""
Table = Any
"""a DataFrame"""


def edge_shares(frame: Table) -> pd.DataFrame:
    """A line for each edge, strongest first within a direction.

        share = Σ effect / Σ total over pairs        effect, total = m_clean − m_corrupt: of each pair

    Interval, control, difference, q, `beats` and `null` as in `compared`, the edges of a direction tested together. effect: mean. dose:
    median. pairs: how many; run: in how many of them the sender's write differs.
    """
    pool = np.where(frame["position"].to_numpy() < 0, -1, frame["pool"])
    lines = frame.assign(pool=pool, edge=frame.assign(pool=pool).groupby([*EDGE, "pool"], sort=False).ngroup())
    own = lines[lines["control"] == 0]
    shares = compared(own, lines[lines["control"] > 0], ("direction", "edge"), ("direction",)).reset_index()
    named = own.groupby("edge", sort=True).agg(
        **{name: (name, "first") for name in (*EDGE, "pool")}, run=("run", "sum")
    )
    found: Any = named.join(shares.set_index("edge").drop(columns=["direction", "position"])).rename(
        columns={"n": "pairs"}
    )
    turn = {direction: i for i, direction in enumerate(dict.fromkeys(frame["direction"]))}
    order = np.lexsort((-np.abs(found["share"].to_numpy()), found["direction"].map(turn).to_numpy()))
    return found.iloc[order].reset_index(drop=True)

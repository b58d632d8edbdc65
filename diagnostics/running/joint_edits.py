"""Rows of one prompt that each put the vectors of some of several sites, at the same tokens: circuits, complements, coalitions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from diagnostics.running.notes import noted
from interventions.effects import measure_joint
from interventions.metrics import TokenMetric
from interventions.recording import Recording
from interventions.replaying.joint import Put
from interventions.sites import Site

_HELD = 2**25
"""numbers in the vectors of one call"""


def measure_members(
    base: Recording,
    prompt: int,
    sites: Sequence[Site],
    vectors: Sequence[Float[Tensor, "token width"]],
    position: Int[ndarray, "token"],
    member: Bool[ndarray, "row site"],
    metric: TokenMetric,
    empty: float,
    notes: dict[str, Any],
    **how: Any,
) -> Float[ndarray, "row"]:
    """The metric of each row: `vectors[i]` put at `sites[i]` of the prompt's tokens `position` where `member[row, i]`.

    metric: of one prompt, the same for all rows. empty: the metric of rows without a member, which are not run. how: `path`,
    `batch_rows` and `progress` of `measure_joint`. notes: as `noted` keeps them.
    """
    found = np.full(len(member), empty)
    rows = np.flatnonzero(member.any(axis=1))
    each = max(1, _HELD // max(1, sum(x.numel() for x in vectors)))
    where = torch.from_numpy(position)
    for start in range(0, len(rows), each):
        some = rows[start : start + each]
        puts = []
        for site, values, here in zip(sites, vectors, member[some].T, strict=True):
            row = torch.from_numpy(np.flatnonzero(here))
            if len(row):
                put = row.repeat_interleave(len(where)), where.repeat(len(row)), values.repeat(len(row), 1)
                puts.append(Put(site, *put))
        effects = measure_joint(base, torch.full((len(some),), prompt), puts, metrics=metric, nonfinite="count", **how)
        noted(notes, effects)
        found[some] = effects[metric.name].double().numpy()
    return found

"""What a model says to pairs: the logit difference of the two answers after each prompt."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray

from diagnostics.pairs.pair import Pair
from interventions.errors import TextError
from interventions.metrics import LogitDifference
from interventions.models.causal_model import CausalModel
from interventions.recording import record
from interventions.replaying.replay import unembed

FLOOR = 0.5
"""Smallest |m_clean − m_corrupt| of a pair that is kept, logits: shares of a smaller difference are mostly rounding and noise."""
_BATCH = 128  # pairs in one pass: logits of 256 prompts


def check_floor(floor: float) -> None:
    """Raise `TextError` for a floor below 0, or one that is not finite."""
    if not 0 <= floor < float("inf"):
        raise TextError(f"floor {floor}; expected a number of logits, 0 or more, such as {FLOOR}")


class Differences(NamedTuple):
    """m = logit(right) − logit(wrong) at the last position, logits, float64."""

    clean: Float[ndarray, "pair"]
    corrupt: Float[ndarray, "pair"]


@torch.no_grad()
def differences(model: CausalModel, pairs: Sequence[Pair]) -> Differences:
    """m of each pair's clean and corrupt prompt, by plain forward passes in batches. Raises as `record` does."""
    parts = [np.empty((2, 0))]
    for start in range(0, len(pairs), _BATCH):
        some = pairs[start : start + _BATCH]
        recording = record(model, [list(p.clean) for p in some] + [list(p.corrupt) for p in some], keep_cache=False)
        rows = torch.arange(len(recording.length))
        last = recording.final_hidden[rows.to(model.device), (recording.length - 1).to(model.device)]
        right, wrong = (torch.tensor([getattr(p, name) for p in some] * 2)[:, None] for name in ("right", "wrong"))
        m = LogitDifference(right, wrong)(unembed(recording, last), rows)
        parts.append(m.double().cpu().numpy().reshape(2, -1))
    return Differences(*np.concatenate(parts, axis=1))

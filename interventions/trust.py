"""Replay is believed where it was seen to be exact: rows of this very run against full forward passes."""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from interventions.errors import MechdiagError
from interventions.hooks import full_forwards
from interventions.recording import Recording
from interventions.replay import ATTENTIONS, final_hidden, unembed, unsupported
from interventions.sites import Site

_TRIAL_SLOTS = 4


class _Trial(NamedTuple):
    prompt: np.ndarray
    position: np.ndarray
    vectors: Tensor


def logit_tolerance(dtype: torch.dtype, largest_logit: float) -> float:
    """Largest logit difference between two ways of computing the same row that rounding explains (checked by experiment)."""
    per_unit = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    return per_unit * max(1.0, largest_logit)


def why_not_replay(
    recording: Recording,
    site: Site,
    prompt: np.ndarray,
    position: np.ndarray,
    edited: Callable[[np.ndarray], Tensor],
) -> str | None:
    """Why replay does not serve these rows, or None where it is exact.

    prompt, position: `[row]`. edited: gives the vectors of the rows asked for. Compares logits with full forward passes
    at the longest positions (a sliding window bites only there), unless the model was checked that far already; the
    model remembers the first way to attend that is exact, or why none is.
    """
    model, first = recording.model, site.first_block
    if reason := model.replay_refused or unsupported(recording):
        return reason
    longest = int(position.max())
    if longest <= max((reach for block, reach in model.replay_reach.items() if block <= first), default=-1):
        return None
    trial = _trial(prompt, position, edited)
    slow = full_forwards(recording, site, *trial).float()
    if not bool(slow.isfinite().all()):
        return "no row to check it with: the model's own logits are not finite"  # this call; the next one asks again
    allowed = logit_tolerance(model.dtype, float((slow - slow.mean(-1, keepdim=True)).abs().max()))
    attention, reason = model.replay_attention, None
    for way in ATTENTIONS[ATTENTIONS.index(attention or "") :]:
        reason = _trial_fails(recording, first, trial, way, slow, allowed)
        if reason is None:
            model.replay_attention, model.replay_reach[first] = way, longest
            return None
    model.replay_refused, model.replay_attention = f"{reason} (longest position {longest})", None
    warnings.warn(
        f"replay does not serve this model: {model.replay_refused}; full forward passes are used instead", stacklevel=3
    )
    return model.replay_refused


def _trial_fails(
    recording: Recording, first: int, trial: _Trial, attention: str, slow: Tensor, allowed: float
) -> str | None:
    try:
        hidden = final_hidden(recording, first, *trial, attention=attention, group_size=_TRIAL_SLOTS)
        fast = unembed(recording, hidden).float()
    except (TypeError, ValueError, IndexError, RuntimeError, AttributeError) as error:
        if isinstance(error, MechdiagError) or is_out_of_memory(error):
            raise
        return f"its forward pass does not take rows: {type(error).__name__}: {str(error).splitlines()[0]}"
    delta = float((fast - slow).abs().max())
    if not delta <= allowed:
        return f"logits differ by {delta:.1e} from full forward passes, allowed {allowed:.1e}"
    recording.model.replay_delta = max(recording.model.replay_delta, delta)
    return None


def _trial(prompt: np.ndarray, position: np.ndarray, edited: Callable[[np.ndarray], Tensor]) -> _Trial:
    """The run's two longest rows, each at four positions of its prompt side by side, with noise that tells them apart.

    A model that ignores the mask is right on a row that stands alone at the last position, or beside its like: it must
    be asked about different rows at several positions in one group.
    """
    longest = np.argsort(-position, kind="stable")[:64]
    finite = edited(longest).isfinite().all(dim=-1).cpu().numpy()
    longest = longest[np.argsort(~finite, kind="stable")][:2]
    longest = longest[np.argsort(prompt[longest], kind="stable")]
    p = position[longest]
    positions = np.stack([p // 8, p // 2, np.maximum(p - 1, 0), p], axis=1).reshape(-1)
    vectors = edited(longest).repeat_interleave(_TRIAL_SLOTS, dim=0)
    noise = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(0)).to(vectors)
    scale = vectors.float().pow(2).mean(dim=-1, keepdim=True).sqrt().to(vectors)
    return _Trial(np.repeat(prompt[longest], _TRIAL_SLOTS), positions, vectors + 0.3 * scale * noise)


def is_out_of_memory(error: BaseException) -> bool:
    words = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error).lower() for word in words)

"""Replay is believed where it was seen to be exact: rows of this very run against full forward passes."""

import warnings

import numpy as np
import torch
from torch import Tensor

from interventions.errors import MechdiagError, is_out_of_memory, one_line
from interventions.hooks import full_forwards
from interventions.replay import ATTENTIONS, Branches, replayed, unembed, unsupported
from interventions.rows import Rows

_TRIAL_SLOTS = 4
_TRIAL_READS = 32  # tokens compared at either end of a branch: logits of more would fill the memory


def logit_tolerance(dtype: torch.dtype, largest_logit: float) -> float:
    """Largest logit difference between two ways of computing the same row that rounding explains (checked by experiment)."""
    per_unit = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    return per_unit * max(1.0, largest_logit)


def why_not_replay(rows: Rows) -> str | None:
    """Why replay does not serve these rows, or None where it is exact; then `rows.attention` is how they are to attend.

    Compares logits with full forward passes at the longest positions (a sliding window bites only there) and in branches
    as long as the rows', unless the model was checked that far already, at this block or one below. A failure speaks for
    its own block alone: the rows of a sweep go the same way wherever it was begun.
    """
    recording, site = rows.recording, rows.site
    model, first = recording.model, site.first_block
    if reason := unsupported(recording):
        return reason
    longest, kind = int(rows.furthest.max()), (site.point, 2 ** int(np.ceil(np.log2(rows.width))))
    known = model.replay_reach.setdefault(kind, {})
    if (*kind, first) in model.replay_otherwise:
        checked, way, reason = model.replay_otherwise[(*kind, first)]
        if way is None and longest >= checked:
            return reason
        if way is not None and longest <= checked:
            rows.attention = way
            return None
    elif longest <= max((reach for block, reach in known.items() if block <= first), default=-1):
        rows.attention = model.replay_attention
        return None
    trial = _trial(rows)
    if trial is None:
        return "no row to check it with: the edited vectors are not finite"
    branches, vectors = trial
    to_end = branches.length[branches.row] - branches.place
    read = np.flatnonzero((branches.place < _TRIAL_READS) | (to_end <= _TRIAL_READS))
    slow = full_forwards(recording, site, branches, vectors, read).logits.float()
    if not bool(slow.isfinite().all()):
        return "no row to check it with: the model's own logits are not finite"  # this call; the next one asks again
    allowed = logit_tolerance(model.dtype, float((slow - slow.mean(-1, keepdim=True)).abs().max()))
    reasons = []
    for way in ATTENTIONS[ATTENTIONS.index(model.replay_attention) :]:
        failure = _trial_fails(rows, branches, vectors, read, way, slow, allowed)
        if failure is None:
            rows.attention = way
            if reasons:
                model.replay_otherwise[(*kind, first)] = longest, way, reasons[0]
            else:
                known[first] = longest
            return None
        reasons.append(failure)
    reason = f"{reasons[-1]} (longest position {longest})"
    if not any(way is None for _, way, _ in model.replay_otherwise.values()):
        warnings.warn(f"replay does not serve this model: {reason}; full forward passes are used instead", stacklevel=5)
    model.replay_otherwise[(*kind, first)] = longest, None, reason
    return reason


def _trial_fails(
    rows: Rows, branches: Branches, vectors: Tensor, read: np.ndarray, attention: str, slow: Tensor, allowed: float
) -> str | None:
    recording = rows.recording
    try:
        hidden = replayed(recording, rows.site, branches, vectors, attention, group_size=_TRIAL_SLOTS).hidden
        fast = unembed(recording, hidden[torch.from_numpy(read).to(hidden.device)]).float()
    except (TypeError, ValueError, IndexError, RuntimeError, AttributeError) as error:
        if isinstance(error, MechdiagError) or is_out_of_memory(error):
            raise
        return f"its forward pass does not take rows: {one_line(error)}"
    delta = float((fast - slow).abs().max())
    if not delta <= allowed:
        return f"logits differ by {delta:.1e} from full forward passes, allowed {allowed:.1e}"
    recording.model.replay_delta = max(recording.model.replay_delta, delta)
    return None


def _trial(rows: Rows) -> tuple[Branches, Tensor] | None:
    """The run's two longest rows, each from four positions of its prompt side by side, with noise that tells them apart.

    A model that ignores the mask is right on a row that stands alone at the last position, or beside its like: it must
    be asked about different rows at several positions in one group. Where rows are longer than a token, so are these,
    and they are edited at both ends. None when no row's vectors are finite.
    """
    order, found = np.argsort(-rows.furthest, kind="stable"), []
    for row in order:
        if bool(rows.edited(np.array([row])).isfinite().all()):
            found.append(row)
        if len(found) == 2:
            break
    if not found:
        return None
    longest = np.array(found)
    longest = longest[np.argsort(rows.prompt[longest], kind="stable")]
    last = np.repeat(rows.furthest[longest], _TRIAL_SLOTS)
    p = rows.furthest[longest]
    start = np.stack([p // 8, p // 2, np.maximum(p - 1, 0), p], axis=1).reshape(-1)
    length = np.minimum(rows.width, last - start + 1)
    ends = np.cumsum(length)
    edited = np.unique(np.r_[ends - length, ends - 1])
    branches = Branches(np.repeat(rows.prompt[longest], _TRIAL_SLOTS), start, length, edited)
    kinds = torch.cat([rows.edited(longest[i : i + 1])[:1] for i in range(len(longest))])
    vectors = kinds[torch.from_numpy(branches.row[edited] // _TRIAL_SLOTS).to(kinds.device)]
    noise = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(0)).to(vectors)
    return branches, vectors + 0.3 * _scale(rows, branches, vectors) * noise


def _scale(rows: Rows, branches: Branches, vectors: Tensor) -> Tensor:
    """Root mean square of each vector, or of the clean stream there where that is larger: zeroed rows must differ too."""
    entry, size = rows.site.entry, vectors.float().pow(2).mean(dim=-1, keepdim=True).sqrt()
    if entry in rows.recording.activations:
        token = branches.prompt[branches.row], branches.position
        clean = rows.recording.at(entry, *(torch.from_numpy(x[branches.edited]) for x in token))
        size = torch.maximum(size, clean.float().pow(2).mean(dim=-1, keepdim=True).sqrt())
    return size.to(vectors)

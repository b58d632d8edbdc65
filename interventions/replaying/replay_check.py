"""Whether replay is exact: rows of the run itself are replayed and compared with full forward passes."""

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interventions.errors import MechdiagError, is_out_of_memory, one_line
from interventions.models.causality import LEAK
from interventions.models.spilled import FINAL
from interventions.recording import Recording
from interventions.replaying.certificates import Certificate, certificates, keep
from interventions.replaying.hooks import full_forwards
from interventions.replaying.joint import JointRows
from interventions.replaying.placed import Placed, placed
from interventions.replaying.replay import ATTENTIONS, Branches, replayed, unembed, unsupported
from interventions.replaying.rows import Rows
from interventions.sites import Site

_TRIAL_SLOTS = 4
_TRIAL_READS = 32  # tokens compared at either end of a branch: logits of more would fill the memory
_PER_UNIT = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
_NO_PROBABILITY = -104.0  # exp of less is 0 in float32


def logit_tolerance(dtype: torch.dtype, largest_logit: float) -> float:
    """Largest logit difference between two ways of computing the same row that rounding explains (found by experiment).

    largest_logit: of the row's centred logits.
    """
    return _PER_UNIT[dtype] * max(1.0, largest_logit)


def logits_differ(
    found: Float[Tensor, "row vocab"], expected: Float[Tensor, "row vocab"], dtype: torch.dtype
) -> tuple[float, float]:
    """The largest difference between logits computed in two ways, and the largest that rounding explains.

    Compared are tokens that have any probability on either side. Others, such as those that a model pins to −1e9, must agree to
    the same share of their own distance from the largest logit, else the difference is inf; −inf agrees with −inf. A difference
    that is nan counts as inf.
    """
    found, expected = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (found, expected))
    likely = torch.maximum(found.log_softmax(-1), expected.log_softmax(-1)) > _NO_PROBABILITY
    top = expected.amax(-1, keepdim=True)
    off = torch.where(found == expected, 0.0, (found - expected).abs()).nan_to_num(nan=torch.inf)
    seen = torch.where(likely, expected, torch.nan)
    scale = float((seen - seen.nanmean(-1, keepdim=True)).abs().nan_to_num(0.0).amax())
    allowed = logit_tolerance(dtype, scale)
    unlikely = off / (top - expected).abs().clamp(min=1.0)
    if bool((torch.where(likely, 0.0, unlikely) > allowed).any()):
        return float("inf"), allowed
    return float(torch.where(likely, off, 0.0).amax()), allowed


def why_not_replay(
    rows: Rows, size: int, chunks: Iterable[np.ndarray] | None = None
) -> tuple[str | None, Certificate | None]:
    """Why these rows cannot be replayed, or None where that is exact; then `rows.attention` is how they are to attend.

    Compares logits with full forward passes: at the longest positions, where alone a sliding window matters, and before them, in
    branches as long as the rows'; and the recorded clean logits of the rows' longest and shortest prompts. Compares nothing where
    a certificate covers the rows. size: tokens of a chunk. Where hooks of the user's own are on the model, which may count
    tokens or look at their ids, so many are tried at once, and every chunk of this call is replayed with its clean vectors first:
    chunks, the rows of each (default: as many as have `size` tokens).
    """
    recording, first = rows.recording, rows.first_block
    model = recording.model
    if reason := unsupported(recording):
        return reason, None
    kind = rows.label, 2 ** int(np.ceil(np.log2(rows.width))), first, int(rows.furthest.max())
    if (found := certificates(recording).find(*kind)) is None:
        trial = _Trial.of(rows, size if recording.own_code else 1)
        if isinstance(trial, str):
            return trial, None  # this call; the next one asks again
        reasons = [reason] if (reason := why_not_recorded(rows)) else []
        for way in () if reasons else ATTENTIONS[ATTENTIONS.index(model.replay_attention) :]:
            reason, delta = trial.why_not(way)
            if reason is None:
                found = Certificate(*kind, way, delta, reasons[0] if reasons else None)
                break
            reasons.append(reason)
        if found is None:
            found = Certificate(*kind, None, float("nan"), f"{reasons[-1]} (longest position {kind[3]})")
        keep(recording, found)
    if found.attention is None:
        return found.reason, found
    rows.attention = found.attention
    if recording.own_code and (reason := _acts_otherwise(rows, rows.chunks(size) if chunks is None else chunks)):
        return reason, found
    return None, found


def _acts_otherwise(rows: Rows, chunks: Iterable[np.ndarray]) -> str | None:
    """Why code of the user's own does something else to replayed rows than to whole prompts, or None.

    Every chunk is replayed as it will be, but with its clean vectors, and must give what was recorded: a hook may look at how many
    tokens a pass has, at their ids or at anything else.
    """
    recording, whose = rows.recording, f"code of the user's own on {rows.recording.own_code[0]}"
    if not all(recording.has(site) for site in rows.sites):
        return f"{whose} cannot be checked at a site that was not recorded"
    assert rows.attention is not None
    allowed = LEAK.get(recording.model.dtype, max(LEAK.values()))
    last = Site(recording.model.n_layers - 1)
    for chunk in chunks:
        for some in (chunk,) if rows.reference is None else (chunk, rows.distinct_clean(chunk)[0]):
            branches = rows.branches(some)
            at = [torch.from_numpy(x) for x in (branches.prompt[branches.row], branches.position)]
            clean = [_clean(recording, each, at) for each in rows.placed(some, branches=branches)]
            found = replayed(recording, branches, clean, rows.attention).hidden.float()
            edited = [x[torch.from_numpy(np.unique(np.concatenate([each.token for each in clean])))] for x in at]
            alone = Branches.single(np.zeros(len(edited[0]), dtype=int), np.zeros(len(edited[0]), dtype=int))
            there = placed(recording, last, alone.edited, recording.at(last, *edited))
            direct = replayed(recording, alone, [there]).hidden.float()
            found, where = torch.cat([found, direct]), [torch.cat(x).numpy() for x in zip(at, edited, strict=True)]
            expected = recording.rows((FINAL,), np.stack(where))[0].float()
            off = float(((found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-30)).max())
            if not off <= allowed:
                return f"{whose} does something else to single tokens than to whole prompts (off by {off:.1e} of their norm)"
        if reason := _unembeds_otherwise(rows, chunk):
            return reason
    return None


def _clean(recording: Recording, each: Placed, at: list[Tensor]) -> Placed:
    """What stands at the site of some edits; at: prompt and position of each token."""
    token = torch.from_numpy(each.token)
    whole = recording.at(each.site, *(x[token] for x in at))
    return each._replace(vectors=whole if each.columns is None else whole.gather(1, each.columns.to(whole.device)))


def _unembeds_otherwise(rows: Rows, chunk: Int[np.ndarray, "some_row"]) -> str | None:
    """The same of code around the unembedding, which sees the clean and the edited states of a chunk, or those of direct effects."""
    recording, model = rows.recording, rows.recording.model
    base = next(name for name, module in model.hf.named_modules() if module is model.base)
    outside = [name for name in recording.own_code if name != base and not name.startswith(f"{base}.")]
    if not outside:
        return None
    reads = rows.reads(chunk)
    prompt, n_pos = rows.prompt[chunk][reads.row], recording.tokens.shape[1]
    place, of = np.unique(prompt * n_pos + reads.position, return_inverse=True)
    at = np.stack(np.divmod(place, n_pos))
    clean, whole = recording.rows((FINAL,), at)[0], []
    for p in np.unique(prompt):
        everything = np.arange(int(recording.length[p]))
        states = recording.rows((FINAL,), np.stack([np.full_like(everything, p), everything]))[0]
        whole.append(unembed(recording, states)[torch.from_numpy(at[1][at[0] == p]).to(model.device)])
    edited = clean[torch.from_numpy(of).to(model.device)]
    for states, expected in ((torch.cat([clean, edited]), slice(len(clean), None)), (edited, slice(None))):
        logits = unembed(recording, states)[expected]
        delta, allowed = logits_differ(logits, torch.cat(whole)[torch.from_numpy(of).to(model.device)], model.dtype)
        if not delta <= allowed:
            return f"code of the user's own on {outside[0]} gives other logits for single tokens than for whole prompts (by {delta:.1e})"
    return None


def warn_of_full_passes(rows: Rows, reason: str) -> None:
    """Warn, once for each model and kind of reason, that rows use full forward passes, and say what that costs."""
    model, kind = rows.recording.model, re.split(r"\d", reason)[0]
    if kind in model.warned:
        return
    model.warned.add(kind)
    above = max(1, model.n_layers - rows.first_block)
    cost = float(rows.recording.length.double().mean()) * model.n_layers / (rows.width * above)
    warnings.warn(
        f"mechdiag falls back to full forward passes for {model.name}: {reason}. Each row costs a pass over its whole prompt, "
        f"about {cost:.0f} times what replay would compute",
        stacklevel=5,
    )


@dataclass
class _Trial:
    """Rows to compare, and what full forward passes gave for them."""

    rows: Rows
    branches: Branches
    edits: list[Placed]
    read: Int[np.ndarray, "read"]
    """tokens that are compared"""
    slow: Float[Tensor, "read vocab"]
    """logits there, by full forward passes"""
    size: int
    """how many tokens are replayed at once: the rows are repeated until there are so many"""

    @classmethod
    def of(cls, rows: Rows, size: int) -> "_Trial | str":
        """The trial, or why there can be none."""
        made = _joint_trial(rows) if isinstance(rows, JointRows) else _trial_rows(rows)
        if made is None:
            return "no row to check it with: the edited vectors are not finite"
        branches, edits = made
        to_end = branches.length[branches.row] - branches.place
        read = np.flatnonzero((branches.place < _TRIAL_READS) | (to_end <= _TRIAL_READS))
        slow = full_forwards(rows.recording, branches, edits, read).logits
        if bool((slow.amax(-1).isinf() | slow.isnan().any(-1)).any()):
            return "no row to check it with: the model's own logits are not finite"
        return cls(rows, branches, edits, read, slow, size)

    def why_not(self, attention: str) -> tuple[str | None, float]:
        """Why replay that attends in this way is not exact (None: it is), and the largest logit difference seen."""
        recording = self.rows.recording
        try:
            found = self._replayed(attention)
        except (TypeError, ValueError, IndexError, RuntimeError, AttributeError, KeyError) as error:
            if isinstance(error, MechdiagError) or is_out_of_memory(error):
                raise
            return f"its forward pass does not take rows: {one_line(error)}", float("nan")
        largest = 0.0
        for logits in found:
            delta, allowed = logits_differ(logits, self.slow, recording.model.dtype)
            if not delta <= allowed:
                return f"logits differ by {delta:.1e} from full forward passes, allowed {allowed:.1e}", delta
            largest = max(largest, delta)
        return None, largest

    def _replayed(self, attention: str) -> list[Float[Tensor, "read vocab"]]:
        """Logits at the tokens compared, one tensor for each copy of the rows."""
        recording, own = self.rows.recording, self.branches
        copies = max(1, -(-self.size // own.n_tokens))
        each = np.repeat(np.arange(len(own.prompt)), copies)  # copies of a row side by side: prompts stay in order
        first = np.cumsum(own.length[each]) - own.length[each]

        def places(tokens: np.ndarray) -> Int[np.ndarray, "copy token"]:
            return first[own.row[tokens] * copies + np.arange(copies)[:, None]] + own.place[tokens]

        branches = Branches(own.prompt[each], own.start[each], own.length[each], np.sort(places(own.edited), axis=None))
        edits = [
            edit._replace(
                token=places(edit.token).reshape(-1),
                vectors=edit.vectors.repeat(copies, 1),
                columns=None if edit.columns is None else edit.columns.repeat(copies, 1),
            )
            for edit in self.edits
        ]
        hidden = replayed(recording, branches, edits, attention, group_size=_TRIAL_SLOTS).hidden
        return [unembed(recording, hidden[torch.from_numpy(token).to(hidden.device)]) for token in places(self.read)]


def why_not_recorded(rows: Rows) -> str | None:
    """Why the recording is not what each prompt gives alone, or None: the rows' longest and shortest prompts are compared."""
    recording = rows.recording
    prompts = np.unique(rows.prompt)
    length = recording.length.numpy()[prompts]
    some = np.unique(prompts[[length.argmin(), length.argmax()]])
    last = recording.length.numpy()[some] - 1
    start = np.maximum(last - _TRIAL_READS + 1, 0)
    branches = Branches(some, start, last - start + 1, np.zeros(0, dtype=int))
    everything = np.arange(branches.n_tokens)
    slow = full_forwards(recording, branches, [], everything).logits
    at = np.stack([branches.prompt[branches.row], branches.position])
    delta, allowed = logits_differ(unembed(recording, recording.rows((FINAL,), at)[0]), slow, recording.model.dtype)
    if delta <= allowed:
        return None
    return f"logits of recorded prompts differ by {delta:.1e} from those of each prompt alone, allowed {allowed:.1e}"


def _joint_trial(rows: JointRows) -> tuple[Branches, list[Placed]] | None:
    """Up to four rows of the run, with noise added to their vectors: the two that reach furthest of those that begin lowest, and
    two from the middle of the others. None when none is finite."""
    assert rows.entry is not None
    order = np.lexsort((-rows.furthest, rows.entry))
    some = list(dict.fromkeys([*order[:2], *order[[len(order) // 3, 2 * len(order) // 3]]]))
    some = [row for row in some if all(bool(each.vectors.isfinite().all()) for each in rows.placed(np.array([row])))]
    if not some:
        return None
    chosen = np.array(some)[np.argsort(rows.prompt[some], kind="stable")]
    generator, edits = torch.Generator().manual_seed(0), []
    for each in rows.placed(chosen):
        noise = 0.3 * torch.randn(each.vectors.shape, generator=generator).to(each.vectors)
        size = each.vectors.float().pow(2).mean(dim=-1, keepdim=True).sqrt().clamp(min=0.1).to(noise)
        by = each.vectors if each.site.point == "pattern" else size  # nothing attends to what comes after it
        edits.append(each._replace(vectors=each.vectors + by * noise))
    return rows.branches(chosen), edits


def _trial_rows(rows: Rows) -> tuple[Branches, list[Placed]] | None:
    """The two rows that reach furthest, each started at four positions of its prompt, as one group, with noise added to their
    vectors. One token at the furthest position keeps its clean activation. None when no row's vectors are finite.

    Several different rows at several positions stand in one group because a model that ignores the mask is right on a single row
    at the last position, and on equal rows. The furthest position is neither the group's first, where counting on from the clean
    keys would be right, nor its last, where code that counts from the end would find it. Where rows are longer than a token, so
    are these, and they are edited at both ends.
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
    start = np.stack([p // 8, p, np.maximum(p - 1, 0), p // 2], axis=1).reshape(-1)
    length = np.minimum(rows.width, last - start + 1)
    ends = np.cumsum(length)
    edited = np.unique(np.r_[ends - length, ends - 1])
    branches = Branches(np.repeat(rows.prompt[longest], _TRIAL_SLOTS), start, length, edited)
    kinds = torch.cat([rows.edited(longest[i : i + 1])[:1] for i in range(len(longest))])
    vectors = kinds[torch.from_numpy(branches.row[edited] // _TRIAL_SLOTS).to(kinds.device)]
    noise = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(0)).to(vectors)
    vectors = vectors + 0.3 * _scale(rows, branches, vectors) * noise
    if rows.recording.has(rows.site):
        own = edited == branches.first[1]  # one token at the longest position keeps what it has
        at = (torch.from_numpy(x[edited[own]]) for x in (branches.prompt[branches.row], branches.position))
        vectors[torch.from_numpy(own).to(vectors.device)] = rows.recording.at(rows.site, *at)
    if rows.site.point == "pattern":
        position = torch.from_numpy(branches.position[edited]).to(vectors.device)
        n_pos = rows.recording.tokens.shape[1]
        later = torch.arange(vectors.shape[1], device=vectors.device) % n_pos > position[:, None]
        vectors = vectors.masked_fill(later, 0.0)  # nothing attends to what comes after it
    return branches, rows.placed(longest, vectors, branches)


def _scale(rows: Rows, branches: Branches, vectors: Tensor) -> Tensor:
    """Root mean square of each vector, or of the clean stream there where that is larger: zeroed rows must differ too.

    Inside a block: of what stands there.
    """
    entry = rows.site if rows.site.inside else rows.site.entry
    size = vectors.float().pow(2).mean(dim=-1, keepdim=True).sqrt()
    if rows.recording.has(entry):
        token = branches.prompt[branches.row], branches.position
        clean = rows.recording.at(entry, *(torch.from_numpy(x[branches.edited]) for x in token))
        size = torch.maximum(size, clean.float().pow(2).mean(dim=-1, keepdim=True).sqrt())
    return size.to(vectors)

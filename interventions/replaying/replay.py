"""The fast path: edited vectors in, final hidden states out, at the cost of the tokens that an edit can reach.

An edit at position p of block l changes nothing before p and nothing below l. So a row is a branch: the tokens from its
first edited position to the last one that is read (a single token where the effect is read at the edited position). They
enter with their clean values where the site stands and attend to their prompt's clean keys before p and to one another.
Hundreds of rows make one call of the model's own forward; hooks of TransformerLens and nnsight on the blocks that run still
fire. Two ways to attend, both exact:

grouped   our attention function (see `attention`), for models that let theirs be chosen; no key is copied for a row
masked    the model's own attention under a 4-D mask, the branches of a prompt standing side by side as extra queries
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

from interventions.models.anatomy import at_site
from interventions.models.causal_model import CausalModel
from interventions.models.compat import cache_name, cache_understood, multiplies_into_float32
from interventions.models.exclusive import exclusive, forward_replaced
from interventions.models.uploads import upload_all
from interventions.recording import Recording
from interventions.replaying.attention import PatternRows, RowAttention, attending
from interventions.replaying.placed import Placed, merged, overwritten
from interventions.sites import Site

ATTENTIONS = ("grouped", "masked")
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}


def unsupported(recording: Recording) -> str | None:
    """Why replay cannot be tried on this recording, or None. (Whether replay is exact is checked in `replay_check`.)"""
    kinds = set(getattr(recording.model.config, "layer_types", None) or ()) - _KNOWN_LAYERS
    if kinds:
        return f"blocks of kind {', '.join(sorted(kinds))} have no keys that a row could attend to"
    if recording.by_length:
        return f"rotary frequencies depend on the length of the pass ({recording.by_length})"
    if recording.keys is None:
        return recording.why_no_keys or "no keys and values were recorded"
    return None


@dataclass(frozen=True)
class Branches:
    """Rows as branches, laid end to end: tokens `start` … `start + length − 1` of a prompt each. All arrays on the CPU."""

    prompt: Int[np.ndarray, "row"]
    """ascending"""
    start: Int[np.ndarray, "row"]
    length: Int[np.ndarray, "row"]
    edited: Int[np.ndarray, "edit"]
    """which tokens, of all branches end to end, are edited; ascending"""

    @classmethod
    def single(cls, prompt: np.ndarray, position: np.ndarray) -> "Branches":
        """Rows of one token, each of them edited."""
        return cls(prompt, position, np.ones_like(position), np.arange(len(position)))

    @cached_property
    def first(self) -> Int[np.ndarray, "row"]:
        """The first token of each branch."""
        return np.cumsum(self.length) - self.length

    @cached_property
    def row(self) -> Int[np.ndarray, "token"]:
        """The row that each token belongs to."""
        return np.repeat(np.arange(len(self.length)), self.length)

    @cached_property
    def place(self) -> Int[np.ndarray, "token"]:
        """Where in its branch a token stands, from 0."""
        return np.arange(len(self.row)) - self.first[self.row]

    @cached_property
    def position(self) -> Int[np.ndarray, "token"]:
        """Where in its prompt a token stands."""
        return self.start[self.row] + self.place

    @property
    def n_tokens(self) -> int:
        return len(self.row)

    def take(self, rows: Int[np.ndarray, "some_row"]) -> "Branches":
        """Some of the branches, in ascending order."""
        edited = self.edited[np.isin(self.row[self.edited], rows)]
        length = self.length[rows]
        first = (np.cumsum(length) - length)[np.searchsorted(rows, self.row[edited])]
        return Branches(self.prompt[rows], self.start[rows], length, first + self.place[edited])


@dataclass
class Layout:
    """Branches laid out as groups of equal size, each of one prompt, each branch as wide as the longest."""

    slot: Int[Tensor, "token"]
    """place of each token, (group · size + branch) · width + place in the branch"""
    group_prompt: Int[Tensor, "group"]
    prompts: Int[np.ndarray, "group"]
    """the same on the CPU"""
    start: Int[Tensor, "group slot"]
    """position of the first token of each slot's branch; 0 in padding slots"""
    position: Int[Tensor, "group slot"]
    """0 in padding slots"""
    width: int
    n_clean: int
    """clean keys a group may attend to: the largest start, on a GPU rounded up to a multiple of 8 where so many were recorded"""

    @property
    def shape(self) -> tuple[int, int]:
        return self.position.shape[0], self.position.shape[1]


def layout(
    branches: Branches, device: torch.device, n_pos: int, cost_of_slot: float | int, size: int | None = None
) -> Layout:
    """Branches laid out in groups of `size` of them, or of the size that costs least.

    n_pos: keys that were recorded of a prompt. cost_of_slot: multiply-adds of a padding slot, beside attention, in units of d_model.
    """
    n_clean, width, prompt = int(branches.start.max()), int(branches.length.max()), branches.prompt
    if device.type != "cpu":  # matrix products on GPUs want rows of a multiple of 16 bytes
        n_clean = min(-(-n_clean // 8) * 8, n_pos)
    counts = np.diff(np.flatnonzero(np.r_[True, prompt[1:] != prompt[:-1], True]))
    sizes = np.unique(np.minimum(2 ** np.arange(8), counts.max())) if size is None else np.array([size])
    groups = np.array([np.ceil(counts / s).sum() for s in sizes])
    slots = sizes * width
    cost = groups * (slots * (cost_of_slot + 4 * (n_clean + slots)) + 24 * n_clean)  # 24: copying a key, by experiment
    size = int(sizes[np.argmin(cost)])
    within = np.arange(len(prompt)) - np.repeat(np.cumsum(counts) - counts, counts)
    new = within % size == 0
    branch = (np.cumsum(new) - 1) * size + within % size
    slot = branch[branches.row] * width + branches.place
    both = np.stack([branches.start[branches.row], branches.position])
    prompts = prompt[new]
    slot, both, group_prompt = upload_all([slot, both, prompts], device)
    padded = torch.zeros(2, int(new.sum()) * size * width, dtype=torch.long, device=device)
    padded.index_copy_(1, slot, both)
    start, position = padded.view(2, -1, size * width)
    return Layout(slot, group_prompt, prompts, start, position, width, n_clean)


class _JoinedKeys(DynamicCache):
    """For masked attention: the clean keys and values of each group's prompt, joined to the rows' own; nothing is stored."""

    def __init__(self, recording: Recording, rows: Layout):
        super().__init__()
        self.recording, self.rows = recording, rows

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        prompt = self.rows.group_prompt.to(key_states.device)
        clean = self.recording.clean_keys(layer_idx, self.rows.prompts, prompt, self.rows.n_clean)
        return tuple(torch.cat(pair, dim=2) for pair in zip(clean, (key_states, value_states), strict=True))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.rows.n_clean


class _OwnKeys(DynamicCache):
    """For grouped attention: the rows' own keys and values; it tells the attention function which block is running."""

    def __init__(self, rows: RowAttention):
        super().__init__()
        self.rows = rows

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        self.rows.layer = layer_idx
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.rows.n_clean


def row_mask(rows: Layout, dtype: torch.dtype, window: int | None = None) -> Float[Tensor, "group 1 slot key"]:
    """Additive mask: a slot sees its prompt's clean keys before its branch (within the window), and its branch up to itself."""
    device = rows.position.device
    key, slot = torch.arange(rows.n_clean, device=device), torch.arange(rows.shape[1], device=device)
    hidden = key >= rows.start[:, :, None]
    others = (slot // rows.width != slot[:, None] // rows.width) | (slot > slot[:, None])
    if window is not None:
        hidden |= key <= rows.position[:, :, None] - window
        others |= slot <= slot[:, None] - window
    hidden = torch.cat([hidden, others.expand(len(hidden), -1, -1)], dim=2)
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, torch.finfo(dtype).min)[:, None]


def windows(model: CausalModel) -> list[int | None]:
    """Sliding window of each block, None where it sees everything before."""
    window = getattr(model.config, "sliding_window", None)
    kinds = getattr(model.config, "layer_types", None)
    if kinds is None:
        return [window] * model.n_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _for_each_kind(model: CausalModel, mask: Any) -> Any:
    """The mask as the model takes it: one for each kind of block where it has several kinds, else one for all."""
    if "sliding_attention" in (getattr(model.config, "layer_types", None) or ()):
        return {"full_attention": mask(None), "sliding_attention": mask(model.config.sliding_window)}
    return mask(windows(model)[0])


@contextmanager
def entering_at(recording: Recording, first_block: int, value: Tensor):
    """Blocks below `first_block` compute nothing; it reads `value` (above the last block: the final norm does)."""
    model = recording.model
    below = value.clone() if recording.own_code else value  # a hook there may change it in place
    with ExitStack() as stack:
        for i, block in enumerate(model.blocks[:first_block]):
            given = model.handed_on(value if i == first_block - 1 else below)
            stack.enter_context(forward_replaced(block, lambda *_, given=given, **__: given))
        if first_block == 0:
            stack.enter_context(at_site(model, Site(0, "resid_pre"), lambda _: value))
        yield


class Replayed(NamedTuple):
    """What the blocks above made of some branches, token by token."""

    hidden: Float[Tensor, "token d_model"]
    """after the final norm"""
    stream: Float[Tensor, "token d_model"]
    """before it"""


def _pattern_rows(each: Placed, token: Int[Tensor, "edit"], rows: Layout) -> PatternRows:
    """Edited rows of weights, over the clean keys and over the tokens of the branch."""
    device, n_pos = each.vectors.device, each.vectors.shape[1]
    if each.columns is None:  # every head
        n_pos = n_pos // each.n_heads
        head = torch.arange(each.n_heads, device=device).repeat(len(each.token))
        weights = each.vectors.reshape(-1, n_pos)
    else:
        head, weights = each.columns[:, 0] // n_pos, each.vectors
    slot = rows.slot[token].repeat_interleave(len(head) // max(1, len(token)))
    start, position = (x.flatten()[slot][:, None] for x in (rows.start, rows.position))
    key, place = (torch.arange(n, device=device) for n in (rows.n_clean, rows.width))
    on_clean = torch.where(key < start, weights[:, : rows.n_clean], 0.0)
    own = start + place
    on_own = torch.where(own <= position, weights.gather(1, own.clamp(max=n_pos - 1)), 0.0)
    return PatternRows(slot, head, on_clean, on_own)


def _put_in(model: CausalModel, each: Placed, token: Tensor, rows: Layout, flat: bool) -> AbstractContextManager:
    """Let the vectors stand at their site for as long as this lasts."""
    slot = token if flat else rows.slot[token]

    def overwrite(value: Tensor) -> Tensor:
        lines, edit = value.flatten(0, 1), each
        if each.site.point != "pattern":
            return overwritten(lines, slot, edit).view(value.shape)
        made = _pattern_rows(each, token, rows)
        weights = lines.unflatten(-1, (each.n_heads, -1))
        own = rows.n_clean + made.slot % rows.shape[1] // rows.width * rows.width
        line = weights.new_zeros(len(made.head), weights.shape[-1])
        line[:, : rows.n_clean] = made.on_clean
        line.scatter_(1, own[:, None] + torch.arange(rows.width, device=own.device), made.on_own.to(line.dtype))
        return weights.index_put((made.slot, made.head), line).view(value.shape)

    return at_site(model, each.site, overwrite)


def replayed(
    recording: Recording,
    branches: Branches,
    edits: Sequence[Placed],
    attention: str = "grouped",
    group_size: int | None = None,
) -> Replayed:
    """Run the blocks above on `branches`, the vectors of `edits` standing at their tokens; no logits are formed.

    attention: one of `ATTENTIONS`. group_size: branches of a prompt side by side (default: what costs least). One call of
    the model's own forward; gradients flow where they are enabled. Tokens of a branch with a non-finite vector are nan.
    """
    model, device = recording.model, recording.model.device
    edits = merged(edits)
    finite = [each.vectors.isfinite().all(dim=-1) for each in edits]
    # else one row could spoil those beside it
    kept = [
        each._replace(vectors=torch.where(f[:, None], each.vectors, 0.0)) for each, f in zip(edits, finite, strict=True)
    ]
    tokens = upload_all([each.token for each in edits], device)
    first = min(each.site.first_block for each in edits)
    flat = attention == "grouped" or first == model.n_layers  # above the last block nothing attends
    rows = layout(branches, device, recording.tokens.shape[1], 0 if flat else 12 * model.d_model, group_size)
    if recording.spilled is not None and first < model.n_layers:
        recording.spilled.need(rows.prompts)
    put = list(zip(kept, tokens, strict=True))
    entering = [x for x in put if x[0].site.first_block == first and x[0].site.entry == x[0].site]
    later = [x for x in put if not any(x[0].site == other.site for other, _ in entering)]
    if len(entering) == 1 and np.array_equal(entering[0][0].token, np.arange(branches.n_tokens)):
        value = entering[0][0].vectors
    else:
        token = torch.from_numpy(np.stack([branches.prompt[branches.row], branches.position]))
        value = recording.entering(first, *token)
        for each, token in entering:
            value = overwritten(value, token, each)
    stream: list[Tensor] = []
    with ExitStack() as stack:
        if flat:
            value = value[None]
            slot_position = rows.position.flatten()[rows.slot][None]
            unused = value.new_zeros(1, 1, 1, 1)  # 4-D: the model makes no mask of its own
            mask = _for_each_kind(model, lambda _: unused)
            own = RowAttention(
                recording,
                rows.slot,
                rows.group_prompt,
                rows.prompts,
                rows.start,
                rows.position,
                rows.width,
                rows.n_clean,
                windows(model),
                patterns={
                    each.site.layer: _pattern_rows(each, token, rows)
                    for each, token in later
                    if each.site.point == "pattern"
                },
            )
            later = [x for x in later if x[0].site.point != "pattern"]
            cache: DynamicCache = _OwnKeys(own)
            stack.enter_context(attending(own))
        else:
            n_group, n_slot = rows.shape
            value = value.new_zeros(n_group * n_slot, model.d_model).index_copy(0, rows.slot, value)
            value = value.view(n_group, n_slot, -1)
            slot_position = rows.position
            mask = _for_each_kind(model, lambda window: row_mask(rows, model.dtype, window))
            cache = _JoinedKeys(recording, rows)
        stack.enter_context(entering_at(recording, first, value))
        for each, token in later:
            stack.enter_context(_put_in(model, each, token, rows, flat))
        if first < model.n_layers:
            stack.enter_context(at_site(model, Site(model.n_layers - 1), lambda x: stream.append(x)))
        stack.enter_context(cache_understood(model.base))
        hidden = model.base(
            input_ids=torch.zeros(value.shape[:2], dtype=torch.long, device=device),  # embedded, then left behind
            attention_mask=mask,
            position_ids=slot_position,
            use_cache=True,
            **{cache_name(model.base) or "cache": cache},
        ).last_hidden_state
    found = [
        (x[0] if flat else x.flatten(0, 1).index_select(0, rows.slot))
        for x in (hidden.to(device), stream[0] if stream else value)
    ]
    branch = rows.slot // rows.width
    bad_rows = torch.zeros(rows.position.numel() // rows.width, dtype=torch.int32, device=device)
    for token, good in zip(tokens, finite, strict=True):
        bad_rows.index_add_(0, branch[token], (~good).int())
    bad = (bad_rows > 0)[branch, None]
    return Replayed(*(x.masked_fill(bad, torch.nan) for x in found))


def unembed(
    recording: Recording, hidden: Float[Tensor, "row d_model"], tokens: Int[Tensor, "token"] | None = None
) -> Float[Tensor, "row vocab"] | Float[Tensor, "row token"]:
    """Logits of final hidden states, by the model's own head (soft-capping and scaling included), in the model's dtype.

    tokens: of these alone, where `gives_some_logits`: at the cost of these. Where the device multiplies matrices of half precision into
    float32 and the head is one plain linear layer, logits are float32: rounding them would raise the noise floor of KL several times.
    """
    model, output = recording.model, recording.output_type(last_hidden_state=hidden[None])
    ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
    with ExitStack() as stack:
        stack.enter_context(exclusive(model))
        stack.enter_context(forward_replaced(model.base, lambda *_, **__: output))
        head = _plain_head(model) if tokens is None else model.hf.get_output_embeddings()
        if head is not None:
            wide = head.weight.dtype == hidden.dtype and multiplies_into_float32(hidden.device, hidden.dtype)
            wide = wide and not hidden.requires_grad
            if wide or tokens is not None:
                weight, bias = head.weight, head.bias
                if tokens is not None:
                    which = tokens.to(weight.device)
                    weight, bias = weight[which], None if bias is None else bias[which]
                multiply = _wide_linear if wide else F.linear
                stack.enter_context(forward_replaced(head, lambda x: multiply(x, weight, bias)))
        return model.hf(input_ids=ids).logits[0].to(hidden.device)


def _wide_linear(
    x: Float[Tensor, "*row d_model"], weight: Float[Tensor, "vocab d_model"], bias: Float[Tensor, "vocab"] | None
) -> Float[Tensor, "*row vocab"]:
    """The head's product in float32, its factors in half precision."""
    product = torch.mm(x.flatten(0, -2), weight.T, out_dtype=torch.float32)
    return (product if bias is None else product + bias).unflatten(0, x.shape[:-1])


def _plain_head(model: CausalModel) -> nn.Linear | None:
    """The model's head, if it is one linear layer that nothing else has a hand in."""
    head = model.hf.get_output_embeddings()
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    if type(head) is not nn.Linear or "forward" in head.__dict__ or any(getattr(head, name) for name in hooks):
        return None
    return None if type(head.weight) is not nn.Parameter or head.weight.is_meta else head


def gives_some_logits(recording: Recording, hidden: Float[Tensor, "row d_model"], tokens: Int[Tensor, "token"]) -> bool:
    """Whether the model's head gives the logits of some tokens alone: it is one linear layer that nothing else has a hand in, and
    whatever follows it (soft-capping, scaling) treats each token by itself. The latter is seen by looking at these states' logits.
    """
    if _plain_head(recording.model) is None:
        return False
    some = unembed(recording, hidden, tokens)
    if some.shape[-1] != len(tokens):
        return False
    expected = unembed(recording, hidden)[:, tokens.to(some.device)]
    scale = expected.abs().amax().clamp(min=1e-30)
    return bool((some - expected).abs().amax() <= 64 * torch.finfo(some.dtype).eps * scale)

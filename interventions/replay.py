"""The fast path: edited vectors in, final hidden states out, at the cost of one token a row through the blocks above.

An edit at position p after block l changes nothing before p and nothing up to block l. So a row is one token that starts
at the block above and attends to its prompt's clean keys before p and to itself. Hundreds of rows make one call of the
model's own forward; hooks of TransformerLens and nnsight on those blocks still fire. Two ways to attend, both exact:

grouped   our attention function (see `attention`), for models that let theirs be chosen; no key is copied for a row
masked    the model's own attention under a 4-D mask, the rows of a prompt standing side by side as extra queries
"""

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from interventions.attention import RowAttention, attending
from interventions.models import CausalModel, at_site, forward_replaced
from interventions.recording import Recording
from interventions.sites import Site

ATTENTIONS = ("grouped", "masked")
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}


def unsupported(recording: Recording) -> str | None:
    """Why replay cannot be tried on this recording, or None. (Whether it is exact is for the check in `effects`.)"""
    kinds = set(getattr(recording.model.config, "layer_types", None) or ()) - _KNOWN_LAYERS
    if kinds:
        return f"blocks of kind {', '.join(sorted(kinds))} have no keys that a row could attend to"
    if recording.keys is None:
        return "no keys and values were recorded"
    return None


@dataclass
class Layout:
    """Rows laid out as groups of equal size, each of one prompt."""

    slot: Int[Tensor, "row"]
    """place of each row, group · size + slot"""
    group_prompt: Int[Tensor, "group"]
    position: Int[Tensor, "group slot"]
    """0 in padding slots"""
    n_clean: int
    """clean keys a group may attend to: the largest position"""

    @property
    def shape(self) -> tuple[int, int]:
        return self.position.shape[0], self.position.shape[1]


def layout(
    prompt: np.ndarray, position: np.ndarray, device: torch.device, cost_of_slot: float | int, size: int | None = None
) -> Layout:
    """Rows sorted by prompt, `[row]`, laid out in groups of `size`, or of the size that costs least.

    cost_of_slot: multiply-adds of a padding slot, beside attention, in units of d_model.
    """
    n_clean = int(position.max())
    counts = np.diff(np.flatnonzero(np.r_[True, prompt[1:] != prompt[:-1], True]))
    sizes = np.unique(np.minimum(2 ** np.arange(8), counts.max())) if size is None else np.array([size])
    groups = np.array([np.ceil(counts / s).sum() for s in sizes])
    cost = groups * (sizes * (cost_of_slot + 4 * (n_clean + sizes)) + 24 * n_clean)  # 24: copying a key, by experiment
    size = int(sizes[np.argmin(cost)])
    within = np.arange(len(prompt)) - np.repeat(np.cumsum(counts) - counts, counts)
    new = within % size == 0
    slot = torch.from_numpy((np.cumsum(new) - 1) * size + within % size).to(device)
    padded = torch.zeros(int(new.sum()) * size, dtype=torch.long, device=device)
    padded.index_copy_(0, slot, torch.from_numpy(position).to(device))
    return Layout(slot, torch.from_numpy(prompt[new]).to(device), padded.view(-1, size), n_clean)


class _JoinedKeys(DynamicCache):
    """For masked attention: the clean keys and values of each group's prompt, joined to the rows' own; nothing is stored."""

    def __init__(self, recording: Recording, rows: Layout):
        super().__init__()
        self.recording, self.rows = recording, rows

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        assert self.recording.keys is not None and self.recording.values is not None
        clean = (self.recording.keys, self.recording.values)
        return tuple(
            torch.cat([kept[layer_idx][:, :, : self.rows.n_clean].index_select(0, self.rows.group_prompt), new], dim=2)
            for kept, new in zip(clean, (key_states, value_states), strict=True)
        )

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
    """Additive mask: a slot sees its prompt's clean keys before its position (within the window), and itself."""
    (n_group, n_slot), position = rows.shape, rows.position
    key = torch.arange(rows.n_clean, device=position.device)
    hidden = key >= position[:, :, None]
    if window is not None:
        hidden |= key <= position[:, :, None] - window
    others = ~torch.eye(n_slot, dtype=torch.bool, device=position.device).expand(n_group, -1, -1)
    hidden = torch.cat([hidden, others], dim=2)
    return torch.zeros(hidden.shape, dtype=dtype, device=position.device).masked_fill_(hidden, torch.finfo(dtype).min)[
        :, None
    ]


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
    model, as_tuple = recording.model, recording.blocks_return_tuple
    with ExitStack() as stack:
        for block in model.blocks[:first_block]:
            stack.enter_context(forward_replaced(block, lambda *_, **__: (value,) if as_tuple else value))
        if first_block == 0:
            stack.enter_context(at_site(model, Site(0, "resid_pre"), lambda _: value))
        yield


def final_hidden(
    recording: Recording,
    first_block: int,
    prompt: np.ndarray,
    position: np.ndarray,
    vectors: Float[Tensor, "row d_model"],
    attention: str = "grouped",
    group_size: int | None = None,
) -> Float[Tensor, "row d_model"]:
    """Hidden states after the final norm, of rows sorted by prompt, with `vectors` as what block `first_block` reads.

    prompt, position: `[row]` on the CPU. attention: one of `ATTENTIONS`. group_size: rows of a prompt side by side
    (default: what costs least). One call of the model's own forward; gradients flow where they are enabled.
    """
    model, device = recording.model, recording.model.device
    finite = vectors.isfinite().all(dim=-1, keepdim=True)
    vectors = torch.where(finite, vectors, 0.0)  # else one row could spoil those beside it
    flat = attention == "grouped" or first_block == model.n_layers  # above the last block nothing attends
    rows = layout(prompt, position, device, 0 if flat else 12 * model.d_model, group_size)
    with ExitStack() as stack:
        if flat:
            shape = (1, len(prompt))
            value, slot_position = vectors[None], torch.from_numpy(position).to(device)[None]
            unused = torch.zeros(
                1, 1, 1, 1, dtype=model.dtype, device=device
            )  # 4-D: the model makes no mask of its own
            mask = _for_each_kind(model, lambda _: unused)
            own = RowAttention(recording, rows.slot, rows.group_prompt, rows.position, rows.n_clean, windows(model))
            cache: DynamicCache = _OwnKeys(own)
            stack.enter_context(attending(own))
        else:
            shape = rows.shape
            value = (
                vectors.new_zeros(shape[0] * shape[1], model.d_model).index_copy(0, rows.slot, vectors).view(*shape, -1)
            )
            slot_position = rows.position
            mask = _for_each_kind(model, lambda window: row_mask(rows, model.dtype, window))
            cache = _JoinedKeys(recording, rows)
        stack.enter_context(entering_at(recording, first_block, value))
        hidden = model.base(
            input_ids=torch.zeros(shape, dtype=torch.long, device=device),  # embedded, then left behind
            attention_mask=mask,
            position_ids=slot_position,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
    hidden = hidden[0] if flat else hidden.flatten(0, 1).index_select(0, rows.slot)
    return torch.where(finite, hidden, torch.nan)


def unembed(recording: Recording, hidden: Float[Tensor, "row d_model"]) -> Float[Tensor, "row vocab"]:
    """Logits of final hidden states, by the model's own head (soft-capping and scaling included), in the model's dtype."""
    model, output = recording.model, recording.output_type(last_hidden_state=hidden[None])
    ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
    with forward_replaced(model.base, lambda *_, **__: output):
        return model.hf(input_ids=ids).logits[0]

"""The fast path: edited vectors in, final hidden states out, at the cost of one token a row through the blocks above.

An edit at position p after block l changes nothing before p and nothing up to block l. So a row is one query token that
starts at the block above, attends to its prompt's clean keys before p and to itself. Rows of a prompt stand side by side
in one call of the model's own forward, under a 4-D mask; hooks of TransformerLens and nnsight on those blocks still fire.
"""

from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from interventions.models import CausalModel, forward_replaced
from interventions.recording import Recording

_KNOWN_LAYERS = {"full_attention", "sliding_attention"}


def unsupported(recording: Recording) -> str | None:
    """Why replay cannot be tried on this recording, or None. (Whether it is exact is for the check in `effects`.)"""
    kinds = set(getattr(recording.model.config, "layer_types", None) or ()) - _KNOWN_LAYERS
    if kinds:
        return f"blocks of kind {', '.join(sorted(kinds))} have no keys that a row could attend to"
    if recording.keys is None:
        return "no keys and values were recorded"
    return None


class _CleanKeys(DynamicCache):
    """Clean keys and values of each group's prompt, cut to the first `n_clean` positions; joined to the rows' own, stored nowhere."""

    def __init__(self, recording: Recording, group_prompt: Tensor, n_clean: int):
        super().__init__()
        self.recording, self.n_clean, self.group_prompt = recording, n_clean, group_prompt

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        clean = (self.recording.keys, self.recording.values)
        own = (key_states, value_states)
        keys, values = (
            torch.cat([kept[layer_idx][:, :, : self.n_clean].index_select(0, self.group_prompt), new], dim=2)
            for kept, new in zip(clean, own, strict=True)
        )
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.n_clean


def row_mask(
    position: Int[Tensor, "group slot"], n_clean: int, dtype: torch.dtype, window: int | None = None
) -> Float[Tensor, "group 1 slot key"]:
    """Additive mask: a slot sees its prompt's clean keys before its position (within the window), and itself."""
    n_slot = position.shape[1]
    key = torch.arange(n_clean, device=position.device)
    hidden = key >= position[:, :, None]
    if window is not None:
        hidden |= key <= position[:, :, None] - window
    others = ~torch.eye(n_slot, dtype=torch.bool, device=position.device).expand(len(position), -1, -1)
    hidden = torch.cat([hidden, others], dim=2)
    return torch.zeros(hidden.shape, dtype=dtype, device=position.device).masked_fill_(hidden, torch.finfo(dtype).min)[
        :, None
    ]


def _masks(model: CausalModel, position: Tensor, n_clean: int) -> Any:
    window = getattr(model.config, "sliding_window", None)
    if "sliding_attention" in (getattr(model.config, "layer_types", None) or ()):
        return {
            "full_attention": row_mask(position, n_clean, model.dtype),
            "sliding_attention": row_mask(position, n_clean, model.dtype, window),
        }
    if getattr(model.config, "layer_types", None):
        window = None
    return row_mask(position, n_clean, model.dtype, window)


@contextmanager
def _entering_at(model: CausalModel, first_block: int, value: Tensor, as_tuple: bool):
    """Blocks below `first_block` compute nothing; `value` is what it reads (or, above the last block, what the final norm reads)."""
    with ExitStack() as stack:
        for block in model.blocks[:first_block]:
            stack.enter_context(forward_replaced(block, lambda *_, **__: (value,) if as_tuple else value))
        if first_block == 0:

            def enter(_: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
                return ((value, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": value})

            stack.callback(model.blocks[0].register_forward_pre_hook(enter, with_kwargs=True).remove)
        yield


def layout(
    prompt: np.ndarray, n_clean: int, d_model: int, size: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows (sorted by prompt) laid out as groups of equal size, each of one prompt: group and slot of each row, prompt of each group.

    A group holds so many rows (`size`, when given) that padding slots, copies of clean keys and rows hidden from each
    other cost least.
    """
    counts = np.diff(np.flatnonzero(np.r_[True, prompt[1:] != prompt[:-1], True]))
    sizes = np.unique(np.minimum(2 ** np.arange(8), counts.max())) if size is None else np.array([size])
    n_groups = np.array([np.ceil(counts / size).sum() for size in sizes])
    keys = n_clean + sizes
    cost = n_groups * (sizes * (12 * d_model + 4 * keys) + 24 * keys * (n_clean > 0))
    size = sizes[np.argmin(cost)]
    first = np.repeat(np.cumsum(counts) - counts, counts)
    within = np.arange(len(prompt)) - first
    new_group = within % size == 0
    return np.cumsum(new_group) - 1, within % size, prompt[new_group]


def final_hidden(
    recording: Recording,
    first_block: int,
    prompt: np.ndarray,
    position: np.ndarray,
    vectors: Float[Tensor, "row d_model"],
    group_size: int | None = None,
) -> Float[Tensor, "row d_model"]:
    """Hidden states after the final norm, of rows sorted by prompt, with `vectors` as what block `first_block` reads.

    prompt, position: `[row]` on the CPU. One call of the model's own forward; gradients flow where they are enabled.
    group_size: rows side by side (default: what costs least).
    """
    model = recording.model
    device = model.device
    if first_block == model.n_layers:  # nothing attends any more: any layout, no keys
        group, slot, group_prompt, n_clean = np.zeros_like(prompt), np.arange(len(prompt)), prompt[:1], 0
    else:
        n_clean = int(position.max())
        group, slot, group_prompt = layout(prompt, n_clean, model.d_model, group_size)
    n_group, n_slot = len(group_prompt), int(slot.max()) + 1
    where = torch.from_numpy(group * n_slot + slot).to(device)
    slots = torch.zeros(n_group * n_slot, dtype=torch.long, device=device)
    slot_position = slots.index_copy(0, where, torch.from_numpy(position).to(device)).view(n_group, n_slot)
    value = vectors.new_zeros(n_group * n_slot, model.d_model).index_copy(0, where, vectors).view(n_group, n_slot, -1)
    if first_block == model.n_layers:
        mask: Any = torch.zeros(1, 1, 1, 1, dtype=model.dtype, device=device)
        if "sliding_attention" in (getattr(model.config, "layer_types", None) or ()):
            mask = {"full_attention": mask, "sliding_attention": mask}
    else:
        mask = _masks(model, slot_position, n_clean)
    cache = _CleanKeys(recording, torch.from_numpy(group_prompt).to(device), n_clean)
    with _entering_at(model, first_block, value, recording.blocks_return_tuple):
        hidden = model.base(
            input_ids=slots.view(n_group, n_slot),
            attention_mask=mask,
            position_ids=slot_position,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
    return hidden.reshape(n_group * n_slot, -1).index_select(0, where)


def unembed(recording: Recording, hidden: Float[Tensor, "row d_model"]) -> Float[Tensor, "row vocab"]:
    """Logits of final hidden states, by the model's own head (soft-capping and scaling included), in the model's dtype."""
    model, output = recording.model, recording.output_type(last_hidden_state=hidden[None])
    ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
    with forward_replaced(model.base, lambda *_, **__: output):
        return model.hf(input_ids=ids).logits[0]

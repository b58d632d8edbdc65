"""Attention of replayed rows to their prompts' clean keys, without copying these keys for every row.

Tokens of the forward pass are the rows, side by side, `[1, row]`. Each attends to the clean keys of its own prompt before
its own position, and to itself; nothing attends to another row. Installed for the time of one forward pass as the model's
attention function, so that everything else is the model's own code.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from interventions.recording import Recording

_NAME = "mechdiag_rows"


@dataclass
class RowAttention:
    """What the rows of one forward pass attend to."""

    recording: Recording
    slot: Int[Tensor, "row"]
    """place of each row in the padded groups, group · size + slot"""
    group_prompt: Int[Tensor, "group"]
    position: Int[Tensor, "group slot"]
    n_clean: int
    windows: list[int | None]
    """sliding window of each block, None: it sees all"""
    layer: int = -1
    """the block that is running: set by the cache as it takes the rows' keys"""
    masks: dict[int | None, Tensor] = field(default_factory=dict)
    """`hidden` of each window, formed once"""

    def hidden(self, window: int | None) -> Tensor:
        """Which clean keys a slot must not see, `[group, 1, slot, key]`."""
        if window not in self.masks:
            key = torch.arange(self.n_clean, device=self.position.device)
            outside = key >= self.position[:, :, None]
            if window is not None:
                outside |= key <= self.position[:, :, None] - window
            self.masks[window] = outside[:, None]
        return self.masks[window]

    def attend(
        self,
        query: Float[Tensor, "head row d_head"],
        key: Float[Tensor, "kv_head row d_head"],
        value: Float[Tensor, "kv_head row d_value"],
        scaling: float,
        softcap: float | None,
    ) -> Float[Tensor, "row head d_value"]:
        """softmax over clean keys before the row and its own key, a group of rows of one prompt at a time."""
        (n_group, n_slot), n_kv = self.position.shape, key.shape[0]
        repeats = query.shape[0] // n_kv

        def grouped(x: Tensor) -> Tensor:
            padded = x.new_zeros(x.shape[0], n_group * n_slot, x.shape[2]).index_copy(1, self.slot, x)
            return padded.view(x.shape[0], n_group, n_slot, -1).transpose(0, 1)  # [group, head, slot, d_head]

        assert self.recording.keys is not None and self.recording.values is not None
        clean_keys, clean_values = (
            kept[self.layer][:, :, : self.n_clean].index_select(0, self.group_prompt)
            for kept in (self.recording.keys, self.recording.values)
        )
        query = query * scaling  # here and not on the scores, of which there are more
        q = grouped(query).reshape(n_group, n_kv, repeats * n_slot, -1)
        scores = (q @ clean_keys.transpose(-1, -2)).view(n_group, n_kv * repeats, n_slot, self.n_clean)
        own = (query.view(n_kv, repeats, *query.shape[1:]) * key[:, None]).sum(-1).flatten(0, 1)
        scores = torch.cat([scores, grouped(own[..., None])], dim=-1)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores[..., : self.n_clean].masked_fill_(self.hidden(self.windows[self.layer]), float("-inf"))
        weights = scores.softmax(-1, dtype=torch.promote_types(torch.float32, query.dtype)).to(query.dtype)
        seen = weights[..., : self.n_clean].reshape(n_group, n_kv, repeats * n_slot, self.n_clean) @ clean_values
        seen = seen.view(n_group, n_kv * repeats, n_slot, -1).permute(0, 2, 1, 3).flatten(0, 1)[self.slot]
        on_self = weights[..., self.n_clean].permute(0, 2, 1).flatten(0, 1)[self.slot]
        return seen + on_self[..., None] * value.repeat_interleave(repeats, dim=0).transpose(0, 1)


_ACTIVE: ContextVar[RowAttention] = ContextVar("rows that are being replayed")


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    if s_aux is not None or position_bias is not None:
        raise TypeError("attention with sinks or position biases")
    scale = float(query.shape[-1] ** -0.5) if scaling is None else scaling
    return _ACTIVE.get().attend(query[0], key[0], value[0], scale, softcap)[None], None


ALL_ATTENTION_FUNCTIONS.register(_NAME, _forward)


@contextmanager
def attending(rows: RowAttention) -> Iterator[None]:
    """Let the model's blocks attend as `rows` say."""
    config = rows.recording.model.hf.config
    own = config._attn_implementation
    token = _ACTIVE.set(rows)
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = own
        _ACTIVE.reset(token)

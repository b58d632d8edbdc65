"""Attention of replayed rows to their prompts' clean keys, without copying these keys for every row.

Tokens of the forward pass are those of all branches, end to end, `[1, token]`. Each attends to the clean keys of its own
prompt before its branch, and to its branch up to itself; nothing attends to another branch. Installed as the model's attention
function for one forward pass, so that everything else is the model's own code.
"""

from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from interventions.errors import ModelError
from interventions.models.exclusive import attending_by
from interventions.recording import Recording

_NAME = "mechdiag_rows"


class PatternRows(NamedTuple):
    """Rows of weights that stand in for those of single heads at single tokens."""

    slot: Int[Tensor, "edit"]
    """place of the token in the padded groups"""
    head: Int[Tensor, "edit"]
    on_clean: Float[Tensor, "edit key"]
    """on the clean keys before the token's branch"""
    on_own: Float[Tensor, "edit width"]
    """on the tokens of its branch"""


@dataclass
class RowAttention:
    """What the tokens of one forward pass attend to: a branch's own tokens so far, and its prompt's clean keys before it."""

    recording: Recording
    slot: Int[Tensor, "token"]
    """place of each token in the padded groups: (group · size + branch) · width + place in the branch"""
    group_prompt: Int[Tensor, "group"]
    prompts: Int[np.ndarray, "group"]
    """the same on the CPU"""
    start: Int[Tensor, "group slot"]
    """position of the first token of each slot's branch: clean keys end there"""
    position: Int[Tensor, "group slot"]
    width: int
    """slots of a branch"""
    n_clean: int
    windows: list[int | None]
    """sliding window of each block, None: it sees all"""
    layer: int = -1
    """the block that is running: set by the cache as it takes the rows' keys"""
    patterns: dict[int, PatternRows] = field(default_factory=dict)
    """weights that were edited, by block"""
    masks: dict[int | None, Tensor] = field(default_factory=dict)
    """`hidden` of each window, formed once"""
    elsewhere: dict[torch.device, "RowAttention"] = field(default_factory=dict)
    """the same on other devices that blocks are on"""

    def on(self, device: torch.device) -> "RowAttention":
        """The same on the device of the block that is running."""
        if device == self.slot.device:
            return self
        if device not in self.elsewhere:
            there = {name: getattr(self, name).to(device) for name in ("slot", "group_prompt", "start", "position")}
            patterns = {layer: PatternRows(*(x.to(device) for x in each)) for layer, each in self.patterns.items()}
            self.elsewhere[device] = replace(self, **there, patterns=patterns, masks={}, elsewhere={})
        self.elsewhere[device].layer = self.layer
        return self.elsewhere[device]

    def hidden(self, window: int | None) -> Tensor:
        """Which clean keys, then which of its branch, a slot must not see: `[group, 1, slot, key]`."""
        if window not in self.masks:
            key, place = (torch.arange(n, device=self.position.device) for n in (self.n_clean, self.width))
            outside = key >= self.start[:, :, None]
            later = place > place[:, None]
            if window is not None:
                outside |= key <= self.position[:, :, None] - window
                later |= place <= place[:, None] - window
            own = later.repeat(self.position.shape[1] // self.width, 1).expand(len(outside), -1, -1)
            self.masks[window] = torch.cat([outside, own], dim=2)[:, None]
        return self.masks[window]

    def attend(
        self,
        query: Float[Tensor, "head token d_head"],
        key: Float[Tensor, "kv_head token d_head"],
        value: Float[Tensor, "kv_head token d_value"],
        scaling: float,
        softcap: float | None,
    ) -> Float[Tensor, "token head d_value"]:
        """softmax over clean keys before the branch and its own keys so far, a group of branches of one prompt at a time."""
        (n_group, n_slot), n_kv, width = self.position.shape, key.shape[0], self.width
        repeats, n_branch = query.shape[0] // n_kv, n_slot // width

        def grouped(x: Tensor) -> Tensor:
            padded = x.new_zeros(x.shape[0], n_group * n_slot, x.shape[2]).index_copy(1, self.slot, x)
            return padded.view(x.shape[0], n_group, n_slot, -1).transpose(0, 1)  # [group, head, slot, d_head]

        def by_branch(x: Tensor) -> Tensor:
            return grouped(x).reshape(n_group, n_kv, -1, n_branch, width, x.shape[2])

        def ungrouped(x: Tensor) -> Tensor:
            return x.reshape(n_group, n_kv * repeats, n_slot, -1).permute(0, 2, 1, 3).flatten(0, 1)[self.slot]

        clean_keys, clean_values = self.recording.clean_keys(self.layer, self.prompts, self.group_prompt, self.n_clean)
        query = query * scaling  # here and not on the scores, of which there are more
        q = grouped(query).reshape(n_group, n_kv, repeats * n_slot, -1)
        scores = (q @ clean_keys.transpose(-1, -2)).view(n_group, n_kv * repeats, n_slot, self.n_clean)
        if width == 1:
            own = (query.view(n_kv, repeats, *query.shape[1:]) * key[:, None]).sum(-1).flatten(0, 1)
            own = grouped(own[..., None])
        else:
            own = by_branch(query) @ by_branch(key).transpose(-1, -2)
        scores = torch.cat([scores, own.reshape(n_group, n_kv * repeats, n_slot, width)], dim=-1)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores.masked_fill_(self.hidden(self.windows[self.layer]), float("-inf"))
        weights = scores.softmax(-1, dtype=torch.promote_types(torch.float32, query.dtype)).to(query.dtype)
        if (edit := self.patterns.get(self.layer)) is not None:
            at = edit.slot // n_slot, edit.head, edit.slot % n_slot
            weights = weights.index_put(at, torch.cat([edit.on_clean, edit.on_own], dim=1).to(weights.dtype))
        seen = weights[..., : self.n_clean].reshape(n_group, n_kv, repeats * n_slot, self.n_clean) @ clean_values
        on_own = weights[..., self.n_clean :]
        if width == 1:
            return ungrouped(seen) + ungrouped(on_own) * value.repeat_interleave(repeats, dim=0).transpose(0, 1)
        on_own = on_own.reshape(n_group, n_kv, repeats, n_branch, width, width)
        return ungrouped(seen) + ungrouped(on_own @ by_branch(value))


_ACTIVE: ContextVar[RowAttention | None] = ContextVar("rows that are being replayed", default=None)


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
    rows = _ACTIVE.get()
    if rows is None:
        raise ModelError(_MEASURING)
    return rows.on(query.device).attend(query[0], key[0], value[0], scale, softcap)[None], None


_MEASURING = "another thread began to measure on this model during this forward pass; run the pass again"


def _mask(*_: Any, **__: Any) -> None:
    """Rows need no mask: what they see is for `RowAttention` to say. A pass of another thread must not go on without one."""
    if _ACTIVE.get() is None:
        raise ModelError(_MEASURING)


ALL_ATTENTION_FUNCTIONS.register(_NAME, _forward)
ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, _mask)


def attending(rows: RowAttention) -> AbstractContextManager[None]:
    """Let the model's blocks attend as `rows` say."""
    return attending_by(rows.recording.model.hf, _NAME, _ACTIVE, rows)

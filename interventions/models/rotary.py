"""Rotary embeddings whose frequencies depend on how long a pass is: dynamic NTK scaling and LongRoPE.

Such a model gives a prompt other activations alone than in a batch with a longer one, and dynamic scaling also
remembers the longest pass so far. What counts here is what a fresh model gives each prompt alone.
"""

from typing import Any

import torch
from torch import nn

_KINDS = ("dynamic", "longrope")


def _kinds(module: nn.Module) -> dict[str | None, str]:
    """The kind of rotary embedding for each kind of block that uses it (None: all blocks), where it depends on length."""
    kind = vars(module).get("rope_type")
    kinds = kind if isinstance(kind, dict) else {None: kind}
    return {k: v for k, v in kinds.items() if isinstance(v, str) and any(word in v for word in _KINDS)}


def is_moving(module: nn.Module) -> bool:
    """Whether this is a rotary embedding whose frequencies depend on the length of a pass."""
    return bool(_kinds(module))


def depends_on_length(hf: nn.Module, longest: int) -> str | None:
    """The kind of rotary embedding whose frequencies depend on length for prompts of up to `longest` tokens, or None."""
    for module in hf.modules():
        for layer_type, kind in _kinds(module).items():
            if longest > _unscaled_length(module, layer_type):
                return kind
    return None


def _unscaled_length(module: nn.Module, layer_type: str | None) -> int:
    """The number of tokens up to which the frequencies are the same for all lengths."""
    config: Any = vars(module).get("config")
    settings = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    settings = settings.get(layer_type, settings) if layer_type is not None else settings
    known = [
        settings.get("original_max_position_embeddings"),
        getattr(config, "original_max_position_embeddings", None),
        vars(module).get("original_max_seq_len"),
    ]
    return min((int(n) for n in known if n), default=0)


@torch.no_grad()
def forget_longer_passes(hf: nn.Module) -> None:
    """Give dynamic rotary embeddings their own frequencies again: after a longer pass they may keep that one's."""
    for module in hf.modules():
        for layer_type in _kinds(module) if "rope_type" in vars(module) else ():
            prefix = "" if layer_type is None else f"{layer_type}_"
            original = getattr(module, f"{prefix}original_inv_freq", None)
            if original is not None:
                getattr(module, f"{prefix}inv_freq").copy_(original)
            for name in {"max_seq_len_cached", f"{prefix}max_seq_len_cached", f"{layer_type}_max_seq_len_cached"}:
                if name in vars(module):
                    setattr(module, name, module.original_max_seq_len)

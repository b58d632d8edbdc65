"""One causal language model, however it is wrapped: Hugging Face, TransformerLens `TransformerBridge`, nnsight."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from interventions.errors import ModelError

WRAPPED = "_original_component"


@dataclass(eq=False)
class CausalModel:
    """A causal language model and what the engine must know of it.

    Build it with `wrap` (a live object) or `load_model` (a name). The wrapped object is used, never copied: a
    TransformerBridge or nnsight model keeps its hooks, and they fire during replay too.
    """

    hf: Any
    """the Hugging Face module that computes; inside a bridge its blocks are the bridge's"""
    handle: Any
    """what the user gave: the module itself, a TransformerBridge or an nnsight model"""
    wrapper: str
    """`huggingface`, `transformer_lens` or `nnsight`"""
    name: str
    """for the record: a packaged name, folder, hub id or class name"""
    tokenizer: Any = None
    """a Hugging Face tokenizer, or None"""
    note: str | None = None
    """what a reader of the numbers must know of the weights, e.g. that they are dequantised"""
    counterpart_of: str | None = None
    """`weights_hash` of the model whose weights these are under another norm (see `layernorm_counterpart`), or None"""
    replay_reach: dict[tuple[str, int], dict[int, int]] = field(default_factory=dict)
    """replay found exact: (point, longest branch, rounded up to a power of 2) -> first block run -> longest position checked"""
    replay_delta: float = 0.0
    """largest logit difference seen between replay and full forwards"""
    replay_attention: str = "grouped"
    """how replayed rows attend (see `replay`): the way that is tried first, which `replay_reach` speaks of"""
    replay_otherwise: dict[tuple[str, int, int], tuple[int, str | None, str]] = field(default_factory=dict)
    """where that way is not exact: (point, longest branch, first block run) -> longest position checked, the other way where
    that is exact, and why the first, or neither, is"""

    @cached_property
    def config(self) -> Any:
        """The text model's configuration."""
        return self.hf.config.get_text_config()

    @cached_property
    def _base_and_blocks(self) -> tuple[nn.Module, list[nn.Module]]:
        n = self.config.num_hidden_layers
        for module in self.hf.base_model.modules():
            for child in module.children():
                if isinstance(child, nn.ModuleList) and len(child) == n:
                    return module, list(child)
        raise ModelError(f"no list of {n} blocks found in {type(self.hf).__name__}; known: decoder-only causal models")

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, in order."""
        return self._base_and_blocks[1]

    @property
    def base(self) -> nn.Module:
        """The module that owns the blocks: the model without its unembedding, final norm included."""
        return self._base_and_blocks[0]

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def d_model(self) -> int:
        return self.config.hidden_size

    @property
    def vocab_size(self) -> int:
        """Number of logits."""
        return self.hf.get_output_embeddings().weight.shape[0]

    @property
    def device(self) -> torch.device:
        return next(self.hf.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.hf.parameters()).dtype

    @cached_property
    def norm_kind(self) -> str:
        """`RMSNorm` or `LayerNorm`: what the blocks read the stream through."""
        kinds = {type(m).__name__ for m in self.base.modules()}
        return "RMSNorm" if any("RMSNorm" in kind for kind in kinds) else "LayerNorm"

    @cached_property
    def weights_hash(self) -> str:
        """SHA-256 over names, shapes, dtypes and bytes of the parameters; the same however the model is wrapped.

        Names are those outside a bridge. The unembedding counts whether tied or not, its bias unless it is zero: a
        bridge may untie the one and add the other.
        """
        head = self.hf.get_output_embeddings()
        values = dict(canonical_parameters(self.base)) | {"unembed.weight": head.weight}
        if getattr(head, "bias", None) is not None and bool(head.bias.any()):
            values["unembed.bias"] = head.bias
        digest = hashlib.sha256()
        for name, value in sorted(values.items()):
            digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def canonical_parameters(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters under the names they have outside a bridge, whose components hold the module they stand for and copies."""
    children = dict(module.named_children())
    if WRAPPED in children:
        yield from canonical_parameters(children[WRAPPED], prefix)
        return
    for name, value in module.named_parameters(recurse=False):
        yield prefix + name, value
    for name, child in children.items():
        yield from canonical_parameters(child, f"{prefix}{name}.")


@contextmanager
def forward_replaced(module: nn.Module, forward: Any):
    """Let `module` compute `forward` instead of its own.

    A bridge and nnsight put a `forward` of their own on the instance, so what stands there is put back, not deleted.
    """
    own = module.__dict__.get("forward")
    try:  # first, so that Ctrl-C leaves nothing behind wherever it comes
        object.__setattr__(module, "forward", forward)
        yield
    finally:
        if own is None:
            module.__dict__.pop("forward", None)
        else:
            object.__setattr__(module, "forward", own)


def wrap(model: Any, tokenizer: Any = None, name: str | None = None, note: str | None = None) -> CausalModel:
    """A `CausalModel` around a Hugging Face model, a `TransformerBridge`, an nnsight model, or a `CausalModel` (returned).

    Nothing is copied or changed, but for `eval()`. Raises `ModelError` for anything else, for weights that are not
    loaded, and for an attention implementation that takes no 4-D mask.
    """
    if isinstance(model, CausalModel):
        return model
    origins = {cls.__module__.split(".")[0] for cls in type(model).__mro__}
    if "nnsight" in origins:
        wrapper, hf = "nnsight", model._module
    elif "transformer_lens" in origins:
        wrapper, hf = "transformer_lens", getattr(model, "original_model", None)
    else:
        wrapper, hf = "huggingface", model
    if not isinstance(hf, PreTrainedModel):
        raise ModelError(
            f"cannot use a {type(model).__name__}; expected a Hugging Face causal LM, a TransformerBridge or an nnsight model"
        )
    if hf.get_output_embeddings() is None:
        raise ModelError(f"{type(hf).__name__} has no unembedding; load it with AutoModelForCausalLM")
    if next(hf.parameters()).device.type == "meta":
        raise ModelError("the model's weights are not loaded; load them first (nnsight: dispatch=True)")
    attention = getattr(hf.config, "_attn_implementation", None)
    if attention not in ("eager", "sdpa", None):
        raise ModelError(
            f"attention {attention!r} takes no 4-D mask; load the model with attn_implementation='sdpa' or 'eager'"
        )
    hf.eval()
    tokenizer = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
    return CausalModel(hf, model, wrapper, name or hf.config._name_or_path or type(hf).__name__, tokenizer, note)

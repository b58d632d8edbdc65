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

from interventions.blocks import find_blocks
from interventions.causality import Shapes, check_causal
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
    shapes: Shapes | None = None
    """what `check_causal` saw of a forward pass; None for a model wrapped inside an nnsight trace, which cannot be asked"""
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
        """By structure alone; whether these blocks are what a forward pass runs, `check_causal` finds out."""
        return find_blocks(self.hf, getattr(self.config, "num_hidden_layers", None))

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
        return self.config.hidden_size if self.shapes is None else self.shapes.width

    @property
    def vocab_size(self) -> int:
        """Number of logits."""
        return self.hf.get_output_embeddings().weight.shape[0] if self.shapes is None else self.shapes.n_logits

    @property
    def device(self) -> torch.device:
        return next(self.hf.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.hf.parameters()).dtype

    @property
    def stream_dtype(self) -> torch.dtype:
        """What activations at a block are in."""
        return self.dtype if self.shapes is None else self.shapes.dtype

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

    A compiled model stands for its original, a PEFT model for the model with its active adapters. Nothing is copied or
    changed, but for `eval()`. Raises `ModelError` for anything else, for weights that are not loaded, for an attention
    implementation that takes no 4-D mask, and for a model that is not causal (see `check_causal`; asked once a model).
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
    # A compiled model gives way to its original: hooks do not fire in compiled code.
    hf = _without_adapters(getattr(hf, "_orig_mod", hf))
    if not isinstance(hf, PreTrainedModel):
        raise ModelError(
            f"cannot use a {type(model).__name__}; expected a Hugging Face causal LM, a TransformerBridge or an nnsight model"
        )
    _check(hf)
    hf.eval()
    tokenizer = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
    name = name or " + ".join([hf.config._name_or_path or type(hf).__name__, *active_adapters(hf)])
    found = CausalModel(hf, model, wrapper, name, tokenizer, note)
    in_a_trace = wrapper == "nnsight" and model.interleaver.interleaving  # where it cannot be asked anything else
    if not in_a_trace:
        found.shapes = check_causal(found)
    return found


def _without_adapters(model: Any) -> Any:
    """The Hugging Face model within a PEFT model, its adapters in place.

    Raises `ModelError` for adapters that put tokens before the prompt, which no module of the model shows.
    """
    if not any(cls.__module__.split(".")[0] == "peft" for cls in type(model).__mro__):
        return model
    for name in model.active_adapters:
        if model.peft_config[name].is_prompt_learning:
            raise ModelError(
                f"adapter {name!r} puts tokens of its own before the prompt; expected one that changes weights (LoRA and others)"
            )
    return model.get_base_model()


def active_adapters(hf: nn.Module) -> list[str]:
    """Names of the PEFT adapters that a forward pass applies now; switching one on or off changes no parameter."""
    layers: list[Any] = [module for module in hf.modules() if getattr(module, "disable_adapters", True) is False]
    return list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))


def _check(hf: PreTrainedModel) -> None:
    """Raise `ModelError` for what can be seen to be no use without running the model."""
    kind = type(hf).__name__
    if getattr(hf.config, "is_encoder_decoder", False):
        raise ModelError(f"cannot use {kind}: an encoder-decoder; expected a decoder-only causal model")
    if hf.get_output_embeddings() is None:
        raise ModelError(f"{kind} has no unembedding; load it with AutoModelForCausalLM")
    if next(hf.parameters()).device.type == "meta":
        raise ModelError("the model's weights are not loaded; load them first (nnsight: dispatch=True)")
    attention = getattr(hf.config, "_attn_implementation", None)
    if attention not in ("eager", "sdpa", None):
        raise ModelError(
            f"attention {attention!r} takes no 4-D mask; load the model with attn_implementation='sdpa' or 'eager'"
        )
    if any(m.config.return_dict is False for m in hf.modules() if isinstance(m, PreTrainedModel)):
        raise ModelError(f"cannot use {kind} with config.return_dict=False; set model.config.return_dict = True")
    compiled = [n for n, m in hf.named_modules() if hasattr(m, "_orig_mod") or m._compiled_call_impl is not None]
    if compiled:
        raise ModelError(
            f"{compiled[0] or 'the model'} is compiled in place, and hooks do not fire in compiled code; pass the model as it "
            "was before torch.compile"
        )

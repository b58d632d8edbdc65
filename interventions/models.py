"""One causal language model, however it is wrapped: Hugging Face, TransformerLens `TransformerBridge`, nnsight."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from interventions.blocks import find_blocks
from interventions.causality import Shapes, check_causal
from interventions.errors import ModelError
from interventions.exclusive import holding
from interventions.fingerprint import fingerprint

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
    """what `check_causal` saw of a forward pass; None for a model wrapped inside an nnsight trace, where no pass can run"""
    replay_attention: str = "grouped"
    """how replayed rows attend (see `replay`): the way that is tried first"""
    certificates: Any = field(default_factory=dict, repr=False)
    """fingerprint -> `certificates.Certificates`: where replay was found exact while the model was so"""
    warned: set[str] = field(default_factory=set, repr=False)
    """reasons for full forward passes that a warning has named"""
    _hashed: tuple[int, str, str | None] | None = field(default=None, repr=False)

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

    @property
    def weights_hash(self) -> str:
        """SHA-256 over names, shapes, dtypes and bytes of the parameters; the same however the model is wrapped.

        Names are those outside a bridge. The unembedding counts whether tied or not, its bias unless it is zero: a
        bridge may untie the one and add the other. Formed anew when the model's fingerprint has changed; `hash_weights`
        forms it anew in any case.
        """
        if self._hashed is None or self._hashed[0] != fingerprint(self.hf).weights:
            return self.hash_weights()
        return self._hashed[1]

    def hash_weights(self) -> str:
        """`weights_hash` of the weights as they are now, every byte of them read."""
        head = self.hf.get_output_embeddings()
        values = dict(canonical_tensors(self.base)) | {"unembed.weight": _as_tensor(head.weight)}
        bias = _as_tensor(getattr(head, "bias", None))
        if bias is not None and bool(bias.any()):
            values["unembed.bias"] = bias
        digest, absent = hashlib.sha256(), 0
        for name, value in sorted(values.items()):
            if value is None or value.device.type == "meta":
                absent += 1
                continue
            digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
            for part in _plain_parts(value):
                digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        covers = f"{len(values) - absent} of {len(values)} tensors: the others lie on disk" if absent else None
        self._hashed = fingerprint(self.hf).weights, digest.hexdigest(), covers
        return self._hashed[1]

    @property
    def weights_covered(self) -> str | None:
        """How many tensors `weights_hash` speaks of where it is not all of them, else None."""
        _ = self.weights_hash
        assert self._hashed is not None
        return self._hashed[2]


def canonical_tensors(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.Tensor | None]]:
    """Parameters under the names they have outside a bridge, whose components hold the module they stand for and copies.

    Weights packed by dynamic quantization and weights that accelerate keeps elsewhere are taken from where they are.
    """
    children = dict(module.named_children())
    if WRAPPED in children:
        yield from canonical_tensors(children[WRAPPED], prefix)
        return
    elsewhere = getattr(getattr(module, "_hf_hook", None), "weights_map", None) or {}
    for name, value in module.named_parameters(recurse=False):
        yield prefix + name, elsewhere.get(name, value) if value.device.type == "meta" else value
    if callable(getattr(module, "weight", None)):  # packed
        yield from ((prefix + name, _as_tensor(getattr(module, name, None))) for name in ("weight", "bias"))
        return
    for name, child in children.items():
        yield from canonical_tensors(child, f"{prefix}{name}.")


def _as_tensor(value: Any) -> torch.Tensor | None:
    """A weight, or what a quantized layer's method of that name gives."""
    return value if value is None or isinstance(value, torch.Tensor) else value()


def _plain_parts(value: Any) -> list[torch.Tensor]:
    """The plain tensors that a quantized one is made of; a plain tensor itself."""
    if hasattr(value, "__tensor_flatten__"):
        return [part for name in value.__tensor_flatten__()[0] for part in _plain_parts(getattr(value, name))]
    if not value.is_quantized:
        return [value]
    if value.qscheme() in (torch.per_channel_affine, torch.per_channel_affine_float_qparams):
        return [value.int_repr(), value.q_per_channel_scales(), value.q_per_channel_zero_points()]
    return [value.int_repr(), torch.tensor([value.q_scale(), value.q_zero_point()], dtype=torch.float64)]


def wrap(model: Any, tokenizer: Any = None, name: str | None = None, note: str | None = None) -> CausalModel:
    """A `CausalModel` around a Hugging Face model, a `TransformerBridge`, an nnsight model, or a `CausalModel` (returned).

    Of a compiled model its original is used, of a PEFT model the model with its active adapters. Nothing is copied or
    changed. Raises `ModelError` for anything else, for weights that are not loaded, for an attention implementation that
    takes no 4-D mask, and for a model that is not causal (see `check_causal`; asked once a model).
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
    tokenizer = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
    name = name or " + ".join([hf.config._name_or_path or type(hf).__name__, *active_adapters(hf)])
    found = CausalModel(hf, model, wrapper, name, tokenizer, note)
    with holding(found):  # another thread's measurement changes the attention for as long as it takes
        _check(hf)
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
    compiled = [n for n, m in hf.named_modules() if hasattr(m, "_orig_mod") or m._compiled_call_impl is not None]
    if compiled:
        raise ModelError(
            f"{compiled[0] or 'the model'} is compiled in place, and hooks do not fire in compiled code; pass the model as it "
            "was before torch.compile"
        )

"""`CausalModel`: a wrapped causal language model, and what the engine must know of it."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn

from interventions.models.blocks import find_blocks
from interventions.models.fingerprint import fingerprint

WRAPPED = "_original_component"


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


class Shapes(NamedTuple):
    """What a forward pass showed."""

    width: int
    """numbers in the residual stream at a token"""
    dtype: torch.dtype
    """of the residual stream; Mamba keeps it in float32 whatever its weights are in"""
    n_logits: int
    as_tuple: bool
    """whether blocks hand on a tuple"""


class Made(NamedTuple):
    """How a model came about, for another process that is to make the same one."""

    how: tuple[Any, ...]
    """`("loaded", name, dtype, trust_remote_code)` or `("untrained", model, seed)`"""
    as_made: Any
    """its fingerprint then: a model that was changed since is not made again by this"""


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
    remote: bool | str = False
    """where passes run: False here; else as nnsight's `remote`: True on NDIF, a server's address, or "local", a rehearsal"""
    replay_attention: str = "grouped"
    """how replayed rows attend (see `replay`): the way that is tried first"""
    certificates: Any = field(default_factory=dict, repr=False)
    """fingerprint -> `certificates.Certificates`: where replay was found exact while the model was so"""
    warned: set[str] = field(default_factory=set, repr=False)
    """reasons for full forward passes that a warning has named"""
    made: "Made | None" = field(default=None, repr=False)
    """how to make it again elsewhere; None for a live object"""
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

    def handed_on(self, hidden: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor]:
        """A residual stream as a block hands it on: by itself, or as a tuple (transformers 4, some models of 5)."""
        return (hidden,) if self.shapes is not None and self.shapes.as_tuple else hidden

    @property
    def device(self) -> torch.device:
        """Where tensors of a recording are; of a remote model, on the CPU."""
        if self.remote:
            return torch.device("cpu")
        return next(self.hf.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        if self.remote and self.shapes is not None:  # what is loaded here says nothing of the weights there
            return self.shapes.dtype
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
        forms it anew in any case. Of a remote model: its name and revision, as nothing is known of its bytes.
        """
        if self.remote:
            return self._revision
        if self._hashed is None or self._hashed[0] != fingerprint(self.hf).weights:
            return self.hash_weights()
        return self._hashed[1]

    def hash_weights(self) -> str:
        """`weights_hash` of the weights as they are now, every byte of them read."""
        if self.remote:
            return self._revision
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
        if self.remote:
            return "none of the tensors: the model runs remotely, and this is its revision"
        _ = self.weights_hash
        assert self._hashed is not None
        return self._hashed[2]

    @property
    def _revision(self) -> str:
        """Name and revision of a remote model: the commit of its configuration where that is known."""
        commit = getattr(self.hf.config, "_commit_hash", None) or getattr(self.handle, "revision", None)
        return f"{self.name}@{commit or 'unknown revision'}"

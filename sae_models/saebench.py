"""Our SAEs as SAEBench takes them (arXiv:2503.09532): `run_evals(…, selected_saes=[(name, SAEBenchSAE(sae, model_name="gpt2"))])`.

Its contract, read off its released code (it is not imported): `W_enc [d_in, d_sae]`, `W_dec [d_sae, d_in]` with rows of norm 1,
`b_enc`, `b_dec`, `encode`, `decode`, `forward`, `device`, `dtype`, `to`, `check_decoder_norms`, and a dataclass `cfg`, which it
changes and writes into its results.
"""

import copy
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_models.errors import SAEError
from sae_models.sae import SAE


@dataclass
class SAEBenchMetadata:
    """What sae-lens 6 asks of `cfg.metadata` when it streams activations; None where it has its own default."""

    model_name: str
    hook_name: str
    prepend_bos: bool
    context_size: int | None = None
    hook_head_index: int | None = None
    model_class_name: str | None = None
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)
    dataset_path: str | None = None
    dataset_trust_remote_code: bool | None = None
    disable_concat_sequences: bool | None = None
    exclude_special_tokens: bool | None = None
    sequence_separator_token: str | None = None
    seqpos_slice: tuple[int | None, ...] | None = None
    sae_lens_version: str | None = None
    sae_lens_training_version: str | None = None
    neuronpedia_id: str | None = None


@dataclass
class SAEBenchConfig:
    """The fields of SAEBench's `CustomSAEConfig`, under its names."""

    model_name: str
    """as TransformerLens knows it: SAEBench loads the model by it"""
    d_in: int
    d_sae: int
    hook_layer: int
    hook_name: str
    metadata: SAEBenchMetadata
    architecture: str
    """of the score and the selector, `inner_batchtopk`; SAEBench groups its plots by it"""
    dtype: str
    device: str
    context_size: int | None = None
    hook_head_index: int | None = None
    apply_b_dec_to_input: bool | None = None
    finetuning_scaling_factor: bool | None = None
    activation_fn_str: str = ""
    activation_fn_kwargs: dict[str, Any] = field(default_factory=dict)
    prepend_bos: bool = True
    normalize_activations: str = "none"
    """what SAEBench is to do to activations: nothing, `encode` does it"""
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)
    dataset_path: str = ""
    dataset_trust_remote_code: bool = True
    seqpos_slice: tuple[int | None, ...] = (None,)
    training_tokens: int = -100_000
    sae_lens_training_version: str | None = None
    sae_lens_version: str | None = None
    neuronpedia_id: str | None = None


class SAEBenchSAE(nn.Module):
    """An SAE with what SAEBench asks for; its weights are copies.

        encode(x) = ‖d_i‖·z_i,    W_dec = d_i/‖d_i‖,    decode(z) = z W_dec + b_dec

    Decoder rows are brought to norm 1, which SAEBench expects, and latents and encoder rows multiplied by what they had: x̂ stays.
    Inputs rescaled by one factor fit, b_dec then being offset(x). Raises `SAEError` where the offset depends on x (inputs
    normalised one by one): `decode` sees no x; and for an SAE that does not say to which block of which model it belongs.
    model_name: where TransformerLens has another name for the model than the SAE. prepend_bos: as it was trained.
    """

    norm: Tensor
    """‖d_i‖ as they were, `[d_sae]`"""

    def __init__(
        self,
        sae: SAE,
        *,
        model_name: str | None = None,
        context_size: int | None = None,
        prepend_bos: bool = True,
    ):
        super().__init__()
        if sae.normalise.kind not in ("none", "factor"):
            raise SAEError(
                f"an SAE that normalises each input ({sae.normalise.kind}) has an offset that depends on x, and SAEBench decodes "
                "latents alone; evaluate it with diagnostics instead"
            )
        name, hook_name = model_name or sae.model_name, sae.hook_name
        block = re.match(r"blocks\.(\d+)\.", hook_name or "")
        if name is None or hook_name is None or block is None:
            raise SAEError(
                f"model {name!r}, site {hook_name!r}: SAEBench must know both; set sae.model_name, and sae.hook_name to a name "
                "such as 'blocks.15.hook_resid_post'"
            )
        self.sae = copy.deepcopy(sae).requires_grad_(False)
        with torch.no_grad():
            norm = sae.W_dec.norm(dim=1)
            norm = torch.where(norm > 0, norm, 1.0).to(sae.W_dec)
            rows = sae.encoder_rows()  # raises where the encoder is known as a function only
            b_enc = torch.zeros_like(norm) if sae.score.b_enc is None else sae.score.b_enc
            weights = (rows * norm[:, None]).T, sae.W_dec / norm[:, None], b_enc * norm
            self.W_enc, self.W_dec, self.b_enc = (nn.Parameter(x.clone(), requires_grad=False) for x in weights)
            self.b_dec = nn.Parameter(sae.offset(torch.zeros_like(sae.b_dec)).clone(), requires_grad=False)
        self.register_buffer("norm", norm)
        self.cfg = SAEBenchConfig(
            model_name=name,
            d_in=sae.d_model,
            d_sae=sae.d_sae,
            hook_layer=int(block[1]),
            hook_name=hook_name,
            metadata=SAEBenchMetadata(name, hook_name, prepend_bos, context_size),
            architecture=f"{sae.score.kind}_{sae.selector.kind}",
            dtype=str(sae.dtype).removeprefix("torch."),
            device=str(sae.device),
            context_size=context_size,
            apply_b_dec_to_input=sae.subtract_b_dec,
            prepend_bos=prepend_bos,
        )

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return self.W_dec.dtype

    def to(self, *args: Any, **kwargs: Any) -> "SAEBenchSAE":
        """As of any module; `cfg` says the same."""
        super().to(*args, **kwargs)
        self.cfg.device, self.cfg.dtype = str(self.device), str(self.dtype).removeprefix("torch.")
        return self

    def encode(self, x: Float[Tensor, "*row d_in"]) -> Float[Tensor, "*row d_sae"]:
        """Latents, each as long as its part of x̂."""
        return self.sae.encode(x) * self.norm

    def decode(self, z: Float[Tensor, "*row d_sae"]) -> Float[Tensor, "*row d_in"]:
        """z W_dec + b_dec."""
        return z @ self.W_dec + self.b_dec

    def forward(self, x: Float[Tensor, "*row d_in"]) -> Float[Tensor, "*row d_in"]:
        """x̂."""
        return self.decode(self.encode(x))

    def check_decoder_norms(self) -> bool:
        """Whether every decoder row has norm 1, to 1e-5 (1e-2 in half precision). False where a row is zero."""
        allowed = 1e-2 if self.dtype in (torch.bfloat16, torch.float16) else 1e-5
        return bool(((self.W_dec.norm(dim=1) - 1).abs() <= allowed).all())

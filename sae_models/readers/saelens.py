"""SAELens folders: `cfg.json` and `sae_weights.safetensors`, of versions before 6 (flat settings) and from 6 on (metadata).

z = select(W_encᵀ (u − b_dec) + b_enc),   x̂ = z W_dec + b_dec, un-normalised;   u: x, normalised as `cfg.json` says
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sae_models.errors import BelongingError, CheckpointError
from sae_models.normalise import normalisation
from sae_models.readers.stored import Stored
from sae_models.readers.strict import Options, Tensors, setting
from sae_models.sae import SAE
from sae_models.saving import CONFIG, WEIGHTS
from sae_models.scores import Inner
from sae_models.selectors import BatchTopK, Gate, JumpReLU, ReLU, Selector, TopK

ARCHITECTURES = ("standard", "topk", "jumprelu", "gated", "batchtopk", "matryoshka_batchtopk")
"""Those that can be read; the last two as training saves them (for inference SAELens saves them as jumprelu)."""
_NORMALISATIONS = {"none": "none", "layer_norm": "layer_norm", "constant_norm_rescale": "constant_norm"}
_RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}
_METADATA = (
    "context_size",
    "prepend_bos",
    "dataset_path",
    "model_from_pretrained_kwargs",
    "neuronpedia_id",
    "sae_lens_version",
)


def recognises(stored: Stored) -> bool:
    """Its file names."""
    return stored.path.name == WEIGHTS and bool(stored.config)


def read(stored: Stored, options: Options) -> SAE:
    """One of `ARCHITECTURES`, with latents as SAELens gives them for plain inputs; where inputs are normalised ours carry the
    factor that it keeps for decoding. Options: model_name, hook_name, where the file does not say them; norm_scaling_factor.

    rescale_acts_by_decoder_norm is folded into encoder and decoder. An SAE trained on scaled inputs
    (`expected_average_only_in`, not folded) is read where `norm_scaling_factor` gives the scale, which is then folded in.
    Raises `CheckpointError` for transcoders and other architectures, whitened inputs, finetuning factors, and activations other
    than relu and topk; `BelongingError` for SAEs inside attention heads.
    """
    config = {_RENAMED.get(key, key): value for key, value in stored.config.items()}
    metadata = {key: config[key] for key in ("model_name", "hook_name", *_METADATA) if key in config}
    metadata |= config.get("metadata") or {}
    architecture = _architecture(config)
    _refuse(config, metadata, architecture)
    values = dict(stored.values)
    for key in ("scaling_factor", "finetuning_scaling_factor"):  # old versions wrote ones where they did not use it
        if _not_one(values.pop(key, None)):
            raise CheckpointError(f"latents are multiplied by {key} before decoding; expected an SAE without")
    tensors = Tensors(values)
    W_enc, W_dec = tensors.pair("W_enc", "W_dec", encoder_columns=True)
    d_sae, d_model = W_dec.shape
    if (setting(config, "d_in"), setting(config, "d_sae")) != (d_model, d_sae):
        raise CheckpointError(
            f"W_dec has shape {(d_sae, d_model)}; expected {(config['d_sae'], config['d_in'])} from {CONFIG}"
        )
    b_dec = tensors.take("b_dec", d_model)
    b_enc = None if architecture == "gated" else tensors.take("b_enc", d_sae)
    selector = _selector(architecture, tensors, config, d_sae)
    tensors.finish(f"architecture {architecture}")

    normalise = str(config.get("normalize_activations") or "none").lower()
    in_training = isinstance(selector, BatchTopK)
    # a setting of TopK and its kin alone: SAELens ignores it where another architecture's file still has it
    rescale = isinstance(selector, (TopK, BatchTopK)) and config.get("rescale_acts_by_decoder_norm", in_training)
    if normalise in ("expected_average_only_in", "true"):
        why = "its inputs were scaled to an average norm (expected_average_only_in), by a factor that the file does not say"
        factor = float(options.need("norm_scaling_factor", None, why))
        if not factor > 0:
            raise CheckpointError(f"norm_scaling_factor = {factor}; expected a positive number")
        W_enc, W_dec, b_dec, normalise = W_enc * factor, W_dec / factor, b_dec / factor, "none"
        if rescale and isinstance(selector, BatchTopK):
            selector.threshold /= factor
    normalise = "none" if normalise == "false" else normalise
    if normalise not in _NORMALISATIONS:
        raise CheckpointError(f"normalize_activations {normalise!r}; expected {', '.join(_NORMALISATIONS)}")
    if rescale:
        norm = W_dec.norm(dim=1).clamp(min=1e-8)
        assert b_enc is not None
        W_enc, b_enc, W_dec = W_enc * norm[:, None], b_enc * norm, W_dec / norm[:, None]
    model_name, hook_name = options.belongs(metadata.get("model_name"), metadata.get("hook_name"))
    return SAE(
        Inner(W_enc, b_enc),
        selector,
        W_dec,
        b_dec,
        normalise=normalisation(_NORMALISATIONS[normalise]),
        subtract_b_dec=bool(config.get("apply_b_dec_to_input", True)),
        metadata={"layout": "saelens"}
        | {key: value for key, value in metadata.items() if key not in ("model_name", "hook_name")},
        model_name=model_name,
        hook_name=hook_name,
    )


def _architecture(config: Mapping[str, Any]) -> str:
    architecture = config.get("architecture", "standard")
    activation, settings = config.get("activation_fn") or "relu", config.get("activation_fn_kwargs") or {}
    if activation == "topk" and architecture in ("standard", "topk"):
        architecture = "topk"
    elif activation != "relu":
        raise CheckpointError(f"activation_fn {activation!r} of architecture {architecture!r}; expected relu or topk")
    others = {key: value for key, value in settings.items() if key != "k" and value}
    if others:
        raise CheckpointError(f"activation_fn_kwargs {others}; expected k alone")
    return architecture


def _refuse(config: Mapping[str, Any], metadata: Mapping[str, Any], architecture: str) -> None:
    out = metadata.get("hook_name_out")
    if "transcoder" in architecture or "d_out" in config or out not in (None, metadata.get("hook_name")):
        raise CheckpointError(
            f"a transcoder (architecture {architecture!r}): it writes elsewhere than it reads; expected an SAE"
        )
    if architecture not in ARCHITECTURES:
        raise CheckpointError(f"architecture {architecture!r}; expected one of {', '.join(ARCHITECTURES)}")
    head = config.get("hook_head_index", metadata.get("hook_head_index"))
    if config.get("reshape_activations", "none") != "none" or head is not None:
        site = config.get("reshape_activations", "none") if head is None else f"head {head}"
        raise BelongingError(f"an SAE inside attention heads ({site}); expected one of the residual stream")


def _selector(architecture: str, tensors: Tensors, config: Mapping[str, Any], d_sae: int) -> Selector:
    if architecture == "topk":
        k = config.get("k") or (config.get("activation_fn_kwargs") or {}).get("k")
        return TopK(Options({}).whole("k", k, f"a topk SAE, and {CONFIG} does not say its k"))
    if architecture == "gated":
        return Gate(*(tensors.take(key, d_sae) for key in ("b_gate", "r_mag", "b_mag")))
    if architecture == "jumprelu":
        logarithm = "log_threshold" in tensors  # as early versions trained it
        return JumpReLU(tensors.take("log_threshold", d_sae).exp() if logarithm else tensors.take("threshold", d_sae))
    if architecture == "standard":
        return ReLU()
    return BatchTopK(setting(config, "k"), tensors.number("topk_threshold"))


def _not_one(scale: Tensor | None) -> bool:
    return scale is not None and not torch.allclose(scale, torch.ones_like(scale))

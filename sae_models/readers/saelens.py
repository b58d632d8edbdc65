"""SAELens folders: `cfg.json` and `sae_weights.safetensors`, of versions before 6 (flat settings) and from 6 on (metadata).

z = select(W_encᵀ (u − b_dec) + b_enc),   x̂ = z W_dec + b_dec, un-normalised;   u: x, normalised as `cfg.json` says
"""

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sae_models.errors import BelongingError, CheckpointError
from sae_models.gates import Gate, JumpReLU
from sae_models.normalise import CENTRED, normalisation
from sae_models.readers.stored import Stored
from sae_models.readers.strict import Options, Tensors, setting, shown, weights
from sae_models.sae import SAE
from sae_models.saving import CONFIG, WEIGHTS
from sae_models.scores import Inner
from sae_models.selectors import AbsTopK, BatchTopK, ReLU, Selector, TopK

ARCHITECTURES = ("standard", "topk", "abstopk", "jumprelu", "gated", "batchtopk", "matryoshka_batchtopk")
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
_CENTRED = "center_writing_weights"
_SAME_ACTIVATIONS = {
    *("fold_ln", "fold_value_biases", "center_unembed", "refactor_factored_attn_matrices", "default_prepend_bos"),
    *("default_padding_side", "dtype", "torch_dtype", "device", "device_map", "n_devices", "move_to_device", "n_ctx"),
    *("local_files_only", "trust_remote_code", "token", "cache_dir", "low_cpu_mem_usage", "attn_implementation"),
    *("first_n_layers", "tokenizer", "use_cache"),
}
"""What a model can be loaded with that leaves activations at every site here as they are, but for rounding."""


def recognises(stored: Stored) -> bool:
    """Its file names."""
    return stored.path.name == WEIGHTS and bool(stored.config)


def read(stored: Stored, options: Options) -> SAE:
    """One of `ARCHITECTURES`, with latents as SAELens gives them for plain inputs; where inputs are normalised ours carry the
    factor that it keeps for decoding. Options: model_name, hook_name, where the file does not say them; norm_scaling_factor;
    center_writing_weights.

    rescale_acts_by_decoder_norm is folded into encoder and decoder. An SAE trained on scaled inputs
    (`expected_average_only_in`, not folded) is read where `norm_scaling_factor` gives the scale, which is then folded in.
    An SAE of a model whose writing weights TransformerLens centred (`model_from_pretrained_kwargs`, or the option, which goes
    before it) reads x − mean(x) and adds mean(x) to x̂, so that the model's own activations can be given to it; of other
    settings that may change activations one warning says which.
    Raises `CheckpointError` for transcoders and other architectures, whitened inputs, finetuning factors, and activations other
    than relu and topk; `BelongingError` for SAEs inside attention heads.
    """
    config = {_RENAMED.get(key, key): value for key, value in stored.config.items()}
    metadata = {key: config[key] for key in ("model_name", "hook_name", *_METADATA) if key in config}
    metadata |= setting(config, "metadata", dict, type(None), default=None) or {}
    architecture = _architecture(config)
    _refuse(config, metadata, architecture)
    values = dict(stored.values)
    for key in ("scaling_factor", "finetuning_scaling_factor"):  # old versions wrote ones where they did not use it
        if _not_one(values.pop(key, None)):
            raise CheckpointError(f"latents are multiplied by {key} before decoding; expected an SAE without")
    tensors = Tensors(values)
    W_enc, W_dec = tensors.pair("W_enc", "W_dec", encoder_columns=True)
    d_sae, d_model = W_dec.shape
    if (setting(config, "d_in", int), setting(config, "d_sae", int)) != (d_model, d_sae):
        raise CheckpointError(
            f"W_dec has shape {(d_sae, d_model)}; expected {(config['d_sae'], config['d_in'])} from {CONFIG}"
        )
    b_dec = tensors.take("b_dec", d_model)
    b_enc = None if architecture == "gated" else tensors.take("b_enc", d_sae)
    selector = _selector(architecture, tensors, config, d_sae)
    tensors.finish(f"architecture {architecture}")

    normalise = str(setting(config, "normalize_activations", str, bool, type(None), default=None) or "none").lower()
    in_training = isinstance(selector, BatchTopK)
    # a setting of TopK and its kin alone: SAELens ignores it where another architecture's file still has it
    rescale = isinstance(selector, (TopK, BatchTopK)) and setting(
        config, "rescale_acts_by_decoder_norm", bool, default=in_training
    )
    if normalise in ("expected_average_only_in", "true"):
        why = "its inputs were scaled to an average norm (expected_average_only_in), by a factor that the file does not say"
        factor = options.positive("norm_scaling_factor", None, why)
        W_enc, W_dec, b_dec, normalise = W_enc * factor, W_dec / factor, b_dec / factor, "none"
        if rescale and isinstance(selector, BatchTopK):
            selector.threshold /= factor
    normalise = "none" if normalise == "false" else normalise
    if normalise not in _NORMALISATIONS:
        raise CheckpointError(f"normalize_activations {shown(normalise)}; expected {', '.join(_NORMALISATIONS)}")
    if rescale:
        norm = W_dec.norm(dim=1).clamp(min=1e-8)
        assert b_enc is not None
        W_enc, b_enc, W_dec = W_enc * norm[:, None], b_enc * norm, W_dec / norm[:, None]
    kind = _NORMALISATIONS[normalise]
    centred = _centred(metadata, options, W_dec if kind in CENTRED else None, stored.where)
    kind = CENTRED.get(kind, kind) if centred else kind
    model_name, hook_name = options.belongs(metadata.get("model_name"), metadata.get("hook_name"))
    return SAE(
        Inner(W_enc, b_enc),
        selector,
        W_dec,
        b_dec,
        normalise=normalisation(kind),
        subtract_b_dec=setting(config, "apply_b_dec_to_input", bool, default=True),
        metadata={"layout": "saelens"}
        | {key: value for key, value in metadata.items() if key not in ("model_name", "hook_name")},
        model_name=model_name,
        hook_name=hook_name,
    )


def _centred(metadata: Mapping[str, Any], options: Options, W_dec: Tensor | None, where: str) -> bool:
    """Whether it was trained on centred activations; warns of what else its model was loaded with, and where nothing says it.

    W_dec: where that would make a difference.
    """
    key = "model_from_pretrained_kwargs"
    loaded = setting(metadata, key, dict, type(None), default=None)
    chosen = options.take(_CENTRED)
    if not isinstance(chosen, bool | None):
        raise CheckpointError(f"{_CENTRED} = {shown(chosen)}; expected true or false")
    if others := sorted((loaded or {}).keys() - _SAME_ACTIVATIONS - {_CENTRED}):
        warnings.warn(
            f"{where}: trained on a model loaded with {', '.join(f'{name}={shown(loaded[name])}' for name in others)} ({key}), "
            "which may change its activations; load the model so too, or expect a worse reconstruction",
            stacklevel=2,
        )
    if chosen is not None:
        return chosen
    if loaded is not None:
        return setting(loaded, _CENTRED, bool, default=False)
    # Rows trained on centred activations have no mean: of random rows it is 1/d_model of their squared norm.
    if W_dec is not None and bool(W_dec.sum(dim=1).square().sum() < 0.01 * W_dec.square().sum()):
        warnings.warn(
            f"{where}: its decoder rows have mean 0, as of an SAE trained on a model with centred writing weights "
            f"(TransformerLens' default), and the file does not say so; give {_CENTRED}=True where that is so, else {_CENTRED}=False",
            stacklevel=2,
        )
    return False


def _architecture(config: Mapping[str, Any]) -> str:
    architecture = setting(config, "architecture", str, default="standard")
    activation = setting(config, "activation_fn", str, type(None), default=None) or "relu"
    settings = setting(config, "activation_fn_kwargs", dict, type(None), default=None) or {}
    if activation == "topk" and architecture in ("standard", "topk"):
        architecture = "topk"
    elif activation != "relu":
        raise CheckpointError(f"activation_fn {activation!r} of architecture {architecture!r}; expected relu or topk")
    others = {key: value for key, value in settings.items() if key != "k" and value}
    if others:
        raise CheckpointError(
            f"activation_fn_kwargs {', '.join(f'{k}={shown(v)}' for k, v in others.items())}; expected k alone"
        )
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
    reshape = setting(config, "reshape_activations", str, type(None), default=None) or "none"
    if reshape != "none" or head is not None:
        site = reshape if head is None else f"head {shown(head)}"
        raise BelongingError(f"an SAE inside attention heads ({site}); expected one of the residual stream")


def _selector(architecture: str, tensors: Tensors, config: Mapping[str, Any], d_sae: int) -> Selector:
    if architecture in ("topk", "abstopk"):
        k = config.get("k")
        k = (config.get("activation_fn_kwargs") or {}).get("k") if k is None else k
        kind = AbsTopK if architecture == "abstopk" else TopK
        return kind(int(Options({}).active(k, d_sae, f"a topk SAE, and {CONFIG} does not say its k")))
    if architecture == "gated":
        return Gate(*(tensors.take(key, d_sae) for key in ("b_gate", "r_mag", "b_mag")))
    if architecture == "jumprelu":
        logarithm = "log_threshold" in tensors  # as early versions trained it
        return JumpReLU(
            tensors.spread("log_threshold", d_sae).exp() if logarithm else tensors.spread("threshold", d_sae)
        )
    if architecture == "standard":
        return ReLU()
    k = Options({}).active(setting(config, "k", float), d_sae, "no k", mean=True)
    return BatchTopK(k, tensors.number("topk_threshold"))


def _not_one(scale: Any) -> bool:
    return scale is not None and not bool(((weights("the scaling factor", scale) - 1).abs() < 1e-5).all())

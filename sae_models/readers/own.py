"""Our own folders: what `save_sae` wrote."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sae_models.errors import CheckpointError
from sae_models.gates import BiJumpReLU, Gate, JumpReLU, SignedGate
from sae_models.normalise import Identity, normalisation
from sae_models.readers.stored import Stored
from sae_models.readers.strict import Options, Tensors, setting
from sae_models.sae import SAE
from sae_models.saving import WEIGHTS, digest
from sae_models.scores import Cosine, Direction, Inner, Score
from sae_models.selectors import AbsTopK, BatchTopK, ReLU, Selector, TopK


def recognises(stored: Stored) -> bool:
    """`cfg.json` with our metadata."""
    return stored.path.name == WEIGHTS and is_own(stored.config)


def is_own(config: Mapping[str, Any]) -> bool:
    """Whether a `cfg.json` was written by `save_sae`."""
    return isinstance(config.get("metadata"), Mapping) and "mechdiag" in config["metadata"]


def read(stored: Stored, options: Options) -> SAE:
    """The SAE as it was saved. Options: model_name, hook_name, where it was saved without.

    Raises `CheckpointError` for weights that are not those that the configuration was written with.
    """
    if not is_own(stored.config):
        raise CheckpointError(f"{stored.path.parent} has no cfg.json written by save_sae")
    sae = own_sae(stored.config, stored.values)
    written = setting(stored.config["metadata"]["mechdiag"], "tensors_sha256", str, default=None)
    if written is not None and written != digest(stored.values):
        raise CheckpointError(
            "the weights are not those that cfg.json was written with (the digest of the tensors differs): written only in part, "
            "or changed since; save the SAE again, or read what is there with layout='saelens'"
        )
    sae.model_name, sae.hook_name = options.belongs(sae.model_name, sae.hook_name)
    return sae


def own_sae(config: Mapping[str, Any], values: Mapping[str, Tensor]) -> SAE:
    """The SAE that `saving.described` described, in float32 at least. Raises `CheckpointError` for what is not what it says."""
    metadata = setting(config, "metadata", dict)
    own = setting(metadata, "mechdiag", dict)
    lens = not setting(config, "architecture", str).startswith("mechdiag:")
    d_sae, d_model = setting(config, "d_sae", int), setting(config, "d_in", int)
    tensors = Tensors(values)
    W_enc, W_dec = tensors.pair("W_enc", "W_dec", encoder_columns=lens)
    if W_dec.shape != (d_sae, d_model):
        raise CheckpointError(f"W_dec has shape {tuple(W_dec.shape)}; expected {(d_sae, d_model)} from cfg.json")
    b_dec = tensors.take("b_dec", d_model)
    kind = setting(setting(own, "score", dict), "kind", str)
    gated = setting(setting(own, "selector", dict), "kind", str) in ("gated", "signed_gated")
    b_enc = None if kind == "direction" or gated else tensors.take("b_enc", d_sae)
    score = _score(own["score"], tensors, W_enc, b_enc)
    selector = _selector(own["selector"], tensors, d_sae, lens)
    tensors.finish(f"a {kind} SAE with {selector.kind}")
    return SAE(
        score,
        selector,
        W_dec,
        b_dec,
        normalise=_normalise(setting(own, "normalise", dict)),
        subtract_b_dec=setting(config, "apply_b_dec_to_input", bool),
        restore_norm=setting(own, "restore_norm", bool),
        model_name=setting(metadata, "model_name", str, type(None)),
        hook_name=setting(metadata, "hook_name", str, type(None)),
        metadata=setting(own, "metadata", dict),
    )


def _score(said: Mapping[str, Any], tensors: Tensors, W_enc: Tensor, b_enc: Tensor | None) -> Score:
    kind = said["kind"]
    if kind == "direction":
        return Direction(W_enc, setting(said, "unit", bool))
    if kind == "inner":
        return Inner(W_enc, b_enc)
    if kind != "cosine" or b_enc is None:
        raise CheckpointError(f"a score of kind {kind!r}; expected inner, direction or cosine, the last without a gate")
    based = setting(said, "delta", bool)
    a = tensors.take("scale_a_base" if based else "scale_a", setting(said, "a", int))
    b = tensors.take("scale_b", setting(said, "b", int))
    delta = tensors.take("scale_a_delta", len(W_enc)) if based else None
    return Cosine(W_enc, b_enc, a, b, delta, fixed=setting(said, "fixed", bool))


def _selector(said: Mapping[str, Any], tensors: Tensors, d_sae: int, lens: bool) -> Selector:
    kind = said["kind"]
    if kind == "relu":
        return ReLU()
    if kind == "jumprelu":
        return JumpReLU(tensors.take("threshold", d_sae))
    if kind == "gated":
        return Gate(*(tensors.take(key, d_sae) for key in ("b_gate", "r_mag", "b_mag")))
    if kind == "bijumprelu":
        return BiJumpReLU(*(tensors.take(key, d_sae) for key in ("threshold", "threshold_negative")))
    if kind == "signed_gated":
        tied = setting(said, "tied", bool)
        keys = ("b_gate", "b_gate_negative", "r_mag", "b_mag", *([] if tied else ["r_mag_negative"]))
        return SignedGate(*(tensors.take(key, d_sae) for key in keys))
    if kind not in ("topk", "abstopk", "batchtopk"):
        raise CheckpointError(
            f"a selector of kind {kind!r}; expected relu, topk, abstopk, batchtopk, jumprelu, bijumprelu, gated or signed_gated"
        )
    k = Options({}).active(setting(said, "k", float), d_sae, "no k", mean=kind == "batchtopk")
    if kind != "batchtopk":
        return (AbsTopK if kind == "abstopk" else TopK)(int(k))
    threshold = tensors.take("threshold", *((d_sae,) if lens else ()))
    if len(threshold.unique()) > 1:
        raise CheckpointError(
            "a BatchTopK SAE with thresholds that differ: changed after save_sae wrote it; expected one"
        )
    return BatchTopK(k, float(threshold.reshape(-1)[0]))


def _normalise(said: Mapping[str, Any]) -> Identity:
    kind = setting(said, "kind", str)
    wanted = {"kind", "factor"} if kind == "factor" else {"kind"}
    if said.keys() != wanted:
        raise CheckpointError(
            f"settings {', '.join(said)} of input normalisation {kind!r}; expected {', '.join(wanted)}"
        )
    return normalisation(kind, **({"factor": setting(said, "factor", float)} if kind == "factor" else {}))

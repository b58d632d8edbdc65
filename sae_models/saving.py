"""Our folders: `cfg.json` and `sae_weights.safetensors`.

An SAE of standard shape (inner product; ReLU, TopK, BatchTopK, JumpReLU or gated; input plain, layer-normalised or rescaled to a
constant norm) is written so that SAELens loads it unchanged; what it says beyond that stands in the metadata, under `mechdiag`.
Others have an architecture `mechdiag:…`, which SAELens refuses by name, and the keys of arXiv:2606.15054's checkpoints.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_models.errors import CheckpointError, SAEError
from sae_models.normalise import normalisation
from sae_models.sae import SAE
from sae_models.scores import Cosine, Direction, Inner, Score
from sae_models.selectors import BatchTopK, Gate, JumpReLU, ReLU, Selector, TopK

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_LENS_ARCHITECTURES = {
    "relu": "standard",
    "topk": "topk",
    "batchtopk": "jumprelu",
    "jumprelu": "jumprelu",
    "gated": "gated",
}
_LENS_NORMALISATION = {"none": "none", "layer_norm": "layer_norm", "constant_norm": "constant_norm_rescale"}


def save_sae(sae: SAE, folder: str | Path, *, dtype: torch.dtype | None = None) -> Path:
    """Write an SAE into a folder, each of its two files whole, and return the folder.

    dtype: of the two matrices in the file (default: as they are); the small tensors stay as they are. Aligned and tied SAEs are
    written with their encoder materialised, as plain ones. Raises `SAEError` for a BatchTopK SAE that has no threshold yet.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config, tensors = described(sae)
    config["dtype"] = str(dtype or sae.dtype).removeprefix("torch.")
    cpu = {
        key: value.detach()
        .to("cpu", dtype if dtype is not None and value.ndim == 2 else value.dtype)
        .contiguous()
        .clone()
        for key, value in tensors.items()
    }
    with tempfile.TemporaryDirectory(dir=folder) as partial:
        save_file(cpu, Path(partial) / WEIGHTS)
        (Path(partial) / CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True), encoding="utf-8")
        for name in (CONFIG, WEIGHTS):  # where the weights are, all is there
            os.replace(Path(partial) / name, folder / name)
    return folder


def described(sae: SAE) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `save_sae` writes: the configuration and the tensors by key."""
    selector = sae.selector
    if isinstance(selector, BatchTopK) and bool(selector.threshold.isnan()):
        raise SAEError(
            "a BatchTopK SAE without a threshold cannot be used at inference; train it past threshold_from first"
        )
    plain = sae.score.kind in ("inner", "aligned", "tied")
    lens = plain and not sae.restore_norm and sae.normalise.kind in _LENS_NORMALISATION
    own = {
        "score": {"kind": "inner"} if plain else _score_settings(sae.score),
        "selector": selector.settings(),
        "normalise": sae.normalise.settings(),
        "restore_norm": sae.restore_norm,
        "metadata": sae.metadata,
    }
    config = {
        "architecture": _LENS_ARCHITECTURES[selector.kind] if lens else f"mechdiag:{own['score']['kind']}",
        "d_in": sae.d_model,
        "d_sae": sae.d_sae,
        "device": "cpu",
        "apply_b_dec_to_input": sae.subtract_b_dec,
        "normalize_activations": _LENS_NORMALISATION.get(sae.normalise.kind, "none") if lens else "none",
        "reshape_activations": "none",
        # without a version SAELens reads the metadata of version 5, which lie elsewhere, and drops these
        "metadata": {
            "sae_lens_version": "6.0.0",
            "model_name": sae.model_name,
            "hook_name": sae.hook_name,
            "mechdiag": own,
        },
    }
    tensors: dict[str, Tensor] = {
        "W_enc": sae.encoder_rows() if plain else sae.score.W_enc,
        "W_dec": sae.W_dec,
        "b_dec": sae.b_dec,
    }
    if sae.score.b_enc is not None and not isinstance(selector, Gate):
        tensors["b_enc"] = sae.score.b_enc
    tensors |= _scales(sae.score) | _selector_tensors(selector)
    if lens:
        tensors["W_enc"] = tensors["W_enc"].T
        if isinstance(selector, TopK):
            config["k"] = selector.k
        if isinstance(selector, BatchTopK):
            tensors["threshold"] = selector.threshold.expand(sae.d_sae)
    return config, tensors


def stored(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors in a folder."""
    return json.loads((folder / CONFIG).read_text(encoding="utf-8")), load_file(folder / WEIGHTS)


def is_own(config: Mapping[str, Any]) -> bool:
    """Whether a `cfg.json` was written by `save_sae`."""
    return isinstance(config.get("metadata"), Mapping) and "mechdiag" in config["metadata"]


def own_sae(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SAE:
    """The SAE that `described` described. Raises `CheckpointError` for keys or shapes that are not what it says."""
    own = config["metadata"]["mechdiag"]
    lens = not str(config["architecture"]).startswith("mechdiag:")
    d_sae, d_model = config["d_sae"], config["d_in"]
    left = dict(tensors)

    def take(key: str, *shape: int) -> Tensor:
        if key not in left:
            raise CheckpointError(f"no tensor {key!r} among {', '.join(tensors)}; the file is not complete")
        found = left.pop(key)
        if tuple(found.shape) != shape:
            raise CheckpointError(f"{key} has shape {tuple(found.shape)}; expected {shape}")
        return found

    W_enc = take("W_enc", d_model, d_sae).T.contiguous() if lens else take("W_enc", d_sae, d_model)
    W_dec, b_dec = take("W_dec", d_sae, d_model), take("b_dec", d_model)
    kind = own["score"]["kind"]
    selector_kind = own["selector"]["kind"]
    b_enc = None if kind == "direction" or selector_kind == "gated" else take("b_enc", d_sae)
    score: Score
    if kind == "cosine":
        scales = own["score"]
        base = "scale_a_base" if scales["delta"] else "scale_a"
        a, b = take(base, scales["a"]), take("scale_b", scales["b"])
        delta = take("scale_a_delta", d_sae) if scales["delta"] else None
        assert b_enc is not None
        score = Cosine(W_enc, b_enc, a, b, delta, fixed=scales["fixed"])
    else:
        score = Direction(W_enc, own["score"]["unit"]) if kind == "direction" else Inner(W_enc, b_enc)
    selector: Selector
    if selector_kind == "topk":
        selector = TopK(own["selector"]["k"])
    elif selector_kind == "batchtopk":
        threshold = take("threshold", d_sae)[0] if lens else take("threshold")
        selector = BatchTopK(own["selector"]["k"], float(threshold))
    elif selector_kind == "jumprelu":
        selector = JumpReLU(take("threshold", d_sae))
    elif selector_kind == "gated":
        selector = Gate(take("b_gate", d_sae), take("r_mag", d_sae), take("b_mag", d_sae))
    else:
        selector = ReLU()
    if left:
        raise CheckpointError(
            f"tensors {', '.join(left)} are not used by a {kind} SAE with {selector_kind}; expected none left"
        )
    metadata = config["metadata"]
    return SAE(
        score,
        selector,
        W_dec,
        b_dec,
        normalise=normalisation(**own["normalise"]),
        subtract_b_dec=config["apply_b_dec_to_input"],
        restore_norm=own["restore_norm"],
        model_name=metadata["model_name"],
        hook_name=metadata["hook_name"],
        metadata=own["metadata"],
    )


def _score_settings(score: Score) -> dict[str, Any]:
    if isinstance(score, Cosine):
        sizes = {"a": len(score.scale_a), "b": len(score.scale_b)}
        return {"kind": score.kind, **sizes, "delta": score.scale_delta is not None, "fixed": score.fixed}
    return {"kind": score.kind, "unit": score.unit} if isinstance(score, Direction) else {"kind": score.kind}


def _scales(score: Score) -> dict[str, Tensor]:
    if not isinstance(score, Cosine):
        return {}
    if score.scale_delta is None:
        return {"scale_a": score.scale_a, "scale_b": score.scale_b}
    return {"scale_a_base": score.scale_a, "scale_a_delta": score.scale_delta, "scale_b": score.scale_b}


def _selector_tensors(selector: Selector) -> dict[str, Tensor]:
    if isinstance(selector, Gate):
        return {"b_gate": selector.b_gate, "r_mag": selector.r_mag, "b_mag": selector.b_mag}
    return {"threshold": selector.threshold} if isinstance(selector, (BatchTopK, JumpReLU)) else {}

"""Our folders: `cfg.json` and `sae_weights.safetensors`.

An SAE of standard shape (inner product; ReLU, TopK, AbsTopK, BatchTopK, JumpReLU or gated; input plain, centred, layer-normalised or rescaled to
a constant norm) is written so that SAELens loads it unchanged; what it says beyond that stands in the metadata, under `mechdiag`.
Others have an architecture `mechdiag:…`, which SAELens refuses by name, and the keys of arXiv:2606.15054's checkpoints.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from interventions.models.weights import bytes_of
from sae_models.errors import SAEError
from sae_models.gates import Gate, JumpReLU, SignedGate
from sae_models.normalise import CENTRED
from sae_models.sae import SAE
from sae_models.scores import Cosine, Direction, Score
from sae_models.selectors import BatchTopK, Selector, TopK

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_LENS_ARCHITECTURES = {
    "relu": "standard",
    "topk": "topk",
    "abstopk": "abstopk",
    "batchtopk": "jumprelu",
    "jumprelu": "jumprelu",
    "gated": "gated",
}
_LENS_NORMALISATION = {"none": "none", "layer_norm": "layer_norm", "constant_norm": "constant_norm_rescale"}
_LENS_NORMALISATION |= {centred: _LENS_NORMALISATION[kind] for kind, centred in CENTRED.items()}


def save_sae(sae: SAE, folder: str | Path, *, dtype: torch.dtype | None = None) -> Path:
    """Write an SAE into a folder, each of its two files whole, and return the folder.

    The configuration holds a digest of the tensors, so that `load_sae` refuses two files that were not written together.
    dtype: of the two matrices in the file (default: as they are); the small tensors stay as they are. Aligned and tied SAEs are
    written with their encoder materialised, as plain ones. Raises `SAEError` for a BatchTopK SAE that has no threshold yet, and
    for an empty name of a folder.
    """
    if not str(folder).strip():
        raise SAEError("an empty name of a folder; give one ('.' is the working directory)")
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
    config["metadata"]["mechdiag"]["tensors_sha256"] = digest(cpu)
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
    lens = (
        plain
        and not sae.restore_norm
        and sae.normalise.kind in _LENS_NORMALISATION
        and selector.kind in _LENS_ARCHITECTURES
    )
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
    if lens and sae.normalise.kind in CENTRED.values():
        config["metadata"]["model_from_pretrained_kwargs"] = {"center_writing_weights": True}
    tensors: dict[str, Tensor] = {
        "W_enc": sae.encoder_rows() if plain else sae.score.W_enc,
        "W_dec": sae.W_dec,
        "b_dec": sae.b_dec,
    }
    if sae.score.b_enc is not None and not isinstance(selector, (Gate, SignedGate)):
        tensors["b_enc"] = sae.score.b_enc
    tensors |= _scales(sae.score) | _selector_tensors(selector)
    if lens:
        tensors["W_enc"] = tensors["W_enc"].T
        if isinstance(selector, TopK):
            config["k"] = selector.k
        if isinstance(selector, BatchTopK):
            tensors["threshold"] = selector.threshold.expand(sae.d_sae)
    return config, tensors


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of tensors."""
    found = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        found.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        found.update(bytes_of(value))
    return found.hexdigest()


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
    if isinstance(selector, (Gate, SignedGate, JumpReLU)):
        return dict(selector.named_parameters())
    return {"threshold": selector.threshold} if isinstance(selector, BatchTopK) else {}

"""Damaged checkpoints of every reader: `python -m tests.fuzz_saes --n 2000 --seed 0` (some hundred of them are a test).

A valid folder of some format is damaged in one to three ways, each drawn from (seed, number), and loaded. Either `SAEError` says
why not, on one line that names the folder; or what is loaded computes what the file holds: the same latents and outputs as before
the damage, or those that the format's equation, written out in numpy here, gives for the tensors and settings that are there now.
"""

import argparse
import copy
import json
import math
import random
import shutil
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from sae_models import SAEError, load_sae, save_sae
from sae_models.architectures import build, named
from sae_models.gates import Gate, JumpReLU
from sae_models.sae import SAE
from sae_models.scores import Inner
from sae_models.selectors import BatchTopK

D_MODEL, D_SAE, K = 6, 10, 3
X = np.random.default_rng(0).normal(size=(12, D_MODEL)) * np.linspace(0.3, 4, 12)[:, None] + 0.3
Arrays = Mapping[str, Any]
Evaluated = tuple[np.ndarray, np.ndarray]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- formats: what a valid folder holds, and their equations ----


@dataclass(frozen=True)
class Format:
    """A valid folder, and what its contents mean."""

    name: str
    file: str
    tensors: Mapping[str, Any]
    evaluate: Callable[[Arrays, Mapping[str, Any], np.ndarray], Evaluated]
    config_file: str = "cfg.json"
    config: Mapping[str, Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def relu(s: np.ndarray) -> np.ndarray:
    return np.maximum(s, 0)


def strongest(s: np.ndarray, k: int) -> np.ndarray:
    return relu(s) * (s >= np.sort(s, axis=1)[:, -int(k) :][:, :1])


def lens(t: Arrays, c: Mapping[str, Any], x: np.ndarray) -> Evaluated:
    """SAELens of either kind of configuration."""
    kinds = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
    c = {kinds.get(key, key): value for key, value in c.items()}
    kind = c.get("architecture", "standard")
    if c.get("activation_fn") == "topk":
        kind = "topk"
    scale, shift, norm = np.ones((len(x), 1)), np.zeros((len(x), 1)), c.get("normalize_activations")
    metadata = {**c, **(c.get("metadata") or {})}
    if (metadata.get("model_from_pretrained_kwargs") or {}).get("center_writing_weights"):
        shift, x = x.mean(1, keepdims=True), x - x.mean(1, keepdims=True)
    if norm == "layer_norm":
        mean, std = x.mean(1, keepdims=True), x.std(1, ddof=1, keepdims=True)
        x, scale, shift = (x - mean) / (std + 1e-5), std, shift + mean
    if norm == "constant_norm_rescale":
        scale = np.linalg.norm(x, axis=1, keepdims=True) / x.shape[1] ** 0.5
        x = x / scale
    x_c = x - t["b_dec"] if c.get("apply_b_dec_to_input", True) else x
    p = x_c @ t["W_enc"]
    s = p + t["b_enc"] if kind != "gated" else p
    each = np.linalg.norm(t["W_dec"], axis=1) if c.get("rescale_acts_by_decoder_norm", kind.startswith("b")) else 1.0
    if kind == "gated":
        z = relu(np.exp(t["r_mag"]) * p + t["b_mag"]) * (p + t["b_gate"] > 0)
    elif kind == "jumprelu":
        z = relu(s) * (s > (t["threshold"] if "threshold" in t else np.exp(t["log_threshold"])))
    elif kind == "topk":
        k = c.get("k", (c.get("activation_fn_kwargs") or {}).get("k"))
        z = strongest(s * each, k) / each
    elif kind == "batchtopk":
        z = relu(s) * (s * each > t["topk_threshold"])
    else:
        assert kind == "standard"
        z = relu(s)
    # ours carry the decoder's norms and the input's scale
    z = z * (each if kind in ("topk", "batchtopk") else 1.0)
    rows = t["W_dec"] / (np.reshape(each, (-1, 1)) if kind in ("topk", "batchtopk") else 1.0)
    return z * scale, scale * (z @ rows + t["b_dec"]) + shift


def own(t: Arrays, c: Mapping[str, Any], x: np.ndarray) -> Evaluated:
    """What `save_sae` writes: plain, cosine and bypass SAEs of plain inputs; without its metadata a folder of SAELens."""
    if "mechdiag" not in c.get("metadata", {}):
        return lens(t, c, x)
    said = c["metadata"]["mechdiag"]
    score, selector = said["score"], said["selector"]
    assert said["normalise"] == {"kind": "none"}
    x_c = x - t["b_dec"] if c["apply_b_dec_to_input"] else x
    W_enc = t["W_enc"] if c["architecture"].startswith("mechdiag:") else t["W_enc"].T
    norm = np.linalg.norm(x_c, axis=1, keepdims=True)
    unit = W_enc / np.linalg.norm(W_enc, axis=1, keepdims=True)
    if score["kind"] == "inner":
        s = x_c @ W_enc.T + (0 if selector["kind"] == "gated" else t["b_enc"])
    elif score["kind"] == "direction":
        s = (x_c / norm) @ (unit if score["unit"] else W_enc).T
    else:
        a = t["scale_a_base"] + t["scale_a_delta"] if score["delta"] else t["scale_a"]
        s = np.exp(a * np.log(norm) + t["scale_b"]) * ((x_c / norm) @ unit.T) + t["b_enc"]
    if selector["kind"] == "topk":
        f = strongest(s, selector["k"])
    elif selector["kind"] == "gated":
        f = relu(np.exp(t["r_mag"]) * s + t["b_mag"]) * (s + t["b_gate"] > 0)
    else:
        f = relu(s) * (1 if selector["kind"] == "relu" else s > t["threshold"])
    if said["restore_norm"]:
        size = np.linalg.norm(f @ t["W_dec"], axis=1, keepdims=True)
        f = f * np.where(size > 0, norm / np.where(size > 0, size, 1), 0)
    return f, f @ t["W_dec"] + t["b_dec"]


def sparsify(t: Arrays, c: Mapping[str, Any], x: np.ndarray) -> Evaluated:
    z = strongest((x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"], c["k"])
    return z, z @ t["W_dec"] + t["b_dec"]


def scope(t: Arrays, c: Mapping[str, Any], x: np.ndarray) -> Evaluated:
    t = {key.lower(): value for key, value in t.items()}
    s = x @ t["w_enc"] + t["b_enc"]
    z = relu(s) * (s > t["threshold"])
    return z, z @ t["w_dec"] + t["b_dec"]


def openai(t: Arrays, c: Mapping[str, Any], x: np.ndarray) -> Evaluated:
    mean, std = x.mean(1, keepdims=True), x.std(1, ddof=1, keepdims=True)
    if t["activation"] == "ReLU":
        mean, std = np.zeros_like(mean), np.ones_like(std)
        u = x
    else:
        u = (x - mean) / (std + 1e-5)
    s = (u - t["pre_bias"]) @ t["encoder.weight"].T + t["latent_bias"]
    z = relu(s) if t["activation"] == "ReLU" else strongest(s, t["activation_state_dict"]["k"])
    return z * std, std * (z @ t["decoder.weight"].T + t["pre_bias"]) + mean


def learned(t: Arrays, c: Mapping[str, Any], x: np.ndarray) -> Evaluated:
    """dictionary_learning's classes."""
    keys = {"k": "MatryoshkaBatchTopKSAE", "W_enc": "JumpReluAutoEncoder", "decoder_bias": "GatedAutoEncoder"}
    keys |= {"bias": "AutoEncoder", "decoder.bias": "AutoEncoderNew"}
    by_keys = next((kind for key, kind in keys.items() if key in t), None)
    kind = c.get("trainer", {}).get("dict_class", by_keys)
    if kind in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        s = (x if kind.startswith("J") else x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
        z = relu(s) * (s > t["threshold"])
        return z, z @ t["W_dec"] + t["b_dec"]
    named = {"AutoEncoder": "bias", "GatedAutoEncoder": "decoder_bias", "AutoEncoderNew": "decoder.bias"}
    b_dec = t[named.get(kind, "b_dec")]
    p = (x if kind == "AutoEncoderNew" else x - b_dec) @ t["encoder.weight"].T
    if kind == "GatedAutoEncoder":
        z = relu(np.exp(t["r_mag"]) * p + t["mag_bias"]) * (p + t["gate_bias"] > 0)
    else:
        s = p + t["encoder.bias"]
        z = relu(s)
        if kind == "AutoEncoderTopK":
            z = strongest(s, t["k"] if "k" in t else c["trainer"]["k"])
        elif kind == "BatchTopKSAE":
            z = relu(s) * (s > t["threshold"])
    return z, z @ t["decoder.weight"].T + b_dec


def each(scale: np.ndarray, n: int) -> np.ndarray:
    """One number for each of n latents, from one for each of equal slices; the remainder joins the last."""
    flat = np.reshape(scale, -1)
    return flat[np.minimum(np.arange(n) // (n // len(flat)), len(flat) - 1)]


def unit_rows(W: np.ndarray) -> np.ndarray:
    return W / np.linalg.norm(W, axis=1, keepdims=True)


def bypass(
    t: Arrays, x: np.ndarray, unit_encoder: bool = True, unit_decoder: bool = True, restore: bool = True
) -> Evaluated:
    """The magnitude bypass of arXiv:2606.15054 and its switches."""
    x_c = x - t["b_dec"]
    norm = np.linalg.norm(x_c, axis=1, keepdims=True)
    s = x_c / norm @ (unit_rows(t["W_enc"]) if unit_encoder else t["W_enc"]).T
    z = relu(s) * (s > t["threshold"])
    W_dec = unit_rows(t["W_dec"]) if unit_decoder else t["W_dec"]
    if restore:
        size = np.linalg.norm(z @ W_dec, axis=1, keepdims=True)
        z = z * np.where(size > 0, norm / np.where(size > 0, size, 1), 0)
    return z, z @ W_dec + t["b_dec"]


def paper(t: Arrays, c: Mapping[str, Any], x: np.ndarray) -> Evaluated:
    """Checkpoints of arXiv:2606.15054."""
    if "b_enc" not in t:
        return bypass(t, x)
    x_c = x - t["b_dec"]
    norm = np.linalg.norm(x_c, axis=1, keepdims=True)
    if "scale_b" in t:
        n = len(t["W_enc"])
        a = t["scale_a_base"] + t["scale_a_delta"] if "scale_a_base" in t else each(t.get("scale_a", np.zeros(1)), n)
        s = np.exp(a * np.log(norm) + each(t["scale_b"], n)) * ((x_c / norm) @ unit_rows(t["W_enc"]).T) + t["b_enc"]
    else:
        s = x_c @ t["W_enc"].T + t["b_enc"]
    z = relu(s) * (s > t["threshold"]) if "threshold" in t else strongest(s, K)  # with k given
    return z, z @ t["W_dec"] + t["b_dec"]


ROWS = {"W_enc": drawn(D_SAE, D_MODEL), "W_dec": drawn(D_SAE, D_MODEL, seed=1), "b_dec": drawn(D_MODEL, seed=2)}
COLUMNS = ROWS | {"W_enc": drawn(D_MODEL, D_SAE)}
B_ENC = {"b_enc": 0.3 * drawn(D_SAE, seed=3)}
THRESHOLD = drawn(D_SAE, seed=4).abs()
BYPASS = {key: torch.nn.functional.normalize(ROWS[key], dim=1) for key in ("W_enc", "W_dec")}
BYPASS |= {"b_dec": ROWS["b_dec"], "threshold": torch.tensor(0.2)}
GATE = {"r_mag": 0.3 * drawn(D_SAE, seed=5), "mag_bias": drawn(D_SAE, seed=6), "gate_bias": drawn(D_SAE, seed=7)}
LAYERS = {"encoder.weight": drawn(D_SAE, D_MODEL), "decoder.weight": drawn(D_MODEL, D_SAE, seed=1)}
LAYERS |= {"encoder.bias": B_ENC["b_enc"]}


def _lens(name: str, more: Mapping[str, Any], **config: Any) -> Format:
    metadata = {"sae_lens_version": "6.54.0", "model_name": "gpt2", "hook_name": "blocks.3.hook_resid_post"}
    plain = {"d_in": D_MODEL, "d_sae": D_SAE, "apply_b_dec_to_input": True, "dtype": "float32", "metadata": metadata}
    return Format(f"saelens {name}", "sae_weights.safetensors", COLUMNS | more, lens, config=plain | config)


def _learned(kind: str, tensors: Mapping[str, Any], **trainer: Any) -> Format:
    said = {"dict_class": kind, "lm_name": "gpt2", "submodule_name": "resid_post_layer_3", "activation_dim": D_MODEL}
    config = {"trainer": said | {"dict_size": D_SAE} | trainer, "buffer": {"io": "out", "ctx_len": 128}}
    return Format(f"dictionary_learning {kind}", "ae.pt", tensors, learned, "config.json", config)


def _own(name: str, sae: SAE) -> Format:
    with tempfile.TemporaryDirectory() as folder:
        save_sae(sae, folder)
        config = json.loads((Path(folder) / "cfg.json").read_text())
        tensors = load_file(Path(folder) / "sae_weights.safetensors")
    return Format(f"own {name}", "sae_weights.safetensors", tensors, own, config=config)


def _trained(name: str) -> SAE:
    sae = build(named(name), D_SAE, K, drawn(64, D_MODEL) + 1, torch.Generator().manual_seed(0), model_name="tiny")
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.1 * drawn(*parameter.shape, seed=parameter.numel())
    if isinstance(sae.selector, BatchTopK):
        sae.selector.threshold.fill_(0.31)
    sae.metadata = {"training": {"fve": 0.5}}
    return sae


def formats() -> list[Format]:
    """A valid folder of every reader, and of every branch in it that a setting picks."""
    gate = {"b_gate": GATE["gate_bias"], "r_mag": GATE["r_mag"], "b_mag": GATE["mag_bias"]}
    made = Gate(GATE["gate_bias"], GATE["r_mag"], GATE["mag_bias"])
    scope2 = {"model_name": "google/gemma-3-1b-pt", "architecture": "jump_relu", "width": D_SAE, "type": "sae", "l0": 5}
    scope2 |= {f"hf_hook_point_{way}": "model.layers.3.output" for way in ("in", "out")} | {"affine_connection": False}
    flat = {"hook_point": "blocks.3.hook_resid_post", "model_name": "gpt2-small", "activation_fn_str": "relu"}
    rows = B_ENC | {"threshold": torch.tensor(0.4)}
    scales = {"scale_a": torch.tensor([0.3]), "scale_b": torch.tensor([0.2])}
    delta = {"scale_a_base": torch.tensor([0.3]), "scale_a_delta": 0.1 * drawn(D_SAE, seed=8), "scale_b": torch.ones(1)}
    topk = {"activation": "topk", "signed": False, "transcode": False}
    groups = {"scale_a": torch.tensor([0.3, 0.1, 0.5]), "scale_b": torch.tensor([0.2, 0.6, -0.1])}
    k = {"k": torch.tensor(K), "threshold": torch.tensor(0.4)}
    plain = {"latent_bias": B_ENC["b_enc"], "pre_bias": ROWS["b_dec"]}
    plain |= {key: value for key, value in LAYERS.items() if key.endswith("weight")}
    return [
        _own("batchtopk", _trained("standard")),
        _own("topk", _trained("standard:topk")),
        _own("cosine", _trained("cosine")),
        _own("bypass", _trained("bypass:topk")),
        _own("gated", SAE(Inner(ROWS["W_enc"], None), made, ROWS["W_dec"], ROWS["b_dec"])),
        _own("jumprelu", SAE(Inner(ROWS["W_enc"], B_ENC["b_enc"]), JumpReLU(THRESHOLD), ROWS["W_dec"], ROWS["b_dec"])),
        _lens("standard", B_ENC, architecture="standard"),
        _lens("centred", B_ENC, model_from_pretrained_kwargs={"center_writing_weights": True}),
        _lens("topk", B_ENC, architecture="topk", k=K, rescale_acts_by_decoder_norm=True),
        _lens("layer_norm", B_ENC, architecture="topk", k=K, normalize_activations="layer_norm"),
        _lens("jumprelu", B_ENC | {"threshold": THRESHOLD}, architecture="jumprelu", normalize_activations="none"),
        _lens("batchtopk", B_ENC | {"topk_threshold": torch.tensor(0.4)}, architecture="batchtopk", k=2.5),
        _lens("gated", gate, architecture="gated", normalize_activations="constant_norm_rescale"),
        _lens("flat", B_ENC | {"scaling_factor": torch.ones(D_SAE)}, **flat, metadata=None),
        Format(
            "sparsify",
            "sae.safetensors",
            LAYERS | {"W_dec": ROWS["W_dec"], "b_dec": ROWS["b_dec"], "decoder.weight": None},  # named W_dec there
            sparsify,
            config={"d_in": D_MODEL, "k": K, "num_latents": D_SAE} | topk,
        ),
        Format("gemma_scope", "params.npz", COLUMNS | B_ENC | {"threshold": THRESHOLD}, scope),
        Format(
            "gemma_scope 2",
            "params.safetensors",
            {key.lower(): value for key, value in (COLUMNS | B_ENC | {"threshold": THRESHOLD}).items()},
            *(scope, "config.json", scope2),
        ),
        Format(
            "openai",
            "sae.pt",
            plain
            | {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}}
            | {"stats_last_nonzero": torch.zeros(D_SAE)},
            openai,
        ),
        Format("openai relu", "sae.pt", plain | {"activation": "ReLU", "activation_state_dict": {}}, openai),
        _learned("AutoEncoder", LAYERS | {"bias": ROWS["b_dec"]}),
        _learned("AutoEncoderNew", LAYERS | {"decoder.bias": ROWS["b_dec"]}),
        _learned("AutoEncoderTopK", LAYERS | {"b_dec": ROWS["b_dec"]} | k, k=K),
        _learned("BatchTopKSAE", LAYERS | {"b_dec": ROWS["b_dec"]} | k, k=K),
        _learned("MatryoshkaBatchTopKSAE", COLUMNS | B_ENC | k | {"group_sizes": torch.tensor([4, 6])}),
        _learned("JumpReluAutoEncoder", COLUMNS | B_ENC | {"threshold": THRESHOLD}),
        _learned("GatedAutoEncoder", LAYERS | {"encoder.bias": None, "decoder_bias": ROWS["b_dec"]} | GATE),
        Format("cosine standard", "sae.pt", ROWS | rows, paper),
        Format("cosine global", "sae.pt", ROWS | rows | scales, paper),
        Format("cosine groups", "sae.pt", ROWS | rows | groups, paper),
        Format("cosine feature", "sae.pt", ROWS | rows | {"scale_a": B_ENC["b_enc"], "scale_b": GATE["r_mag"]}, paper),
        Format("cosine pure", "sae.pt", ROWS | rows | {"scale_b": scales["scale_b"]}, paper),
        Format("cosine bypass", "sae.pt", BYPASS, paper),
        Format("cosine delta", "final.safetensors", ROWS | rows | delta, paper, options={"k": K}),
    ]


FORMATS = {one.name: one for one in formats()}


# ---- files ----


def write(folder: Path, file: str, tensors: Mapping[str, Any]) -> None:
    tensors = {key: value for key, value in tensors.items() if value is not None}
    if file.endswith(".npz"):
        np.savez(folder / file, **{key: np.asarray(value) for key, value in tensors.items()})
    elif file.endswith(".pt"):
        torch.save(tensors, folder / file)
    else:
        save_file({key: value.contiguous().clone() for key, value in tensors.items()}, folder / file)


def read(folder: Path, file: str) -> dict[str, Any]:
    """The tensors of a file in float64, under their names without wrappers, and its other values."""
    if file.endswith(".npz"):
        with np.load(folder / file) as arrays:
            found: dict[str, Any] = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    elif file.endswith(".pt"):
        found = torch.load(folder / file, weights_only=True)
    else:
        found = load_file(folder / file)
    wide = {key: v.to(torch.float64).numpy() if isinstance(v, Tensor) else v for key, v in found.items()}
    return {key.replace("_orig_mod.", "").replace("module.", ""): value for key, value in wide.items()}


def write_format(folder: Path, valid: Format) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write(folder, valid.file, valid.tensors)
    if valid.config is not None:
        (folder / valid.config_file).write_text(json.dumps(valid.config, indent=1))


# ---- damage ----


def damage_bytes(folder: Path, valid: Format, draw: random.Random) -> str:
    """A file's bytes."""
    files = sorted(folder.iterdir())
    if not files:
        return "already gone"
    path = draw.choice(files)
    content = bytearray(path.read_bytes())
    kind = draw.choice(
        ("flip", "flip", "flip", "cut", "cut", "empty", "grow", "pointer", "noise", "gone", "text", "head")
    )
    if not content:
        return "already empty"
    if kind == "flip":
        for _ in range(draw.choice((1, 1, 3, 20))):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif kind == "head":  # where headers are
        content[draw.randrange(min(64, len(content)))] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del content[draw.randrange(len(content)) :]
    elif kind == "grow":
        content += draw.randbytes(draw.randrange(1, 100))
    elif kind == "gone":
        path.unlink()
        return f"{path.name} gone"
    else:
        new = {
            "empty": b"",
            "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "text": b"404",
        }
        content = bytearray(new.get(kind) if kind in new else draw.randbytes(draw.randrange(1, 300)))
    path.write_bytes(content)
    return f"{path.name} {kind}"


DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
OTHERS = (torch.int64, torch.int8, torch.bool)
with suppress(KeyError):  # an old safetensors cannot write complex numbers
    save({"x": torch.zeros(1, dtype=torch.complex64)})
    OTHERS = (torch.complex64, *OTHERS)


def damage_tensors(folder: Path, valid: Format, draw: random.Random) -> str:
    """The tensors of a file that is otherwise well formed."""
    tensors = {key: value for key, value in valid.tensors.items() if value is not None}
    key = draw.choice([key for key, value in tensors.items() if isinstance(value, Tensor)])
    value: Tensor = tensors[key]
    kind = draw.choice(
        (
            *("rename", "drop", "copy", "swap", "shape", "shape", "dtype", "dtype", "other", "bad", "bad"),
            *("huge", "wrapped", "half wrapped", "plain", "extra", "values"),
        )
    )
    said = kind
    if kind in ("rename", "copy"):
        new = draw.choice(
            (key.upper(), key.lower(), key + "_", "sae." + key, "_orig_mod." + key, "b_enc", "threshold", "")
        )
        tensors[new] = tensors[key] if kind == "copy" else tensors.pop(key)
        said = f"{kind} {key} {new}"
    elif kind == "drop":
        del tensors[key]
    elif kind == "swap":
        other = draw.choice([name for name, v in tensors.items() if isinstance(v, Tensor)])
        tensors[key], tensors[other] = tensors[other], tensors[key]
    elif kind == "shape":
        shapes = (
            value[None],
            value.flatten(),
            value.T if value.ndim == 2 else value[..., None],
            value[:0] if value.ndim else value,
        )
        tensors[key] = draw.choice(
            (*shapes, value.reshape(-1)[:1], value.reshape(-1)[0], torch.cat([value.reshape(-1)] * 2))
        )
    elif kind in ("dtype", "other"):
        dtype = draw.choice(DTYPES if kind == "dtype" else OTHERS)
        tensors[key], said = value.to(dtype), f"{key} {dtype}"
    elif kind in ("bad", "huge"):
        wide = value.double() if kind == "huge" else value.float()
        wide = wide.reshape(-1).clone()
        wide[draw.randrange(len(wide))] = draw.choice((math.nan, math.inf, -math.inf)) if kind == "bad" else 1e300
        tensors[key] = wide.reshape(value.shape)
        said = f"{kind} {key}"
    elif kind == "wrapped":
        prefix = draw.choice(("_orig_mod.", "module.", "module._orig_mod."))
        tensors = {prefix + name: v for name, v in tensors.items()}
    elif kind == "half wrapped":
        tensors = {("_orig_mod." if draw.random() < 0.5 else "") + name: v for name, v in tensors.items()}
    elif kind == "plain" and valid.file.endswith(".pt"):
        tensors[key] = draw.choice((None, 3, "text", [1, 2], {"a": 1}, (), math.nan))  # type: ignore[assignment]
        if tensors[key] is None:
            tensors[key] = []  # type: ignore[assignment]
    elif kind == "extra":
        tensors[draw.choice(("extra", "W_skip", "affine_skip_connection", "scaling_factor"))] = drawn(D_SAE)
    else:
        tensors[key] = value + 0.1 if value.is_floating_point() else value
    if valid.file.endswith(".npz"):
        tensors = {name: v for name, v in tensors.items() if not isinstance(v, Tensor) or v.dtype not in DTYPES[2:]}
    write(folder, valid.file, tensors)
    return said


def _deep(n: int) -> Any:
    deep: Any = {}
    for i in range(n):
        deep = {"a": deep} if i % 2 else [deep]
    return deep


VALUES: tuple[Any, ...] = (
    *(None, math.nan, math.inf, -1, 0, 1, 2.5, 10**30, "", "text", "topk", True, False, [], {}, [1, 2], {"k": 3}),
    *(_deep(40), "1e400", D_SAE + 1, float(K), "\x1b[31m", "a\nb"),
)


def damage_config(folder: Path, valid: Format, draw: random.Random) -> str:
    """The settings."""
    path = folder / valid.config_file
    if valid.config is None:
        path.write_text(
            draw.choice(("{}", "[]", "null", '{"k": NaN}', "[" * 100_000, '{"trainer": 3}', '{"metadata": []}'))
        )
        return "a configuration where there is none"
    kind = draw.choice(("value", "value", "value", "value", "drop", "rename", "whole", "twice"))
    config = copy.deepcopy(dict(valid.config))
    places = [(config, key) for key in config]
    for at, key in places:
        if isinstance(at[key], dict):
            places += [(at[key], inner) for inner in at[key]]
    at, key = draw.choice(places)
    said = f"{kind} {key}"
    if kind == "whole":
        text = draw.choice(
            (
                *("", "{", "[]", "null", "3", '"text"', "[" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000, "\ufeff{}"),
                json.dumps(config)[:-9],
                json.dumps(_deep(60)),
            )
        )
        path.write_text(text, encoding="utf-8")
        return f"whole {text[:12]}"
    if kind == "drop":
        del at[key]
    elif kind == "rename":
        at[draw.choice((key.upper(), key + " ", ""))] = at.pop(key)
    elif kind == "value":
        at[key] = draw.choice(VALUES)
        said = f"{key} = {str(at[key])[:30]!r}"
    text = json.dumps(config)
    if kind == "twice":
        name = draw.choice(list(config))
        text = text[:-1] + f", {json.dumps(name)}: {json.dumps(draw.choice(VALUES[:10]))}}}"
    path.write_text(text)
    return said


# ---- what comes of it ----


@dataclass(frozen=True)
class Outcome:
    """What came of one damaged folder."""

    what: str
    """the format, and the damage"""
    kind: str
    """`refused`, `same` (as before the damage), `right` (as the equation), or a fault"""
    detail: str = ""

    @property
    def fault(self) -> bool:
        return self.kind not in ("refused", "same", "right")


def computed(sae: SAE) -> Evaluated:
    x = torch.from_numpy(X)
    with torch.no_grad():
        return sae.encode(x).numpy(), sae(x).numpy()


def alike(one: Evaluated, other: Evaluated) -> bool:
    """Up to weights that are folded into each other in float32."""

    def close(a: np.ndarray, b: np.ndarray) -> bool:
        size = np.abs(b[np.isfinite(b)]).max(initial=1)
        return a.shape == b.shape and np.allclose(a, b, rtol=0, atol=1e-5 * size, equal_nan=True)

    return all(close(a, b) for a, b in zip(one, other, strict=True))


def loaded(folder: Path, options: Mapping[str, Any]) -> SAE:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_sae(folder, dtype=torch.float64, **options)


def attempt(valid: Format, folder: Path, seed: int, number: int) -> Outcome:
    """Damage one folder and load it."""
    draw = random.Random(f"{seed}/{number}")
    write_format(folder, valid)
    before = computed(loaded(folder, valid.options))
    done = [draw.choice((damage_bytes, damage_tensors, damage_config))(folder, valid, draw)]
    for _ in range(draw.choice((0, 0, 0, 1))):
        done.append(draw.choice((damage_bytes, damage_config))(folder, valid, draw))
    what = f"#{number} {valid.name}: {', '.join(done)}"
    try:
        found = computed(loaded(folder, valid.options))
    except SAEError as error:
        said = str(error)
        if str(folder) not in said or not said.isprintable():
            return Outcome(what, "an error that does not name the file on one line", said)
        return Outcome(what, "refused", said)
    except Exception:
        return Outcome(what, "traceback", traceback.format_exc())
    if all(np.array_equal(a, b) for a, b in zip(before, found, strict=True)):
        return Outcome(what, "same")
    try:
        config = folder / valid.config_file
        settings = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
        with np.errstate(all="ignore"):
            expected = valid.evaluate(read(folder, valid.file), settings, X)
    except Exception:
        return Outcome(what, "loaded, and cannot be", traceback.format_exc())
    return Outcome(what, "right" if alike(found, expected) else "wrong value")


def outcomes(n: int, seed: int, root: Path) -> list[Outcome]:
    """n damaged folders, every format in turn."""
    every = list(FORMATS.values())
    found = []
    for number in range(n):
        found.append(attempt(every[number % len(every)], root / str(number), seed, number))
        shutil.rmtree(root / str(number))
    return found


def main() -> int:
    """Print what came of each kind, and every fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        found = outcomes(given.n, given.seed, Path(root))
    for one in found:
        if one.fault:
            print(f"{one.what}\n  {one.kind}: {one.detail}")
    print(", ".join(f"{count} {kind}" for kind, count in Counter(one.kind for one in found).most_common()))
    return int(any(one.fault for one in found))


if __name__ == "__main__":
    raise SystemExit(main())

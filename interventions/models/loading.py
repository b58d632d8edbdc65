"""Where models come from: the packaged default, a folder or the hub; the same shape with random weights; the LayerNorm counterpart."""

import copy
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from interventions.errors import ModelError
from interventions.models.causal_model import CausalModel, Made
from interventions.models.checkpoints import read_model, read_tokenizer
from interventions.models.fingerprint import fingerprint
from interventions.models.names import COUNTERPART, DEFAULT_MODEL, LAYERNORM_MODEL
from interventions.models.packaged import packaged_model_folder
from interventions.models.weights import canonical_tensors, n_embedded, unembedding
from interventions.models.wrapping import wrap

LAYERNORM_NOTE = "the same weights under LayerNorm: a parity test, not a model trained with LayerNorm"
SPREAD = "auto"
"""as a device: a model over all GPUs, and beyond them in host memory and on the disk, by accelerate"""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """float32, bfloat16 or float16, by name or as torch has it. Raises `ModelError` otherwise."""
    known = {**DTYPES, **{v: v for v in DTYPES.values()}}
    if dtype not in known:
        raise ModelError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    return known[dtype]


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device asked for; None and `auto`: CUDA where there is one, else the CPU. Raises `ModelError` when it is not there."""
    if device is None or device == SPREAD:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise ModelError(f"unknown device {device!r}; expected cpu, cuda or cuda:N") from None
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"device {device} asked for, but torch sees {torch.cuda.device_count()} CUDA devices; use --device cpu"
        )
    return resolved


def load_model(
    name: Any = DEFAULT_MODEL, *, dtype: Any = "float32", device: Any = None, trust_remote_code: bool = False
) -> CausalModel:
    """Load a causal LM: a packaged one, a folder, or a Hugging Face hub id; a live model is wrapped.

    `smollm2-135m` (default): SmolLM2-135M-Instruct, dequantised from Q4_1 once into the cache folder.
    `smollm2-135m-layernorm`: its `layernorm_counterpart`, for parity tests alone.

    dtype: `float32` (default), `bfloat16` or `float16`. device: None takes CUDA where there is one; `auto` spreads the model over all
    GPUs and what they leave over host memory and disk (needs accelerate). trust_remote_code: run
    code that comes with a checkpoint; without it such code never runs. Raises `ModelError` when there is no such model, and as
    `read_model` and `read_tokenizer` do. Warns where the tokenizer has more tokens than the model.
    """
    if not isinstance(name, (str, Path)):
        return wrap(name)
    if str(name) == LAYERNORM_MODEL:
        counterpart = layernorm_counterpart(load_model(DEFAULT_MODEL, dtype=dtype, device=device))
        return _made(counterpart, "loaded", LAYERNORM_MODEL, dtype, False)
    spread = device == SPREAD
    dtype, device = resolve_dtype(dtype), resolve_device(device)
    where, note = os.path.expanduser(name), None
    origin = os.path.abspath(where) if os.path.exists(where) else str(name)
    if where == DEFAULT_MODEL:
        where, note = str(packaged_model_folder()), "SmolLM2-135M-Instruct, dequantised from Q4_1"
    elif not str(name).strip() or (not os.path.exists(where) and str(name).startswith((".", "/", "~"))):
        raise ModelError(
            f"no model folder {str(name)!r}; expected {DEFAULT_MODEL!r}, a folder with config.json or a hub id"
        )
    with _without_bar() if note else nullcontext():  # two seconds from the cache need no bar
        hf: Any = read_model(where, dtype, trust_remote_code, spread)
    tokenizer = read_tokenizer(where, trust_remote_code)
    n_embed = n_embedded(hf)
    if tokenizer is not None and len(tokenizer) > n_embed:
        warnings.warn(
            f"{str(name)!r}: the tokenizer has {len(tokenizer)} tokens, the model {n_embed}; texts with a token from {n_embed} on are "
            "refused; if that is unexpected, look whether the tokenizer is the model's",
            stacklevel=2,
        )
    hf = hf if spread or getattr(hf, "hf_device_map", None) else hf.to(device)
    model = wrap(hf.requires_grad_(False), tokenizer, name=str(name), note=note)
    return _made(model, "loaded", origin, dtype, trust_remote_code, files=_files(where))


def _made(model: CausalModel, *how: Any, files: tuple[Path, ...] = ()) -> CausalModel:
    model.made = Made(how, fingerprint(model.hf), files)
    return model


def _files(where: str) -> tuple[Path, ...]:
    """The files that a folder's or a hub id's weights come from."""
    config = Path(where) / "config.json"
    if not config.is_file():
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(where, "config.json")
        if not isinstance(found, str):
            return ()
        config = Path(found)
    return tuple(path for end in ("*.safetensors", "*.bin", "config.json") for path in sorted(config.parent.glob(end)))


@contextmanager
def _without_bar() -> Iterator[None]:
    """Load without a progress bar, and leave bars on or off as they were."""
    from transformers.utils import logging as library

    shown = library.is_progress_bar_enabled()
    library.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            library.enable_progress_bar()


def untrained(model: CausalModel, seed: int) -> CausalModel:
    """A network of the same configuration with random weights, as its class initialises them.

    An effect that it shows too comes from the architecture, not from training.

    The same weights for the same seed and version of torch, whatever the device; the plain Hugging Face module, whatever
    wraps `model`.
    """
    hf = model.hf
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(hf)(copy.deepcopy(hf.config))
    for weight in fresh.parameters():  # not the buffers: rotary frequencies stay float32, as in a model that is loaded
        weight.data = weight.data.to(model.dtype)
    fresh = fresh.to(model.device).requires_grad_(False).eval()
    found = wrap(fresh, model.tokenizer, name=f"{model.name}, untrained", note=f"random weights, seed {seed}")
    return _made(found, "untrained", model, seed)


def layernorm_counterpart(model: CausalModel) -> CausalModel:
    """The same weights with each RMSNorm made a LayerNorm with zero biases: `StableLmForCausalLM`, rotary on the whole head.

        g·x / √(mean(x²) + ε)   becomes   g·(x − x̄) / √(mean((x − x̄)²) + ε),   x̄ = mean(x) over d_model

    For parity tests alone. It cannot test claims about models trained with LayerNorm: that is RMSNorm after the mean is
    removed, as scale-invariant, and these weights never met it (SmolLM2-135M is about 0.06 nats a token worse). The weights
    are copied, dtype and device kept; the plain Hugging Face module, whatever wraps `model`. Raises `ModelError` for an
    architecture other than Llama, and for a Llama with biases or with heads that do not make up d_model. Source: ours.
    """
    from transformers import AutoModelForCausalLM, StableLmConfig

    config, head = model.config, model.hf.get_output_embeddings()
    if config.model_type != "llama":
        raise ModelError(f"no LayerNorm counterpart of a {config.model_type!r} model ({model.name}); expected 'llama'")
    values = {name: value.detach() for name, value in canonical_tensors(model.base) if value is not None}
    biases = [name for name in values if name.endswith("bias")]
    if biases or (getattr(head, "bias", None) is not None and bool(head.bias.any())):
        raise ModelError(
            f"no LayerNorm counterpart of a Llama with biases ({model.name}: {', '.join(biases[:3]) or 'of the unembedding'}"
            "); expected none"
        )
    heads = config.num_attention_heads * config.head_dim
    if heads != config.hidden_size:
        raise ModelError(
            f"no LayerNorm counterpart of a Llama whose heads span {heads} of {config.hidden_size} dimensions ({model.name}); "
            "expected as many"
        )
    kept = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "attention_dropout"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
    )
    if hasattr(config, "rope_parameters"):
        rotary = {"rope_parameters": {**config.rope_parameters, "partial_rotary_factor": 1.0}}
    else:  # transformers 4
        rotary = {"rope_theta": config.rope_theta, "rope_scaling": config.rope_scaling, "partial_rotary_factor": 1.0}
    settings = {name: getattr(config, name) for name in kept} | rotary
    settings["layer_norm_eps"] = config.rms_norm_eps
    settings["tie_word_embeddings"] = torch.equal(unembedding(model.hf), values["embed_tokens.weight"])
    with torch.random.fork_rng(devices=[]):  # random weights are drawn first, then replaced
        hf = AutoModelForCausalLM.from_config(
            StableLmConfig(**settings), dtype=model.dtype, attn_implementation=model.hf.config._attn_implementation
        )
    norms = [name for name in values if name.endswith("norm.weight")]
    zeros = {name.removesuffix("weight") + "bias": torch.zeros_like(values[name]) for name in norms}
    hf.model.load_state_dict(values | zeros)
    hf.lm_head.load_state_dict({"weight": unembedding(model.hf).detach()})
    note = LAYERNORM_NOTE if model.note is None else f"{model.note}; {LAYERNORM_NOTE}"
    hf = hf.to(model.device).requires_grad_(False).eval()
    found = wrap(hf, model.tokenizer, name=model.name + COUNTERPART, note=note)
    found.counterpart_of = model.weights_hash
    return found

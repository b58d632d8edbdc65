"""Any supported object as one causal language model: Hugging Face, TransformerLens, nnsight."""

import warnings
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from interventions.errors import ModelError
from interventions.models.causal_model import CausalModel
from interventions.models.causality import check_causal
from interventions.models.exclusive import holding
from interventions.models.weights import not_loaded


def wrap(
    model: Any,
    tokenizer: Any = None,
    name: str | None = None,
    note: str | None = None,
    *,
    remote: bool | str = False,
) -> CausalModel:
    """A `CausalModel` around a Hugging Face model, a `TransformerBridge`, an nnsight model, or a `CausalModel` (returned).

    Of a compiled model its original is used, of a PEFT model the model with its active adapters. Nothing is copied or
    changed. remote: let the passes of an nnsight model run elsewhere, as `remote` of its traces does: True on NDIF, a server's
    address, or "local", a rehearsal here. Then `record` and `measure` work at resid_pre and resid_post by traces, metrics by name are
    formed there, and nothing is replayed. Raises `ModelError` for anything else, for weights that are not loaded, for an attention implementation that
    takes no 4-D mask, and for a model that is not causal (see `check_causal`; asked once a model).
    """
    if isinstance(model, CausalModel):
        if remote and remote != model.remote:
            raise ModelError(f"{model.name} is wrapped already; pass remote={remote!r} with the nnsight model itself")
        return model
    origins = {cls.__module__.split(".")[0] for cls in type(model).__mro__}
    if remote and "nnsight" not in origins:
        raise ModelError(
            f"a {type(model).__name__} cannot run remotely; pass an nnsight model, such as TransformersModel(name)"
        )
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
    found = CausalModel(hf, model, wrapper, name, tokenizer, note, remote=remote)
    with holding(found):  # another thread's measurement changes the attention for as long as it takes
        _check(hf, remote=bool(remote))
    if remote and "unknown" in found.weights_hash:
        warnings.warn(
            f"which revision of {found.name} runs remotely is not known, so results cannot record it; open the nnsight model by its hub name",
            stacklevel=2,
        )
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


def _check(hf: PreTrainedModel, remote: bool) -> None:
    """Raise `ModelError` for what can be seen to be no use without running the model."""
    kind = type(hf).__name__
    if getattr(hf.config, "is_encoder_decoder", False):
        raise ModelError(f"cannot use {kind}: an encoder-decoder; expected a decoder-only causal model")
    if hf.get_output_embeddings() is None:
        raise ModelError(f"{kind} has no unembedding; load it with AutoModelForCausalLM")
    if remote:  # what is loaded here runs nothing
        return
    if (name := not_loaded(hf)) is not None:
        raise ModelError(
            f"the model's weights are not loaded ({name} is empty, and accelerate keeps it nowhere); load them first (nnsight: "
            "dispatch=True, or remote=True)"
        )
    attention = getattr(hf.config, "_attn_implementation", None)
    if attention not in ("eager", "sdpa", None) and not str(attention).startswith("mechdiag_"):
        raise ModelError(
            f"attention {attention!r} takes no 4-D mask; load the model with attn_implementation='sdpa' or 'eager'"
        )
    compiled = [n for n, m in hf.named_modules() if hasattr(m, "_orig_mod") or m._compiled_call_impl is not None]
    if compiled:
        raise ModelError(
            f"{compiled[0] or 'the model'} is compiled in place, and hooks do not fire in compiled code; pass the model as it "
            "was before torch.compile"
        )

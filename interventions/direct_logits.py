"""Logits of directions in the residual stream: direct logit attribution, with the scale of the final norm held fixed."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from interventions.edits import norm_read
from interventions.models.weights import unembedding
from interventions.recording import Recording
from interventions.replaying.replay import entering_at


class TokenLogit(NamedTuple):
    """A token and the logit that a direction adds."""

    token: str
    """as `token_text` gives it"""
    logit: float
    """minus the mean over the vocabulary"""


@torch.no_grad()
def direct_logits(
    recording: Recording, directions: Float[Tensor, "row d_model"], size: float
) -> Float[Tensor, "row vocab"]:
    """Logits that a unit of each direction adds at a token whose final residual stream has the given size.

        W_U·(g ∘ d̃)·√d_model/size,   minus its mean over the vocabulary;   d̃ = d under RMSNorm, d − mean(d) under LayerNorm

    g: the final norm's gain. Computed with the model's own norm N, as (N(s·d) − N(0))/s with s·d̃ of that size; a model without a final
    norm gives W_U·d. Soft-capping or scaling of logits is left out. size: ‖x‖ (RMSNorm) or ‖x − mean(x)‖ (LayerNorm). Logits per unit
    of the direction's coefficient, float32, on the model's device. Source: direct logit attribution as commonly used.
    """
    hidden = carried_directly(recording, directions, size)
    logits = hidden @ unembedding(recording.model.hf).float().T
    return logits - logits.mean(dim=-1, keepdim=True)


@torch.no_grad()
def carried_directly(
    recording: Recording, directions: Float[Tensor, "row d_model"], size: float | Float[Tensor, "row 1"]
) -> Float[Tensor, "row d_model"]:
    """What a unit of each direction adds after the final norm, its scale held fixed: (N(s·d) − N(0))/s; see `direct_logits`."""
    model = recording.model
    d = directions.to(model.device, torch.float32)
    scale = size / norm_read(model.norm_kind, d).clamp(min=1e-30)
    stream = torch.cat([torch.zeros_like(d[:1]), scale * d]).to(model.dtype)[None]
    ids = torch.zeros(stream.shape[:2], dtype=torch.long, device=model.device)
    with recording.held(), entering_at(recording, model.n_layers, stream):
        hidden = model.base(input_ids=ids, use_cache=False).last_hidden_state[0].to(model.device).float()
    return (hidden[1:] - hidden[:1]) / scale


def extremes(
    logits: Float[Tensor, "vocab"], n: int, tokenizer: Any
) -> tuple[tuple[TokenLogit, ...], tuple[TokenLogit, ...]]:
    """The n tokens with the largest and the n with the smallest logits, the strongest first."""
    found = []
    for sign in (1, -1):
        top = (sign * logits).topk(min(n, len(logits)))
        pairs = zip(top.indices.tolist(), (sign * top.values).tolist(), strict=True)
        found.append(tuple(TokenLogit(token_text(i, tokenizer), value) for i, value in pairs))
    return found[0], found[1]


def token_text(token: int, tokenizer: Any) -> str:
    """A token decoded alone; its id in angle brackets without a tokenizer and for ids that the tokenizer does not know.

    A dash below 0, which means no token (logits that are not finite).
    """
    if token < 0:
        return "–"
    return str(tokenizer.decode([token])) if has_token(token, tokenizer) else f"⟨{token}⟩"


def has_token(token: int, tokenizer: Any) -> bool:
    """Whether a tokenizer knows an id. Unembeddings are often wider than the tokenizer."""
    if tokenizer is None:
        return False
    named = getattr(tokenizer, "convert_ids_to_tokens", None)
    if named is None:  # one that only decodes
        return True
    try:
        name = named(token)
    except (IndexError, KeyError, OverflowError):  # how tokenizers in Python say it
        return False
    return name is not None and (name != tokenizer.unk_token or token == tokenizer.unk_token_id)

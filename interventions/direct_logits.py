"""What a direction in the stream says of the next token by itself: later blocks left out, the final norm's scale held."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from interventions.edits import norm_read
from interventions.recording import Recording
from interventions.replaying.replay import entering_at


class TokenLogit(NamedTuple):
    """A token and what a direction adds to its logit."""

    token: str
    """as `token_text` gives it"""
    logit: float
    """less the mean over the vocabulary"""


@torch.no_grad()
def direct_logits(
    recording: Recording, directions: Float[Tensor, "row d_model"], size: float
) -> Float[Tensor, "row vocab"]:
    """Logits that a unit of each direction adds at a token whose last stream has the given size.

        W_U·(g ∘ d̃)·√d_model/size,   less its mean over the vocabulary;   d̃ = d under RMSNorm, d − mean(d) under LayerNorm

    g: the final norm's gain. Formed by the norm itself, (N(s·d) − N(0))/s with s·d̃ of that size, so that whatever the model calls
    its gain is in it; a model without a final norm gives W_U·d. Before a head's soft-capping or scaling. size: ‖x‖ or ‖x − mean(x)‖,
    what the final norm divides by but for √d_model. Logits per unit of the direction's coefficient, float32, on the model's device.
    Source: direct logit attribution as commonly used.
    """
    model = recording.model
    d = directions.to(model.device, torch.float32)
    scale = size / norm_read(model.norm_kind, d).clamp(min=1e-30)
    stream = torch.cat([torch.zeros_like(d[:1]), scale * d]).to(model.dtype)[None]
    ids = torch.zeros(stream.shape[:2], dtype=torch.long, device=model.device)
    with entering_at(recording, model.n_layers, stream):
        hidden = model.base(input_ids=ids, use_cache=False).last_hidden_state[0].float()
    logits = (hidden[1:] - hidden[:1]) / scale @ model.hf.get_output_embeddings().weight.float().T
    return logits - logits.mean(dim=-1, keepdim=True)


def extremes(
    logits: Float[Tensor, "vocab"], n: int, tokenizer: Any
) -> tuple[tuple[TokenLogit, ...], tuple[TokenLogit, ...]]:
    """The n tokens whose logits rise most and the n whose logits fall most, the strongest first."""
    found = []
    for sign in (1, -1):
        top = (sign * logits).topk(min(n, len(logits)))
        pairs = zip(top.indices.tolist(), (sign * top.values).tolist(), strict=True)
        found.append(tuple(TokenLogit(token_text(i, tokenizer), value) for i, value in pairs))
    return found[0], found[1]


def token_text(token: int, tokenizer: Any) -> str:
    """A token decoded alone; its id in angle brackets where it has no text: without a tokenizer, and beyond the tokenizer's tokens.

    Below 0, which stands for no token (of logits that are not finite), a dash.
    """
    if token < 0:
        return "–"
    return str(tokenizer.decode([token])) if has_token(token, tokenizer) else f"⟨{token}⟩"


def has_token(token: int, tokenizer: Any) -> bool:
    """Whether a tokenizer knows an id. Heads are often wider than the tokenizer; the logits of the rest belong to no token."""
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

"""Changes of next-token logits, sized, added and compared; a softmax does not see a constant, so they are centred."""

import torch
from jaxtyping import Float
from torch import Tensor

from interventions.metrics import CleanSide, Comparison

Changes = Float[Tensor, "*row vocab"]
Weights = Float[Tensor, "*#row vocab"]
"""p_clean, of the rows' shape or one that broadcasts."""


def centred(change: Changes) -> Changes:
    """Minus the mean over the vocabulary."""
    return change - change.mean(-1, keepdim=True)


def rms(change: Changes, p: Weights) -> Float[Tensor, "*row"]:
    """√(Σ p·Δ²), Δ the vocabulary-centred change of logits, p the clean distribution."""
    return (p * centred(change).square()).sum(-1).sqrt()


def spread(change: Changes, p: Weights) -> Float[Tensor, "*row"]:
    """√(Σ p·(Δ − Σ p·Δ)²): the change in p's own standard deviations; KL ≈ ½·spread² where it is small."""
    return (p * (change - (p * change).sum(-1, keepdim=True)).square()).sum(-1).sqrt()


def cosine(one: Changes, other: Changes, p: Weights) -> Float[Tensor, "*row"]:
    """Cosine of two changes, vocabulary-centred, under the inner product Σ p·a·b; nan where one is 0."""
    one, other = centred(one), centred(other)
    size = (p * one.square()).sum(-1).sqrt() * (p * other.square()).sum(-1).sqrt()
    return torch.where(size > 0, (p * one * other).sum(-1) / size, torch.nan)


def kl_of(clean: Float[Tensor, "vocab"], change: Float[Tensor, "row vocab"]) -> Float[Tensor, "row"]:
    """KL(p ‖ softmax(ℓ + Δℓ)), nats, ℓ the clean logits of one token."""
    return Comparison(CleanSide(clean[None]), clean + change).kl

"""Latents attributed to a probe, and what their ablation does to mean-pooled activations and to probes of these.

The mean over a text's tokens is linear, and so is a decoder: ablating latents S at every token, with the SAE's error kept, changes a text's
mean activation by Δx̄ = −Σ_S z̄_i d_i. No forward pass is needed, and nothing is approximated.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor


def class_effects(
    z: Float[Tensor, "text d_sae"], y: Bool[ndarray, "text"], weight: Float[Tensor, "d_model"], directions: Float[Tensor, "d_sae d_model"]
) -> Float[Tensor, "d_sae"]:  # fmt: skip
    """How much each latent speaks for a class: max(mean z̄ in the class − mean in the rest, 0)·<w, d_i>, w the probe's weights.

    A latent whose mean in the class is negative speaks with its negative polarity: both signs turn. Source: arXiv:2503.09532 and its code;
    negative polarities are ours, and change nothing where z ≥ 0.
    """
    own, rest = _means(z, y)
    side = torch.where(own < 0, -1.0, 1.0).to(own)
    return (side * (own - rest)).clamp(min=0) * side * (directions.to(own) @ weight.to(own))


def attribute_effects(
    z: Float[Tensor, "text d_sae"], y: Bool[ndarray, "text"], weight: Float[Tensor, "d_model"], directions: Float[Tensor, "d_sae d_model"]
) -> Float[Tensor, "d_sae"]:  # fmt: skip
    """How much each latent tells two classes apart: |(mean z̄ in one − mean in the other)·<w, d_i>|. Source: as `class_effects`."""
    own, rest = _means(z, y)
    return ((own - rest) * (directions.to(own) @ weight.to(own))).abs()


def _means(z: Tensor, y: Bool[ndarray, "text"]) -> tuple[Tensor, Tensor]:
    own = torch.from_numpy(y).to(z.device)
    return z[own].double().mean(0), z[~own].double().mean(0)


def largest(effects: Float[Tensor, "d_sae"], most: int) -> Int[Tensor, "latent"]:
    """The latents of the largest effects above 0, at most so many; ties by index."""
    order = effects.argsort(descending=True, stable=True)[:most]
    return order[effects[order] > 0]


def ablated(
    z: Float[Tensor, "text d_sae"], directions: Float[Tensor, "d_sae d_model"], latents: Int[Tensor, "latent"]
) -> Float[Tensor, "text d_model"]:
    """Δx̄ = −Σ z̄_i d_i over the latents."""
    return -(z[:, latents].double() @ directions[latents].double())


def at_dose(
    change: Float[Tensor, "text d_model"], like: Float[Tensor, "text d_model"]
) -> Float[Tensor, "text d_model"]:
    """A change scaled to the norm of another, text by text; 0 where it is 0 itself."""
    own, wanted = (delta.norm(dim=-1, keepdim=True) for delta in (change, like))
    return torch.where(own > 0, change * (wanted / own), torch.zeros_like(change))


def projected_out(
    x: Float[Tensor, "text d_model"], weight: Float[Tensor, "d_model"], among: Int[ndarray, "train"]
) -> Float[Tensor, "text d_model"]:
    """Δx̄ that takes x̄ along a probe's weights to its mean over some texts: −<x̄ − mean, ŵ> ŵ."""
    unit = (weight / weight.norm()).to(x)
    centred = x - x[torch.from_numpy(among).to(x.device)].mean(0)
    return -(centred @ unit)[:, None] * unit


def changes(
    z: Float[Tensor, "text d_sae"], directions: Float[Tensor, "d_sae d_model"], selected: Int[Tensor, "latent"],
    lot: Int[Tensor, "other"], ks: tuple[int, ...],
) -> Mapping[tuple[str, int], tuple[int, Float[Tensor, "text d_model"]]]:  # fmt: skip
    """Number of latents and Δx̄ of each (kind, k): the first k selected, and the first k of the lot scaled to the same ‖Δx̄‖."""
    found = {}
    for k in ks:
        own = ablated(z, directions, selected[:k])
        found["selected", k] = len(selected[:k]), own
        found["random", k] = len(lot[:k]), at_dose(ablated(z, directions, lot[:k]), own)
    return found

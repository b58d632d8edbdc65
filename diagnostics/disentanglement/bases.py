"""Directions through which activations are exchanged, and which of them are chosen for an attribute.

A basis has directions `d_i` and coefficients `c_i(x)`; an exchange of the set S between a base and a source is

    x_base + Σ_S (c_i(x_source) − c_i(x_base)) d_i

Of an SAE c = z, of either sign, and what it does not explain stays. Of orthonormal directions c = <x, d_i>.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

RIDGE = 1e-2
"""of the other attributes' gradients, as a share of their mean eigenvalue"""


@dataclass(frozen=True)
class Basis:
    """Directions and the coefficients of each unit."""

    directions: Float[Tensor, "i d_model"]
    coefficients: Float[Tensor, "unit i"]

    def differences(self, base: Int[Tensor, "pair"], source: Int[Tensor, "pair"]) -> Float[Tensor, "pair i"]:
        """c(x_source) − c(x_base)."""
        return self.coefficients[source] - self.coefficients[base]


def principal(x: Float[Tensor, "unit d_model"], fitted_on: Int[Tensor, "some"]) -> Basis:
    """Principal components of the activations of some units, the largest first."""
    some = x[fitted_on]
    rows = torch.linalg.svd(some - some.mean(0), full_matrices=False).Vh[: len(some) - 1]
    return Basis(rows, x @ rows.T)


def read_subspace(
    x: Float[Tensor, "unit d_model"], gradients: Float[Tensor, "attribute pair d_model"], target: int
) -> Basis:
    """Orthonormal directions that the target's logit difference reads and the others' do not, the best first.

        G_t v = λ (mean over others of G_o + ρ I) v,   G_a = Σ g gᵀ / Σ ‖g‖² over pairs,   ρ = RIDGE · its mean eigenvalue

    made orthonormal in turn, so that the first k span the k best. As many as there are pairs. Source: ours, a linear answer to DAS
    (arXiv:2303.02536) without gradient descent.
    """
    grams = torch.stack([g.T @ g / g.square().sum() for g in gradients.double()])
    others = [a for a in range(len(grams)) if a != target]
    rest = grams[others].mean(0)
    rest = rest + RIDGE * rest.diagonal().mean() * torch.eye(len(rest)).to(rest)
    half = torch.linalg.inv(torch.linalg.cholesky(rest))
    best = torch.linalg.eigh(half @ grams[target] @ half.T).eigenvectors.flip(1)[:, : gradients.shape[1]]
    rows = torch.linalg.qr(half.T @ best).Q.T.to(x)
    return Basis(rows, x @ rows.T)


def attributed(
    basis: Basis, x: Float[Tensor, "unit d_model"], gradients: Float[Tensor, "attribute pair d_model"], base: Int[Tensor, "pair"],
    source: Int[Tensor, "pair"],
) -> Float[Tensor, "attribute i"]:  # fmt: skip
    """The share of each attribute's change that each direction is given credit for: a sum over directions of 1 if they span x.

    a_i = Σ_pairs <g, d_i>·(c_i(source) − c_i(base)) / Σ_pairs <g, x_source − x_base>
    """
    moved = basis.differences(base, source)
    own = torch.stack([((g @ basis.directions.T) * moved).sum(0) for g in gradients])
    whole = torch.stack([(g * (x[source] - x[base])).sum() for g in gradients])
    return own / whole[:, None]


def ordered(credit: Float[Tensor, "attribute i"], target: int) -> Int[Tensor, "i"]:
    """Directions by a_i of the target − mean over other attributes of max(a_i, 0), the largest first; ties by index."""
    others = [a for a in range(len(credit)) if a != target]
    return (credit[target] - credit[others].clamp(min=0).mean(0)).argsort(descending=True, stable=True)


def exchanged(
    directions: Float[Tensor, "i d_model"], moved: Float[Tensor, "pair i"], chosen: Int[Tensor, "k"] | Int[Tensor, "pair k"]
) -> Float[Tensor, "pair d_model"]:  # fmt: skip
    """Σ_S moved_i d_i, S the same for all pairs or one for each."""
    if chosen.ndim == 1:
        return moved[:, chosen] @ directions[chosen]
    return (moved.gather(1, chosen)[..., None] * directions[chosen]).sum(1)


def random_of_differing(moved: Float[Tensor, "pair i"], most: int, stream: torch.Generator) -> Int[Tensor, "pair most"]:
    """For each pair latents at random among those that differ between its base and source; then the others. The first k: a draw of k."""
    key = torch.rand(moved.shape, generator=stream).to(moved.device) + (moved != 0).to(moved)
    return key.argsort(dim=1, descending=True)[:, :most]


def at_dose(
    change: Float[Tensor, "pair d_model"], like: Float[Tensor, "pair d_model"]
) -> Float[Tensor, "pair d_model"]:
    """A change scaled to the norm of another; nan where it is 0 and the other is not."""
    wanted, own = (delta.norm(dim=-1, keepdim=True) for delta in (like, change))
    return torch.where(wanted == 0, torch.zeros_like(change), change * (wanted / own))

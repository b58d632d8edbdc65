"""Exchanges learned by gradient descent on training pairs: a mask of latents, and a subspace (the published forms).

    loss = CE(the source's value of the target) + mean over other attributes of CE(the base's value)

The derivative in the vector that is put in comes from replay; the rest is the chain rule.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

RATE, COLDEST, BATCH = 0.1, 1e-2, 8
"""Adam's step; the last temperature of the mask, which falls from 1 on a log scale; pairs in a step."""
DIRECTIONS = 16
"""of the learned subspace"""

Slope = Callable[[Int[Tensor, "some"], Float[Tensor, "some d_model"]], Float[Tensor, "some d_model"]]
"""∂loss/∂Δx of some training pairs, where Δx is added."""


def learned_mask(
    moved: Float[Tensor, "pair i"],
    directions: Float[Tensor, "i d_model"],
    slope: Slope,
    steps: int,
    stream: torch.Generator,
) -> Int[Tensor, "chosen"]:
    """Latents of a binary mask: those with m_i > 0 after Δx = Σ σ(m_i/T) moved_i d_i was fitted, T falling, m from 0.

    Latents that differ in no training pair stay at 0: not chosen. Source: differential binary masking in RAVEL, arXiv:2402.17700, as in SAEBench.
    """
    mask = torch.zeros(moved.shape[1]).to(moved).requires_grad_(True)
    _descend(
        [mask],
        lambda some, cold: (torch.sigmoid(mask / cold) * moved[some]) @ directions,
        slope,
        len(moved),
        steps,
        stream,
    )
    return (mask.detach() > 0).nonzero()[:, 0]


def learned_subspace(
    moved: Float[Tensor, "pair d_model"], slope: Slope, steps: int, stream: torch.Generator
) -> Float[Tensor, "direction d_model"]:
    """Orthonormal rows Q of Δx = Qᵀ Q moved, fitted from a random start. Source: distributed alignment search, arXiv:2303.02536."""
    free = torch.randn(moved.shape[1], min(DIRECTIONS, moved.shape[1]), generator=stream).to(moved).requires_grad_(True)

    def change(some: Tensor, _: float) -> Tensor:
        q = torch.linalg.qr(free).Q
        return moved[some] @ q @ q.T

    _descend([free], change, slope, len(moved), steps, stream)
    return torch.linalg.qr(free.detach()).Q.T


def _descend(
    parameters: Sequence[Tensor], change: Callable[[Tensor, float], Tensor], slope: Slope, n: int, steps: int, stream: torch.Generator
) -> None:  # fmt: skip
    optimiser = torch.optim.Adam(parameters, lr=RATE)
    for step in range(steps):
        some = torch.randperm(n, generator=stream)[:BATCH]
        with torch.enable_grad():
            delta = change(some, COLDEST ** (step / max(1, steps - 1)))
        optimiser.zero_grad()
        delta.backward(slope(some, delta.detach()) / len(some))
        optimiser.step()

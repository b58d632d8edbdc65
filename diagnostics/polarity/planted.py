"""Planted antipodal pairs: directions +u_j and −u_j, and how often both are on. Our reconstruction of arXiv:2605.28149."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

SMALLEST, LARGEST = 0.5, 1.5
"""Amplitudes are drawn evenly between these."""


class Rows(NamedTuple):
    """Planted activations and what they were made of."""

    x: Float[Tensor, "row d_model"]
    amplitude: Float[Tensor, "row pair"]
    """net signed amplitude along u_j: a⁺_j − a⁻_j, 0 where neither polarity is on"""
    alone: Bool[Tensor, "row pair 2"]
    """the polarity (+, −) is on and the other is off"""


@dataclass(frozen=True)
class Planted:
    """x = Σ_j (o⁺_j a⁺_j − o⁻_j a⁻_j) u_j + noise,   a drawn evenly from .5 to 1.5, o ∈ {0, 1}.

    A pair is active with probability `active`/pairs, independently of others. In an active pair the two indicators o⁺ and o⁻ are on with
    probability 1/2 each and have correlation ρ: one alone with (1 − ρ)/4 each, both or neither with (1 + ρ)/4 each. So at ρ = −1
    exactly one polarity of an active pair is on, at 0 they are independent of each other (given that the pair is active), and each
    polarity is on equally often at every ρ. Our reconstruction.
    """

    directions: Float[Tensor, "pair d_model"]
    """u_j, of norm 1"""
    active: float
    """mean number of active pairs a row"""
    rho: float
    noise: float
    """standard deviation of each coordinate's noise"""
    one_sided: int = 0
    """so many pairs, the first ones, have + on whenever they are active, and never −"""

    def draw(self, rows: int, generator: torch.Generator) -> Rows:
        """So many rows. generator: on the CPU, so that the draw is the same on every device."""
        pairs = len(self.directions)
        on = (torch.rand(rows, pairs, generator=generator) < self.active / pairs)[..., None]
        u, alone = torch.rand(rows, pairs, generator=generator), (1 - self.rho) / 4
        both = u >= 1 - (1 + self.rho) / 4
        on = on & torch.stack([(u < alone) | both, ((u >= alone) & (u < 2 * alone)) | both], dim=-1)
        if self.one_sided:
            on[:, : self.one_sided, 0] |= on[:, : self.one_sided, 1]
            on[:, : self.one_sided, 1] = False
        size = SMALLEST + (LARGEST - SMALLEST) * torch.rand(rows, pairs, 2, generator=generator)
        return self._made(on, size, generator)

    def turned(self, rows: int, generator: torch.Generator) -> tuple[Rows, Rows]:
        """Rows in which one one-sided pair, drawn at random, is on: as always (+), and the same rows with − in its place.

        Of data with one-sided pairs.
        """
        assert self.one_sided
        plain = self.draw(rows, generator)
        which = torch.randint(self.one_sided, (rows,), generator=generator).to(plain.x.device)
        size = (SMALLEST + (LARGEST - SMALLEST) * torch.rand(rows, generator=generator)).to(plain.x)
        row = torch.arange(rows, device=plain.x.device)
        found = []
        for sign in (1, -1):
            amplitude, alone = plain.amplitude.clone(), plain.alone.clone()
            amplitude[row, which] = sign * size
            alone[row, which] = torch.tensor([sign > 0, sign < 0], device=alone.device)
            x = plain.x + (amplitude - plain.amplitude) @ self.directions
            found.append(Rows(x, amplitude, alone))
        return found[0], found[1]

    def _made(self, on: Tensor, size: Tensor, generator: torch.Generator) -> Rows:
        u = self.directions
        noise = self.noise * torch.randn(len(on), u.shape[1], generator=generator)
        amplitude = ((on * size) @ torch.tensor([1.0, -1.0])).to(u)
        return Rows(amplitude @ u + noise.to(u), amplitude, (on & ~on.flip(-1)).to(u.device))


def spread_directions(pairs: int, d_model: int, generator: torch.Generator) -> Float[Tensor, "pair d_model"]:
    """Directions of norm 1 that overlap little: orthogonal up to `d_model` of them, beyond that the rows of a random tight frame.

    (Rows, set to norm 1, of `d_model` columns of a random orthogonal matrix: their mean squared cosine is about the least possible,
    (pairs − d_model)/(d_model (pairs − 1)).)
    """
    n = max(pairs, d_model)
    frame = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0][:pairs, :d_model]
    return (frame / frame.norm(dim=1, keepdim=True)).float()


def least_cosine(pairs: int, d_model: int) -> float:
    """The least root mean square cosine that so many directions can have (Welch's bound); 0 up to `d_model` of them."""
    return math.sqrt(max(0, pairs - d_model) / (d_model * max(1, pairs - 1)))

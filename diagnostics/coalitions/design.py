"""Shapley values and interaction indices of a game, from every coalition or from sampled orders.

v(S): what coalition S is worth, v(∅) = 0. Coalitions are numbered by their bits: member i is in S where bit i is 1.
"""

from math import factorial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy import stats

from diagnostics.sampling.tokens import generator

Game = Float[ndarray, "coalition"]
EXACT, EXACT_ALONE = 10, 16
"""Most components whose every coalition is run: for several pairs, for a single one."""


def members(n: int) -> Bool[ndarray, "coalition component"]:
    """Who is in each of the 2ⁿ coalitions."""
    return (np.arange(2**n)[:, None] >> np.arange(n)) % 2 == 1


def shapley_values(v: Game) -> Float[ndarray, "component"]:
    """φ_i = Σ over S without i of s!(n−s−1)!/n! · (v(S∪i) − v(S)), s = |S|; Σ φ = v(N) − v(∅). Source: Shapley 1953."""
    inside = members(n := _players(v))
    weight = np.array([factorial(s) * factorial(n - s - 1) / factorial(n) for s in range(n)] + [0.0])
    size, every = inside.sum(axis=1), np.arange(len(v))
    found = np.empty(n)
    for i in range(n):
        without = every[~inside[:, i]]
        found[i] = (weight[size[without]] * (v[without | 1 << i] - v[without])).sum()
    return found


def interaction_indices(v: Game) -> Float[ndarray, "component component"]:
    """I_ij = Σ over S without i and j of s!(n−s−2)!/(n−1)! · (v(S∪ij) − v(S∪i) − v(S∪j) + v(S)); 0 on the diagonal.

    Above 0: the two do more together than apart; below: each does what the other does too. Source: Grabisch & Roubens 1999.
    """
    inside = members(n := _players(v))
    weight = np.array([factorial(s) * factorial(max(0, n - s - 2)) / factorial(n - 1) for s in range(n + 1)])
    size, every = inside.sum(axis=1), np.arange(len(v))
    found = np.zeros((n, n))
    for i in range(n):
        for j in range(i):
            without = every[~inside[:, i] & ~inside[:, j]]
            joint = v[without | 1 << i | 1 << j] - v[without | 1 << i] - v[without | 1 << j] + v[without]
            found[i, j] = found[j, i] = (weight[size[without]] * joint).sum()
    return found


def _players(v: Game) -> int:
    n = len(v).bit_length() - 1
    assert len(v) == 2**n and n >= 1
    return n


class Orders(NamedTuple):
    """Components in sampled orders, and the coalitions that arise as they join one by one."""

    order: Int[ndarray, "sample component"]
    """order[p, k]: who joins as number k"""
    coalition: Bool[ndarray, "coalition component"]
    """each distinct coalition once"""
    number: Int[ndarray, "sample step"]
    """which coalition stands after each step, from the empty one on"""

    @classmethod
    def drawn(cls, n: int, samples: int, *seed: object) -> "Orders":
        """Uniform orders, drawn by a seed and labels, each followed by its reverse (antithetic; an even number of samples)."""
        draw = generator(*seed)
        half = np.stack([torch.randperm(n, generator=draw).numpy() for _ in range((samples + 1) // 2)])
        order = np.stack([half, half[:, ::-1]], axis=1).reshape(-1, n)
        joined = np.argsort(order, axis=1)[:, None] < np.arange(n + 1)[:, None]
        coalition, number = np.unique(joined.reshape(-1, n), axis=0, return_inverse=True)
        return cls(order, coalition, number.reshape(len(order), n + 1))

    def estimates(self, v: Game) -> tuple[Float[ndarray, "component"], Float[ndarray, "component"]]:
        """Shapley values and their standard errors over orders, from the worth of each of `coalition`.

        An order and its reverse count as one draw.
        """
        steps = np.diff(v[self.number], axis=1)
        gains = np.take_along_axis(steps, np.argsort(self.order, axis=1), axis=1)
        draws = gains.reshape(-1, 2, gains.shape[1]).mean(axis=1)
        return draws.mean(axis=0), draws.std(axis=0, ddof=1) / np.sqrt(len(draws))

    @property
    def t(self) -> float:
        """Student's quantile for a 95 % interval."""
        return float(stats.t.ppf(0.975, len(self.order) // 2 - 1))

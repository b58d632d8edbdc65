"""Rank correlation of a weighted sample: of things drawn unequally, each standing for so many."""

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from interventions.errors import ResultError


def mid_ranks(x: Float[ndarray, "row"], weight: Float[ndarray, "row"]) -> Float[ndarray, "row"]:
    """The rank of each value where every row stands for `weight` equal ones; ties share the middle of their ranks.

        r_i = Σ_{x_j < x_i} w_j + (1 + Σ_{x_j = x_i} w_j) / 2

    x: finite. With weights of 1 these are the usual mid-ranks, from 1. Source: ours.
    """
    _, at = np.unique(x, return_inverse=True)
    total = np.bincount(at, weight)
    return (np.cumsum(total) - total + (1 + total) / 2)[at]


def weighted_spearman(
    x: Float[ndarray, "row"], y: Float[ndarray, "row"], weight: Float[ndarray, "row"] | None = None
) -> float:
    """Spearman's correlation of x and y over what the rows stand for: Pearson's, weighted, of weighted mid-ranks.

        Σ w (r − r̄)(s − s̄) / √(Σ w (r − r̄)² · Σ w (s − s̄)²),   r, s: `mid_ranks` of x, y;   r̄ = Σ w r / Σ w

    For whole weights it is Spearman's correlation with each row repeated `weight` times; without weights, of the rows as they are.
    nan where either is constant. Raises `ResultError` for lengths that differ, values that are not finite, weights not above 0.
    Source: ours.
    """
    w = np.ones(len(x)) if weight is None else weight
    if not len(x) == len(y) == len(w) or not np.isfinite([x, y, w]).all() or (w <= 0).any():
        raise ResultError(
            f"x, y and weights of lengths {len(x)}, {len(y)}, {len(w)}; expected finite numbers, a row each, weights above 0"
        )
    a, b = (r - np.average(r, weights=w) for r in (mid_ranks(x, w), mid_ranks(y, w)))
    size = np.sqrt((w * a * a).sum() * (w * b * b).sum())
    return float((w * a * b).sum() / size) if size > 0 else np.nan

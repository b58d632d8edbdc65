"""Poisson pseudo-likelihood with an intercept for each group, refitted without each prompt."""

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy import ndarray


def varies(column: Float[ndarray, "row"], group: Int[ndarray, "row"]) -> bool:
    """Whether a column differs within a group by more than rounding: in a context of one token positions do not."""
    _, first, i = np.unique(group, return_index=True, return_inverse=True)
    return not bool((np.abs(column - column[first][i]) <= 1e-9 * np.abs(column).max(initial=0)).all())


def sums_without(
    values: Float[ndarray, "row"], group: Int[ndarray, "row"], prompt: Int[ndarray, "row"]
) -> Float[ndarray, "deletion group"]:
    """Sums within groups on all rows and without each prompt, as `GroupSums` orders them."""
    groups, i = np.unique(group, return_inverse=True)
    prompts, g = np.unique(prompt, return_inverse=True)
    parts = np.bincount(g * len(groups) + i, values, len(groups) * len(prompts)).reshape(len(prompts), len(groups))
    whole = parts.sum(axis=0)
    left = np.vstack([whole[None], whole - parts])
    # What a subtraction leaves of an exact zero is rounding error.
    return np.where(np.abs(left) <= 1e-13 * np.abs(parts).sum(axis=0), 0.0, left)


def poisson_slopes(
    y: Float[ndarray, "row"],
    x: Float[ndarray, "row k"],
    group: Int[ndarray, "row"],
    prompt: Int[ndarray, "row"],
    group_weight: pd.Series,
) -> Float[ndarray, "deletion k"]:
    """Slopes of log E[y] = α_group + x·β by Poisson pseudo-likelihood, on all rows and without each prompt.

    Maximises Σ_i w_i Σ_t (y log m − m), m = e^{α_i + x·β}, which asks nothing of y ≥ 0 but that its mean is m. With the
    intercepts maximised out it is Σ_i w_i [Σ_t y·(x·β) − (Σ_t y)·log Σ_t e^{x·β}], concave in the slopes. Newton's
    method (steps halved where they overshoot) from 0 on all rows, and from there for all deletions together, until no
    slope moves by 1e-9 of a standard deviation of its column: deletions are refitted, not approximated.

    group_weight: w by group. nan where the slopes are not determined or have no finite maximum.
    Source: Gourieroux, Monfort & Trognon 1984; the profile is ours.
    """
    n_prompts, k = len(np.unique(prompt)), x.shape[1]
    if not (y > 0).any() or not all(varies(column, group) for column in x.T):
        return np.full((n_prompts + 1, k), np.nan)
    order = np.argsort(group, kind="stable")
    groups, i, count = np.unique(group[order], return_inverse=True, return_counts=True)
    g, y, x = np.unique(prompt, return_inverse=True)[1][order], y[order], x[order]
    y = y * group_weight.loc[groups].to_numpy(float)[i]
    y = y / y.sum()
    x = x - np.column_stack([np.bincount(i, column) / count for column in x.T])[i]
    scale = np.sqrt((x * x).mean(axis=0))
    x = x / scale
    moments = np.column_stack([np.ones(len(x)), x, (x[:, :, None] * x[:, None, :]).reshape(len(x), -1)])
    blocks = [slice(end - n, end) for n, end in zip(count, np.cumsum(count), strict=True)]
    total = sums_without(y, i, g)
    linear = np.stack([sums_without(y * column, np.zeros_like(i), g)[:, 0] for column in x.T], axis=-1)

    def at(beta: Float[ndarray, "deletion k"], out: Int[ndarray, "deletion"]) -> tuple[ndarray, ndarray, ndarray]:
        """The likelihood, its gradient and its negative Hessian without the prompts `out` (−1: none)."""
        value, gradient = (linear[out + 1] * beta).sum(axis=1), linear[out + 1]
        square = np.zeros((len(beta), k, k))
        for j, block in enumerate(blocks):
            eta, here = beta @ x[block].T, total[out + 1, j]
            top = eta.max(axis=1, keepdims=True)
            sums = (np.exp(eta - top) * (g[block] != out[:, None])) @ moments[block]
            left = np.where(sums[:, 0] > 0, sums[:, 0], 1.0)  # nothing: a group of this prompt alone, with total 0
            mean = sums[:, 1:] / left[:, None]
            first, second = mean[:, :k], mean[:, k:].reshape(-1, k, k)
            value = value - here * (np.log(left) + top[:, 0])
            gradient = gradient - here[:, None] * first
            square += here[:, None, None] * (second - first[:, :, None] * first[:, None, :])
        return value, gradient, square

    def climb(beta: Float[ndarray, "deletion k"], out: Int[ndarray, "deletion"]) -> Float[ndarray, "deletion k"]:
        value, gradient, square = at(beta, out)
        step, found = np.zeros_like(beta), np.zeros((len(beta), 1), dtype=bool)
        for _ in range(50):
            known = np.linalg.eigvalsh(square)[:, :1] > 1e-9 * np.trace(square, axis1=1, axis2=2)[:, None]
            square = np.where(known[..., None], square, np.eye(k))
            step = np.where(known, np.linalg.solve(square, gradient[..., None])[..., 0], 0.0)
            found = known & (np.abs(step).max(axis=1, keepdims=True) <= 1e-9)
            if (found | ~known).all():
                break
            there = at(beta + step, out)
            while (over := there[0] < value - 1e-12 * (1 + np.abs(value))).any():
                step[over] /= 2
                there = at(beta + step, out)
            beta, (value, gradient, square) = beta + step, there
        return np.where(found, beta + step, np.nan)

    full = climb(np.zeros((1, k)), np.array([-1]))
    return np.vstack([full, climb(np.repeat(np.nan_to_num(full), n_prompts, axis=0), np.arange(n_prompts))]) / scale

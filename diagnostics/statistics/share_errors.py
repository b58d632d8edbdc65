"""Errors of the share of latents whose margin is above 0. The share is a step function, which a jackknife cannot handle.

The margins are smooth: their jackknife, with the correlations between latents, is propagated through the step.
"""

from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy import stats

from diagnostics.statistics.estimate import MIN_PROMPTS, Estimate, effective_number, log_odds_interval

_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(20)


def pulled(z: Float[ndarray, "unit"]) -> Float[ndarray, "unit"]:
    """z, each with an error of variance 1, pulled to their mean until their spread is that of the true ones."""
    if len(z) < 2:
        return z
    centre, spread = z.mean(), z.var(ddof=1)
    return centre + (z - centre) * np.sqrt(max(0.0, 1 - 1 / spread)) if spread > 0 else z


def sign_covariance(
    margin: Float[ndarray, "deletion unit"], present: Int[ndarray, "prompt unit"], family: Int[ndarray, "unit"]
) -> Float[ndarray, "unit unit"]:
    """The covariance of the indicators that margins are above 0, from their jackknife: see `win_rates`."""
    here = present > 0
    count = here.sum(axis=0)
    with np.errstate(all="ignore"):
        centre = np.where(here, margin[1:], 0.0).sum(axis=0) / count
        step = np.where(here, margin[1:] - centre, 0.0) * np.sqrt((count - 1) / count)
        se = np.sqrt((step * step).sum(axis=0))
        z = np.clip(margin[0] / se, -20, 20)
    known = np.isfinite(se) & (se > 0)
    step, z = np.where(known, step / np.where(known, se, 1.0), 0.0), np.where(known, z, 0.0)
    for name in np.unique(family):
        z[known & (family == name)] = pulled(z[known & (family == name)])
    correlation = np.clip(step.T @ step, -1, 1)
    np.fill_diagonal(correlation, 1.0)
    # P(both above 0) − P·P is the integral of the bivariate normal density over the correlation, from 0 up.
    top, square, product = np.arcsin(correlation), z[:, None] ** 2 + z**2, np.outer(z, z)
    total = np.zeros_like(top)
    for node, weight in zip(_NODES, _NODE_WEIGHTS, strict=True):
        sine = np.sin(top * (1 + node) / 2)
        total += weight * np.exp(-(square - 2 * product * sine) / (2 * (1 - sine * sine)))
    return total * top / (4 * np.pi)


def linear(
    value: float, contrast: Float[ndarray, "unit"], covariance: Float[ndarray, "unit unit"],
    present: Int[ndarray, "prompt unit"],
) -> Estimate:  # fmt: skip
    """Σ contrast·indicator with its interval; units whose contrast is 0 do not enter."""
    used = present[:, contrast != 0]
    n_rows, n_prompts, effective = (
        int(used.sum()),
        int((used.sum(axis=1) > 0).sum()),
        effective_number(used.sum(axis=1)),
    )
    if effective < MIN_PROMPTS:
        return Estimate(value, np.nan, np.nan, np.nan, n_rows, n_prompts, n_effective=effective)
    se = float(np.sqrt(max(contrast @ covariance @ contrast, 0.0)))
    half = float(stats.t.ppf(0.975, effective - 1)) * se
    ends = (value - half, value + half, se)
    return Estimate(value, *ends, n_rows, n_prompts, df=effective - 1, n_effective=effective)


def clopper_pearson(k: int, n: int) -> tuple[float, float]:
    if not n:
        return np.nan, np.nan
    low = float(stats.beta.ppf(0.025, k, n - k + 1)) if k else 0.0
    return low, float(stats.beta.ppf(0.975, k + 1, n - k)) if k < n else 1.0


def share_of(
    wins: Bool[ndarray, "unit"], weight: Float[ndarray, "unit"], covariance: ndarray, present: ndarray
) -> Estimate:
    """The weighted share of units that win, with an interval within [0, 1]; units of weight 0 do not enter."""
    total = weight.sum()
    if not total:
        return Estimate(np.nan, np.nan, np.nan, np.nan, 0, 0)
    found = linear(float(weight[wins].sum() / total), weight / total, covariance, present)
    return found if np.isnan(found.low) else replace(found, **_within(found))


def _within(share: Estimate) -> dict[str, float]:
    """Ends within [0, 1]: logit p ± t·SE/(p(1 − p)); of a share of exactly 0 or 1, whose other end is exp(−t·SE) away, or 1 − that."""
    value, half = share.value, share.high - share.value
    if value * (1 - value) < 1e-12:
        return {"low": 0.0, "high": 1 - np.exp(-half)} if value < 0.5 else {"low": np.exp(-half), "high": 1.0}
    return dict(zip(("low", "high"), log_odds_interval(value, half), strict=True))

"""Means over latents drawn from a dictionary, of values that are measured on prompts."""

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy import stats

from diagnostics.statistics.estimate import MIN_PROMPTS, Estimate, effective_number

MIN_LATENTS = 10
"""Fewer latents give no interval."""


def mean_over_latents(
    value: Float[ndarray, "latent"],
    without: Float[ndarray, "prompt latent"],
    weight: Float[ndarray, "latent"],
    stratum: Int[ndarray, "latent"],
    bounds: tuple[float, float] = (-np.inf, np.inf),
) -> Estimate:
    """θ = Σ w v / Σ w over latents drawn in strata, with an interval for the latents drawn and the prompts read.

        SE² = (n − 1)/n Σ_g (θ₍g₎ − θ̄)²  +  Σ_s (W_s/W)² (1 − 1/w_s) s_s² / n_s

    First part: delete-one-prompt jackknife with these latents. Second: variance between the n_s latents of a stratum, of weight w_s
    each (a stratum drawn whole adds none); it holds part of the first again, so that the interval is a little wide. t with the
    smaller of n_prompts − 1 and n_latents − n_strata degrees of freedom. value: of each latent; nan where undefined: these latents
    are left out, as in each deletion. without: the same without each prompt. bounds: between which a value lies; the interval is cut
    there. n_rows counts the latents of the mean.
    No interval below 10 prompts or 10 latents. Source: ours.
    """
    known = np.isfinite(value)
    v, w, s = value[known], weight[known], stratum[known]
    n_prompts = len(without)
    if not len(v):
        return Estimate(np.nan, np.nan, np.nan, np.nan, 0, n_prompts, n_effective=float(n_prompts))
    theta = float(np.average(v, weights=w))
    size = {"n_rows": len(v), "n_prompts": n_prompts, "n_effective": float(n_prompts)}
    strata = np.unique(s)
    if n_prompts < MIN_PROMPTS or len(v) < MIN_LATENTS or len(v) <= len(strata):
        return Estimate(theta, np.nan, np.nan, np.nan, **size)
    there = np.isfinite(without)
    weighted = np.where(there, weight, 0.0)
    left = (np.where(there, without, 0.0) * weighted).sum(1) / weighted.sum(1)
    variance = (n_prompts - 1) / n_prompts * float(((left - left.mean()) ** 2).sum())
    pooled = float(v.var(ddof=1))  # of a stratum with a single latent
    for i in strata:
        own, own_w = v[s == i], w[s == i]
        spread = float(own.var(ddof=1)) if len(own) > 1 else pooled
        variance += (own_w.sum() / w.sum()) ** 2 * max(0.0, 1 - 1 / own_w.mean()) * spread / len(own)
    df = float(min(n_prompts - 1, len(v) - len(strata)))
    half = float(stats.t.ppf(0.975, df)) * variance**0.5
    low, high = max(theta - half, bounds[0]), min(theta + half, bounds[1])
    return Estimate(theta, low, high, variance**0.5, **size, df=df)


def share_of_latents(yes: Bool[ndarray, "latent"], weight: Float[ndarray, "latent"], n_prompts: int) -> Estimate:
    """The weighted share of latents of a kind, prompts held fixed, with the exact binomial interval at n = (Σw)²/Σw² latents.

        low = Beta⁻¹(.025; x, n − x + 1),   high = Beta⁻¹(.975; x + 1, n − x),   x = n · share

    Right also where none or all are of the kind. No interval below 10 latents. Source: Korn & Graubard 1998.
    """
    n, share = effective_number(weight), float(np.average(yes, weights=weight))
    x = n * share
    low, high = (
        (stats.beta.ppf(0.025, x, n - x + 1) if x else 0.0),
        (stats.beta.ppf(0.975, x + 1, n - x) if x < n else 1.0),
    )
    few = len(yes) < MIN_LATENTS
    low, high, se = (np.nan,) * 3 if few else (float(low), float(high), (share * (1 - share) / n) ** 0.5)
    return Estimate(share, low, high, se, len(yes), n_prompts, n_effective=float(n_prompts))

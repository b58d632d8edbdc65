"""Means, shares, ratios, correlations and medians, each with an interval that accounts for rows of one prompt."""

from dataclasses import replace
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from diagnostics.statistics.estimate import MIN_PROMPTS, CensoredMedian, Estimate, FiellerInterval, Transform
from diagnostics.statistics.jackknife import (
    Clusters,
    PromptClusters,
    RowValues,
    checked_rows,
    covariance_of_deletions,
    estimate_from_deletions,
    estimate_from_sums,
    read_clusters,
    standard_error,
    t_quantile,
)
from interventions.errors import ResultError


def mean(x: RowValues, clusters: Clusters, *, level: float = 0.95, transform: Transform = None) -> Estimate:
    """x̄ = Σ x / n with its jackknife interval, in the unit of x [row]; for values without a long tail. Source: ours.

    Of KLs, whose logarithms have a standard deviation of 1 to 3.5, take `median` or `mean_alone`.
    """
    (x,), p = checked_rows(x=x), read_clusters(clusters, len(x), level)
    return estimate_from_deletions(*estimate_from_sums([x], lambda n, s: s / n, p), p, level, transform)


def share(condition: Bool[ndarray, "row"], clusters: Clusters, *, level: float = 0.95) -> Estimate:
    """The share p̂ of rows that meet `condition`, bool [row], with an interval within [0, 1]:

        logit p = logit p̂ ± t·SE/(p̂(1 − p̂))        SE: the jackknife's of p̂; t as for a mean; se is that of the log odds

    At p̂ of 0 or 1, where no deletion moves it: Wilson's interval of as many rows as there are effective prompts, [0, t²/(n + t²)] or
    [n/(n + t²), 1], se nan. Simulated coverage of 95 % intervals: 92–99 at true shares of .5 to .99, where p̂ ± t·SE covers 93–97 at .5,
    but 81–94 at .95 and 58–94 at .99 (`docs/statistics.md`). Source: the logit interval with a design-based SE (Korn & Graubard
    1998); at 0 and 1 ours, after Wilson 1927.
    """
    (x,), p = checked_rows(condition=condition), read_clusters(clusters, len(condition), level)
    return estimate_from_deletions(*estimate_from_sums([x], lambda n, s: s / n, p), p, level, "logit")


def _influence(*columns: ndarray) -> float:
    """The largest share of a column's sum that one row holds."""
    shares = [np.abs(x).max() / np.abs(x).sum() for x in columns if np.abs(x).sum()]
    return float(max(shares, default=np.nan))


def mean_alone(x: RowValues, clusters: Clusters) -> Estimate:
    """x̄ = Σ x / n without an interval, with its `influence`: the share of Σ|x| that the largest row holds.

    For KLs: a few rows carry their mean, and a sample that lacks such rows does not show it. No interval that was tried
    covers such means (`docs/statistics.md`). x [row]; the result has its unit. Source: ours.
    """
    (x,), p = checked_rows(x=x), read_clusters(clusters, len(x), 0.95)
    size = {"n_rows": len(x), "n_prompts": p.n_prompts, "n_effective": p.n_effective}
    value = float(x.mean()) if len(x) else np.nan
    return Estimate(value, np.nan, np.nan, np.nan, **size, influence=_influence(x))


def log_ratio_of_means(
    numerator: RowValues, denominator: RowValues, clusters: Clusters, *, level: float = 0.95
) -> Estimate:
    """Σ numerator / Σ denominator; the interval is exp of the jackknife's on log Σ numerator − log Σ denominator.

    For columns without a long tail. With standard deviations of the logarithms of .5 and .5 to 1 and 1 it covers 90–96 %
    at a nominal 95 %, with .5 and 2 82–88, with 1 and 3 64–75: for KLs take `censored_median`. Both [row], in one unit;
    value, low and high are the ratio, se that of its logarithm. Source: ours.
    """
    (top, bottom), p = (
        checked_rows(numerator=numerator, denominator=denominator),
        read_clusters(clusters, len(numerator), level),
    )
    theta = estimate_from_sums([top, bottom], lambda n, a, b: np.where(n > 0, a / b, np.nan), p)
    return estimate_from_deletions(*theta, p, level, "log")


def ratio_of_means(numerator: RowValues, denominator: RowValues, floor: float, clusters: Clusters) -> Estimate:
    """Σ numerator / Σ denominator of KLs, without an interval (see `mean_alone`), with the larger `influence` of the two.

    Where the mean denominator is at or below the noise floor (nats), the value is mean numerator/floor and a `bound`.
    """
    top, bottom = checked_rows(numerator=numerator, denominator=denominator)
    over, under = mean_alone(top, clusters), mean_alone(bottom, clusters)
    bound = bool(len(bottom)) and under.value <= floor
    with np.errstate(all="ignore"):
        value = float(np.divide(over.value, floor if bound else under.value))
    return replace(over, value=value, bound=bound, influence=_influence(top, bottom))


def fieller_from(a: float, b: float, var_a: float, cov_ab: float, var_b: float, t: float, *, n_rows: int = 0,
                 n_prompts: int = 0) -> FiellerInterval:  # fmt: skip
    """Fieller's interval for a/b from two estimates and their known covariance.

    {ρ : (a − ρb)² ≤ t²·(var_a − 2ρ·cov_ab + ρ²·var_b)}, that is Aρ² − 2Bρ + C ≤ 0 with A = b² − t²·var_b,
    B = ab − t²·cov_ab, C = a² − t²·var_a: "bounded" where b is clear of 0 (A > 0); else "exclusive" where a is clear
    of being a multiple of b's noise (B² > AC), "everything" where it is not. On the border A = 0 the set is a half
    line: "exclusive" with one end infinite. The set holds ρ exactly where the test of a − ρb = 0 does not reject.

    `t` is the quantile, say scipy's t.ppf(.975, df); variances in squared units. n_rows and n_prompts are passed on.
    "none" where a number is not finite. Raises `ResultError` for t ≤ 0, a negative variance, or a covariance that no
    such variances can have. Source: Fieller 1954.
    """
    if not t > 0:
        raise ResultError(f"t is {t}; expected the positive quantile of a t distribution, such as 2.09")
    if var_a < 0 or var_b < 0 or abs(cov_ab) > np.sqrt(var_a) * np.sqrt(var_b) * (1 + 1e-9):
        seen = f"variances {var_a:.3g} and {var_b:.3g} with covariance {cov_ab:.3g}"
        raise ResultError(f"{seen}; expected variances of 0 or more, and |covariance| ≤ √(var_a·var_b)")
    value = float(a / b) if b else np.nan
    if not np.isfinite([a, b, var_a, cov_ab, var_b, t]).all() or b == var_b == 0:
        return FiellerInterval(value, np.nan, np.nan, "none", n_rows, n_prompts)
    square, middle, rest = b * b - t * t * var_b, a * b - t * t * cov_ab, a * a - t * t * var_a
    # (B² − AC)/t² without the cancellation of a²b²; only rounding makes it negative where A > 0.
    inner = b * b * var_a - 2 * a * b * cov_ab + a * a * var_b - t * t * max(var_a * var_b - cov_ab**2, 0.0)
    larger = middle + np.copysign(t * np.sqrt(max(inner, 0.0)), middle)
    if larger == 0 and square > 0:
        return FiellerInterval(value, 0.0, 0.0, "bounded", n_rows, n_prompts)
    if square <= 0 and inner <= 0:
        return FiellerInterval(value, -np.inf, np.inf, "everything", n_rows, n_prompts)
    low, high = sorted((float(larger / square) if square else float(-np.copysign(np.inf, larger)), rest / larger))
    return FiellerInterval(value, low, high, "bounded" if square > 0 else "exclusive", n_rows, n_prompts)


def fieller(
    numerator: RowValues, denominator: RowValues, clusters: Clusters, *, level: float = 0.95
) -> FiellerInterval:
    """Σ numerator / Σ denominator with Fieller's interval: right also where the denominator may be 0.

    `fieller_from` on the two means with their `jackknife_covariance` and t as for `jackknife`. Both [row], of any
    sign; the result has the unit of their ratio. For two columns that are positive prefer `log_ratio_of_means`.
    Simulated coverage of 95 % sets, 200 rows with prompt effects (correlation .3), 20 and 40 prompts, a denominator
    with a mean of 0 to 2 SD of a row: normal rows 93–95, log-normal rows 91–94, pairs of prompts the same.
    Source: Fieller 1954.
    """
    (a, b), p = (
        checked_rows(numerator=numerator, denominator=denominator),
        read_clusters(clusters, len(numerator), level),
    )
    top, bottom = (estimate_from_sums([x], lambda n, s: s / n, p) for x in (a, b))
    by_prompt, by_pair = (np.column_stack([top[i], bottom[i]]) for i in (1, 2))
    enough = p.n_effective >= MIN_PROMPTS
    v = covariance_of_deletions(by_prompt, by_pair) if enough else np.full((2, 2), np.nan)
    t = t_quantile(p, level) if enough else 1.0
    ends = (float(v[0, 0]), float(v[0, 1]), float(v[1, 1]))
    found = fieller_from(top[0], bottom[0], *ends, t, n_rows=len(a), n_prompts=p.n_prompts)
    return replace(found, n_effective=p.n_effective)


def _pearson(n: ndarray, x: ndarray, y: ndarray, xx: ndarray, yy: ndarray, xy: ndarray) -> ndarray:
    """The correlation from sums of standardised columns: a variance near 1e-12 is one of 0."""
    vx, vy = (xx - x * x / n) / n, (yy - y * y / n) / n
    return np.where((vx > 1e-12) & (vy > 1e-12), (xy - x * y / n) / n / np.sqrt(vx * vy), np.nan)


def _spearman(x: ndarray, y: ndarray, keep: Bool[ndarray, "deletion row"]) -> Float[ndarray, "deletion"]:
    """The rank correlation of each set of kept rows, ranked anew (ties: mid-ranks)."""
    n, centred = keep.sum(axis=1, keepdims=True), []
    for v in (x, y):
        order = np.argsort(v)
        below = np.pad(np.cumsum(keep[:, order], axis=1), ((0, 0), (1, 0)))
        rank = (below[:, np.searchsorted(v[order], v)] + below[:, np.searchsorted(v[order], v, "right")] + 1) / 2
        centred.append((rank - (n + 1) / 2) * keep)
    a, b = centred
    return (a * b).sum(axis=1) / np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))


def correlation(x: RowValues, y: RowValues, clusters: Clusters, kind: Literal["pearson", "spearman"] = "pearson", *,
                level: float = 0.95) -> Estimate:  # fmt: skip
    """The correlation of x and y, both [row]: Σ(x−x̄)(y−ȳ) / √(Σ(x−x̄)² Σ(y−ȳ)²), of ranks for "spearman".

    nan when either is constant, also after a deletion (then no interval); the ends may leave [−1, 1]. Coverage as
    simulated for `jackknife`: 93–97 %, but 88–90 % at 12 prompts and 90–93 % for fixed partners when both prompts have
    effects; Pearson's of log-normal rows 90–93 % (84–90 with SD 1.5 of the logarithm): take logarithms or "spearman".
    Raises `ResultError` for an unknown kind. Source: ours.
    """
    (x, y), p = checked_rows(x=x, y=y), read_clusters(clusters, len(x), level)
    with np.errstate(all="ignore"):
        if kind == "pearson" and len(x):
            x, y = ((v - v.mean()) / v.std() if np.ptp(v) else v * 0 for v in (x, y))
        if kind == "pearson":
            return estimate_from_deletions(
                *estimate_from_sums([x, y, x * x, y * y, x * y], _pearson, p), p, level, None
            )
        if kind != "spearman":
            raise ResultError(f"no correlation {kind!r}; known: 'pearson', 'spearman'")
        theta = float(_spearman(x, y, np.ones((1, len(x)), dtype=bool))[0])
        few = max(1, (1 << 21) // max(1, len(x)))  # deletions at once: an array of 2 M entries
        prompts, pairs = (np.array_split(np.arange(n), n // few + 1) for n in (p.n_prompts, p.n_pairs))
        by_prompt = [_spearman(x, y, (p.first != g[:, None]) & (p.second != g[:, None])) for g in prompts]
        by_pair = [_spearman(x, y, p.unit != d[:, None]) for d in pairs]
    return estimate_from_deletions(theta, np.concatenate(by_prompt), np.concatenate(by_pair), p, level, None)


def _middle(x: ndarray, weight: ndarray, geometric: bool) -> float:
    """The weighted median: the midpoint of two where half of the weight lies exactly between, on the log scale for ratios."""
    if not len(x):
        return np.nan
    order = np.argsort(x, kind="stable")
    below = np.cumsum(weight[order]) / weight.sum()
    a, b = x[order][[np.searchsorted(below, 0.5 - 1e-12), min(np.searchsorted(below, 0.5 + 1e-12), len(x) - 1)]]
    if a == b or np.isinf(b):
        return float(b)
    return float(np.sqrt(a) * np.sqrt(b) if geometric else (a + b) / 2)


def _order(
    x: ndarray, weight: ndarray, p: PromptClusters, level: float, geometric: bool, bound: bool = False
) -> Estimate:
    """The median of x, which may hold +∞, between the order statistics at ½ ∓ t·SE: see `median`."""
    value, low, high, se = _middle(x, weight, geometric), np.nan, np.nan, np.nan
    if p.n_effective >= MIN_PROMPTS:
        # Ties at the median count for the side on which they make the interval wider.
        sides = [
            estimate_from_sums([weight * side, weight], lambda _, s, w: s / w, p)[1:]
            for side in (x < value, x <= value)
        ]
        half = t_quantile(p, level) * max(standard_error(*side) for side in sides)
        if not np.isnan(half):
            order = np.argsort(x, kind="stable")
            left, right = (np.cumsum(some) / weight.sum() for some in (weight[order], weight[order][::-1]))
            # The last rows, from either end, that hold no more than ½ − t·SE of the weight.
            i, j = (int(np.searchsorted(some, 0.5 - half + 1e-12, side="right")) - 1 for some in (left, right))
            low = x[order][i] if i >= 0 else 0.0 if geometric else -np.inf
            high = x[order][::-1][j] if j >= 0 and not bound else np.inf
            with np.errstate(all="ignore"):
                width = np.log(high) - np.log(low) if geometric and high != low else np.subtract(high, low)
                se = width / 2 / t_quantile(p, level)
    size = {"n_rows": len(x), "n_prompts": p.n_prompts, "n_effective": p.n_effective}
    return Estimate(value, float(low), float(high), float(se), **size, bound=bound)


def _weights(weight: RowValues | None, like: ndarray) -> ndarray:
    if weight is None:
        return np.ones(len(like))
    (weight, _) = checked_rows(weight=weight, like=np.zeros(len(like)))
    if not (weight > 0).all():
        raise ResultError(f"{int((weight <= 0).sum())} of {len(weight)} weights are not above 0; leave such rows out")
    return weight


def median(x: RowValues, clusters: Clusters, *, level: float = 0.95, weight: RowValues | None = None) -> Estimate:
    """The median of x [row] between two order statistics, in the unit of x.

    [x₍k₎, x₍n+1−k₎], k = ⌊n(½ − t·SE)⌋, SE the jackknife's of the share of rows below the median (or at most at it,
    where ties make that larger), t with one degree of freedom less than there are effective prompts; se = (high − low)/2t.
    An end past the data is ∓∞. Even counts: the midpoint of the middle two. weight [row], above 0: shares, median and
    order statistics by weight. Simulated coverage of 95 % intervals: 93–98 in every design of `docs/statistics.md`,
    whatever the tails. Source: Woodruff 1952, with the jackknife's SE.
    """
    (x,) = checked_rows(x=x)
    weight = _weights(weight, x)
    return _order(x, weight, read_clusters(clusters, len(x), level, weight), level, geometric=False)


def censored_median(ratio_numerator: RowValues, ratio_denominator: RowValues, floor: float, clusters: Clusters, *,
                    level: float = 0.95, weight: RowValues | None = None) -> CensoredMedian:  # fmt: skip
    """The median over rows of numerator/denominator where a denominator ≤ floor right-censors the ratio.

    A censored ratio orders as +∞; 0/0 (numerator ≤ floor too) is left out and counted. Where the median falls on a
    censored row it is the median of numerator/max(denominator, floor), a lower bound (`bound`, high = ∞). The interval
    is that of `median`: high = ∞ when it runs into censored rows. Even counts: the midpoint on the log scale.

    Numerator, denominator [row] and floor in one unit (nats); numerators below 0, rounding of a KL, count as 0.
    weight [row]: as for `median`.
    nan when no row has a ratio. Raises `ResultError` for a floor that is negative or not finite. Source: ours.
    """
    top, bottom = checked_rows(numerator=ratio_numerator, denominator=ratio_denominator)
    if not 0 <= floor < np.inf:
        raise ResultError(f"a noise floor of {floor}; expected a finite number of nats, 0 or more")
    if len(clusters) != len(top):
        raise ResultError(f"{len(clusters)} clusters for {len(top)} rows")
    known = (top > floor) | (bottom > floor)
    weight = _weights(weight, top)[known]
    p = read_clusters(np.asarray(clusters)[known], int(known.sum()), level, weight)
    top, bottom = np.maximum(top[known], 0), bottom[known]
    censored = bottom <= floor
    with np.errstate(all="ignore"):
        least = top / np.maximum(bottom, floor)
    ratio = np.where(censored, np.inf, least)
    bound = bool(np.isinf(_middle(ratio, weight, geometric=True)))
    estimate = _order(least if bound else ratio, weight, p, level, geometric=True, bound=bound)
    return CensoredMedian(estimate, int(censored.sum()), int((~known).sum()), len(known))


def median_ratio(numerator: RowValues, denominator: RowValues, floor: float, clusters: Clusters, *,
                 weight: RowValues | None = None) -> Estimate:  # fmt: skip
    """The median over rows of numerator/denominator, the estimate of `censored_median`: our headline for ratios of KLs."""
    return censored_median(numerator, denominator, floor, clusters, weight=weight).estimate


def noise_floor(self_effects: RowValues) -> float:
    """The 99th percentile (linear interpolation) of |effect| over self-swaps [row], in their unit (nats). Source: ours.

    Raises `ResultError` when there is none.
    """
    (effects,) = checked_rows(self_effects=self_effects)
    if not len(effects):
        raise ResultError("no self-swap to take a noise floor from; give at least one")
    return float(np.percentile(np.abs(effects), 99))


def error_of(kl: float | Float[ndarray, "..."], floor: float) -> float | Float[ndarray, "..."]:
    """2·√(kl·floor) + floor, the error of a KL above the noise floor, in nats; a negative KL counts as 0. Source: ours.

    Raises `ResultError` for a negative floor.
    """
    if floor < 0:
        raise ResultError(f"a noise floor of {floor}; expected 0 or more")
    error = 2 * np.sqrt(np.maximum(kl, 0) * floor) + floor
    return error if np.ndim(kl) else float(error)


CLEAR = 10
"""an effect counts where it is above so many noise floors"""

"""The delete-one-prompt jackknife: intervals that know that the tokens of one prompt are not independent."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Num, Shaped
from numpy import ndarray
from scipy import stats

from diagnostics.statistics.estimate import (
    FEW_PROMPTS,
    MIN_PROMPTS,
    Estimate,
    Transform,
    effective_number,
    log_odds_interval,
)
from interventions.errors import ResultError

TRANSFORMS: tuple[Transform, ...] = (None, "log", "logit")
RowValues = Num[ndarray, "row"]
Clusters = Int[ndarray, "row"] | Int[ndarray, "row 2"]


class PromptClusters(NamedTuple):
    """`clusters` relabelled from 0: prompts, and units (unordered pairs of prompts first, then lone prompts)."""

    first: Int[ndarray, "row"]
    second: Int[ndarray, "row"]  # −1: none
    unit: Int[ndarray, "row"]
    n_prompts: int
    n_pairs: int
    n_units: int
    n_effective: float
    """effective prompts: a row of two prompts counts half for each"""


def warn_if_few(n_effective: float, stacklevel: int) -> None:
    """Warn of an interval from few effective prompts."""
    if MIN_PROMPTS <= n_effective < FEW_PROMPTS:
        said = f"an interval from {n_effective:.3g} effective prompts"
        warnings.warn(f"{said}; give {FEW_PROMPTS} or more, of similar size", stacklevel=stacklevel + 1)


def read_clusters(clusters: Clusters, n_rows: int, level: float, weight: ndarray | None = None) -> PromptClusters:
    """`clusters` checked and relabelled, `level` checked; warns when the prompts are few. weight [row]: default 1."""
    if not 0 < level < 1:
        raise ResultError(f"level {level}; expected a probability between 0 and 1, such as .95")
    ids = np.asarray(clusters)
    if ids.shape not in ((n_rows,), (n_rows, 2)) or (n_rows and ids.dtype.kind not in "iu"):
        raise ResultError(f"clusters are {ids.dtype} {list(ids.shape)}; expected int [{n_rows}] or [{n_rows}, 2]")
    target, source = (ids, np.full(n_rows, -1)) if ids.ndim == 1 else ids.T
    if (target < 0).any() or (source < -1).any():
        raise ResultError("a prompt id is negative; ids count from 0, and only a second prompt may be −1 (none)")
    known = np.unique(np.r_[target, source[source >= 0]])
    n, first = len(known), np.searchsorted(known, target)
    second = np.where((source < 0) | (source == target), -1, np.searchsorted(known, source))
    paired, unit = second >= 0, np.zeros(n_rows, dtype=int)
    key = np.minimum(first, second) * n + np.maximum(first, second)
    pairs, unit[paired] = np.unique(key[paired], return_inverse=True)
    lone, rest = np.unique(first[~paired], return_inverse=True)
    unit[~paired] = len(pairs) + rest
    weight = np.ones(n_rows) if weight is None else weight
    sizes = np.bincount(first, np.where(second < 0, weight, weight / 2), n)
    sizes += np.bincount(second[second >= 0], weight[second >= 0] / 2, n)
    effective = effective_number(sizes)
    warn_if_few(effective, stacklevel=3)
    return PromptClusters(first, second, unit, n, len(pairs), len(pairs) + len(lone), effective)


def checked_rows(**named: Shaped[ndarray, "..."]) -> list[Float[ndarray, "row"]]:
    """The arguments as float64, all finite and of one length."""
    arrays = [np.asarray(x, dtype=float) for x in named.values()]
    for name, x in zip(named, arrays, strict=True):
        if x.ndim != 1 or x.shape != arrays[0].shape:
            raise ResultError(f"{name} has shape {list(x.shape)}; expected {[arrays[0].size]}, one entry for each row")
        if bad := int((~np.isfinite(x)).sum()):
            raise ResultError(f"{bad} of {len(x)} entries of {name} are not finite; drop such rows and count them")
    return arrays


def standard_error(by_prompt: ndarray, by_pair: ndarray) -> float:
    """The standard error from the statistic without each prompt and without each pair: see `jackknife`."""
    v, v_pair = (((t - t.mean()) ** 2).sum() * (len(t) - 1) / len(t) if len(t) else 0.0 for t in (by_prompt, by_pair))
    return float(np.sqrt(max(v - v_pair, v_pair)))


def degrees_of_freedom(p: PromptClusters) -> float:
    """Effective prompts, or distinct pairs where those are fewer, less one."""
    return float(min(p.n_effective, p.n_units) - 1)


def t_quantile(p: PromptClusters, level: float) -> float:
    return float(stats.t.ppf((1 + level) / 2, degrees_of_freedom(p)))


def estimate_from_deletions(theta: float, by_prompt: ndarray, by_pair: ndarray, p: PromptClusters, level: float,
              transform: Transform) -> Estimate:  # fmt: skip
    if transform not in TRANSFORMS:
        raise ResultError(f"no transform {transform!r}; known: None, 'log', 'logit'")
    if transform == "logit":
        return _for_log_odds(estimate_from_deletions(theta, by_prompt, by_pair, p, level, None), t_quantile(p, level))
    value, low, high, se = float(theta), np.nan, np.nan, np.nan
    if p.n_effective >= MIN_PROMPTS:
        with np.errstate(all="ignore"):
            parts = [np.log(x) if transform else x for x in (np.array([value]), by_prompt, by_pair)]
            every = np.concatenate(parts)
            if np.isfinite(every).all():
                se = standard_error(parts[1], parts[2])
                low, high = parts[0][0] - t_quantile(p, level) * se, parts[0][0] + t_quantile(p, level) * se
            elif not np.isnan(every).any():
                se = np.inf
                low, high = (end if (every == end).any() else np.nan for end in (-np.inf, np.inf))
            low, high = (np.exp(low), np.exp(high)) if transform else (low, high)
    df = degrees_of_freedom(p) if np.isfinite(se) else np.nan
    size = {"n_rows": len(p.first), "n_prompts": p.n_prompts, "n_effective": p.n_effective}
    return Estimate(value, float(low), float(high), se, **size, df=df)


def _for_log_odds(share: Estimate, t: float) -> Estimate:
    """The interval for the log odds: logit θ ± t·SE/(θ(1 − θ)); at 0 and 1 Wilson's of n_effective rows, [0, t²/(n + t²)], se nan."""
    if np.isnan(share.se):
        return share
    value = share.value
    if not -1e-9 <= value <= 1 + 1e-9:
        raise ResultError(f"a share of {value:.6g}; expected a value from 0 to 1 for transform='logit'")
    variance = value * (1 - value)
    if variance < 1e-12:
        reach = t * t / (share.n_effective + t * t)
        low, high = (0.0, reach) if value < 0.5 else (1 - reach, 1.0)
        return replace(share, low=low, high=high, se=np.nan, df=np.nan)
    low, high = log_odds_interval(value, t * share.se)
    return replace(share, low=low, high=high, se=share.se / variance)


def jackknife(statistic: Callable[[Bool[ndarray, "row"]], float], n_rows: int, clusters: Clusters, *,
              level: float = 0.95, transform: Transform = None, correct_pairs: bool = True) -> Estimate:  # fmt: skip
    """Any smooth statistic with its delete-one-prompt jackknife interval.

    V = (G−1)/G Σ_g (θ₍g₎ − θ̄)², θ₍g₎ the statistic without the rows that have prompt g as target or source. In rows
    with two prompts V counts each row's own variance, and the covariance of rows of one pair, twice; V_pair, the same
    formula with each unordered pair of prompts deleted in turn, takes the second count away. Alone, V − V_pair covers
    90 % for iid rows and G = 20, the plain V 99 %; hence SE² = max(V − V_pair, V_pair), and θ ± t·SE with one degree
    of freedom less than there are prompts (or distinct pairs, where fewer).
    Simulated coverage of 95 % intervals for the mean of 500 pairs, at 20, 40, 80 prompts: iid rows 98, 97, 96; effects
    of the target prompt (correlation .3) 95, 95, 95; of both prompts 94, 95, 95; where each prompt has one fixed partner
    95–96. Means of long-tailed rows are not covered: see `median`.

    `statistic(keep)`, keep bool [row], gives θ on the kept rows before the transform; the result has its unit. Prompts
    of unequal size count by their effective number 1/Σ share²: t has one degree of freedom less than that. No interval
    (nan) below 10 effective prompts, a warning below 20. If a deletion gives nan, both ends are nan; if one gives +∞ (−∞),
    the upper (lower) end is ±∞ and the other nan: none is dropped. A median is not smooth (88–92 % even without
    pairs): use `median`; `correct_pairs=False` gives the plain V to other statistics that step. Raises `ResultError`
    for a level outside (0, 1) or an unknown transform. Source: Aronow, Samii & Assenova 2015; the maximum is ours.
    """
    p = read_clusters(clusters, n_rows, level)
    theta = statistic(np.ones(n_rows, dtype=bool)) if n_rows else np.nan
    n_prompts = p.n_prompts if p.n_effective >= MIN_PROMPTS else 0
    by_prompt = [statistic((p.first != g) & (p.second != g)) for g in range(n_prompts)]
    by_pair = [statistic(p.unit != d) for d in range(p.n_pairs if n_prompts and correct_pairs else 0)]
    return estimate_from_deletions(
        float(theta), np.array(by_prompt, float), np.array(by_pair, float), p, level, transform
    )


def covariance_of_deletions(
    by_prompt: Float[ndarray, "prompt k"], by_pair: Float[ndarray, "pair k"]
) -> Float[ndarray, "k k"]:
    """The covariance from a vector without each prompt and without each pair: see `jackknife_covariance`."""
    if not (np.isfinite(by_prompt).all() and np.isfinite(by_pair).all()):
        return np.full((by_prompt.shape[1],) * 2, np.nan)

    def v(t: ndarray) -> ndarray:
        centred = t - t.mean(axis=0)
        return centred.T @ centred * ((len(t) - 1) / len(t))

    if not len(by_pair):
        return v(by_prompt)
    v_prompt, v_pair = v(by_prompt), v(by_pair)
    unit = np.sqrt(np.diag(v_prompt + v_pair))
    scale = np.outer(unit, unit) + (np.outer(unit, unit) == 0)
    size, axes = np.linalg.eigh((v_prompt + v_pair) / scale)
    # An eigenvalue of a correlation matrix near 1e-12 is one of 0.
    size, axes = size[size > 1e-12], axes[:, size > 1e-12]
    back, whiten = axes * np.sqrt(size), axes / np.sqrt(size)
    second, turn = np.linalg.eigh(whiten.T @ (v_pair / scale) @ whiten)
    half = back @ turn * np.sqrt(np.maximum(1 - 2 * second, second))
    return half @ half.T * np.outer(unit, unit)


def jackknife_covariance(
    statistic: Callable[[Bool[ndarray, "row"]], Float[ndarray, "k"]], n_rows: int, clusters: Clusters
) -> tuple[Float[ndarray, "k"], Float[ndarray, "k k"], float]:
    """A vector-valued smooth statistic θ [k], its delete-one-prompt jackknife covariance [k, k], degrees of freedom.

    V = (G−1)/G Σ_g (θ₍g₎ − θ̄)(θ₍g₎ − θ̄)ᵀ and V_pair as in `jackknife`, of which this is the form for k > 1. The
    maximum of V − V_pair and V_pair is taken along the axes that make both diagonal: the result is no smaller than
    either for any combination cᵀθ, turns with θ (A·θ has A·cov·Aᵀ), and is `jackknife`'s SE² for k = 1 and wherever
    V − V_pair is the larger on every axis.

    `statistic(keep)`, keep bool [row], gives θ on the kept rows. Covariance and degrees of freedom are nan below
    10 effective prompts and where a deletion gives a value that is not finite; a warning below 20. Raises `ResultError` when θ is no
    vector or changes its length. Source: ours, after Aronow, Samii & Assenova 2015.
    """
    p = read_clusters(clusters, n_rows, 0.95)

    def at(keep: ndarray) -> ndarray:
        value = np.asarray(statistic(keep), dtype=float)
        if value.ndim != 1 or not value.size or len(value) != len(theta if len(theta) else value):
            expected = f"[{len(theta)}], its length on all rows" if len(theta) else "[k], k ≥ 1"
            raise ResultError(f"the statistic has shape {list(value.shape)}; expected {expected}")
        return value

    theta = np.zeros(0)
    theta = at(np.ones(n_rows, dtype=bool))
    if p.n_effective < MIN_PROMPTS:
        return theta, np.full((len(theta),) * 2, np.nan), np.nan
    by_prompt = [at((p.first != g) & (p.second != g)) for g in range(p.n_prompts)]
    by_pair = [at(p.unit != d) for d in range(p.n_pairs)]
    covariance = covariance_of_deletions(np.array(by_prompt), np.array(by_pair).reshape(-1, len(theta)))
    return theta, covariance, degrees_of_freedom(p) if np.isfinite(covariance).all() else np.nan


def from_deletions(theta: float, by_prompt: Float[ndarray, "prompt"], sizes: Num[ndarray, "prompt"], *,
                   level: float = 0.95, transform: Transform = None) -> Estimate:  # fmt: skip
    """`jackknife` for a statistic whose values without each prompt are there already (rows of one prompt each).

    theta: on all rows. by_prompt: without each prompt; an entry that is not finite leaves no interval, as there.
    sizes: rows of each prompt.
    """
    if not 0 < level < 1:
        raise ResultError(f"level {level}; expected a probability between 0 and 1, such as .95")
    by_prompt, n = np.asarray(by_prompt, dtype=float), len(by_prompt)
    if len(sizes) != n:
        raise ResultError(f"sizes of {len(sizes)} prompts for deletions of {n}; expected one for each")
    none, effective = np.zeros(int(np.sum(sizes)), dtype=int), effective_number(sizes)
    warn_if_few(effective, stacklevel=2)
    return estimate_from_deletions(
        theta, by_prompt, np.zeros(0), PromptClusters(none, none - 1, none, n, 0, n, effective), level, transform
    )


def covariance_from_deletions(
    by_prompt: Float[ndarray, "prompt k"], sizes: Num[ndarray, "prompt"]
) -> tuple[Float[ndarray, "k k"], float]:
    """The covariance and degrees of freedom of `jackknife_covariance` from the values without each prompt.

    sizes: rows of each prompt.
    """
    by_prompt, effective = np.asarray(by_prompt, dtype=float), effective_number(sizes)
    k = by_prompt.shape[1]
    if effective < MIN_PROMPTS:
        return np.full((k, k), np.nan), np.nan
    covariance = covariance_of_deletions(by_prompt, np.zeros((0, k)))
    return covariance, effective - 1 if np.isfinite(covariance).all() else np.nan


def p_value(estimate: Estimate, null: float, transform: Transform = None) -> float:
    """The two-sided p-value of the hypothesis that the true value is `null`: 2·P(T > |value − null|/se).

    T is Student's with the estimate's degrees of freedom, so p < 1 − level exactly where the interval leaves `null`
    out; far values stay accurate to p near 1e-300. `transform="log"`, for ratios (`log_ratio_of_means`) and estimates
    formed with it: |log value − log null|/se; `"logit"`, for shares: the same of their log odds. `null` has the unit of the value.

    Simulated rejections of a true null at p < .05: 400 log-normal rows, SD 1 of the logarithm, correlation .3 of it within
    a prompt, 40 prompts of equal and unequal size, 2,000 replications (± .005). These hold: mean of logarithms .04–.07;
    mean of the difference of two columns of one distribution .04–.06; correlation of logarithms or of ranks .04–.06; a
    share against ½. Tests of means of long-tailed values reject too often, the more so the longer the tail: with an SD of
    1.5 the mean .11–.15, a difference of means in the ratio 3:1 .08–.14, Pearson's correlation .12–.16; log ratios of
    means of different SDs miss in up to 36 % (`docs/statistics_coverage.md`). For KLs test `share(a > b)` against ½. Rows
    taken for independent reject, in the forms that hold, .21–.31 with 20 prompts and .11–.15 with 40.

    nan where there is no interval, where the value is only a bound, for a share of exactly 0 or 1, and where se is 0 (no deletion
    moves the statistic): that is no measure of its error. Raises `ResultError` for a transform other
    than the one that formed the interval, a null that is not finite (for "log": not above 0, for "logit": not between 0 and 1), and for an estimate
    without degrees of freedom: a median's interval is not t's; test `share(x < null, clusters)` against .5.
    Source: ours.
    """
    if transform not in TRANSFORMS:
        raise ResultError(f"no transform {transform!r}; known: None, 'log', 'logit'")
    least, most, where = {
        None: (-np.inf, np.inf, ""),
        "log": (0, np.inf, " above 0"),
        "logit": (0, 1, " between 0 and 1"),
    }[transform]
    if not (np.isfinite(null) and least < null < most):
        raise ResultError(f"a null of {null}; expected a finite number{where}")
    if estimate.bound or not np.isfinite(estimate.se):
        return float("nan")
    if np.isnan(estimate.df):
        raise ResultError("the estimate has no degrees of freedom; for a median, test share(x < null) against .5")
    with np.errstate(all="ignore"):
        odds = 1 if transform != "logit" else 1 - np.array([estimate.low, estimate.value, estimate.high, null])
        ends = np.array([estimate.low, estimate.value, estimate.high, null]) / odds
        ends = np.log(ends) if transform else ends
    low, value, high, null = (float(x) for x in ends)
    if not abs(low + high - 2 * value) <= 1e-6 * (high - low) + 1e-12 * abs(value):
        others = " or ".join(repr(other) for other in TRANSFORMS if other != transform)
        raise ResultError(f"{estimate} is not even about its value for transform={transform!r}; give {others}")
    far = abs(value - null)
    return float(2 * stats.t.sf(far / estimate.se, estimate.df)) if estimate.se > 1e-12 * far else float("nan")


Deletions = tuple[float, ndarray, ndarray]
"""The statistic on all rows, without each prompt, without each pair of prompts."""


def estimate_from_sums(columns: list[ndarray], statistic: Callable[..., ndarray], p: PromptClusters) -> Deletions:
    """The deletions of a function of (number of rows, sum of each column), in O(rows)."""
    joined = p.second >= 0
    table = [np.ones(len(p.first)), *columns]

    def without(labels: ndarray, rows: ndarray, size: int) -> ndarray:
        left = [c.sum() - np.bincount(labels, c[rows], size) for c in table]
        # What a subtraction leaves of an exact zero is rounding error.
        left = [np.where(np.abs(s) <= 1e-13 * np.abs(c).sum(), 0.0, s) for s, c in zip(left, table, strict=True)]
        return statistic(*left)

    rows, pairs = np.arange(len(joined)), np.flatnonzero(joined)
    with np.errstate(all="ignore"):
        theta = float(statistic(*(np.asarray(c.sum()) for c in table)))
        by_prompt = without(np.r_[p.first, p.second[pairs]], np.r_[rows, pairs], p.n_prompts)
        return theta, by_prompt, without(p.unit[pairs], pairs, p.n_pairs)


def sums_without(values: Float[ndarray, "*any text"], group: Int[ndarray, "text"]) -> Float[ndarray, "*any group"]:
    """The sum over all texts but those of each group, groups ascending."""
    number, of = np.unique(group, return_inverse=True)
    member: Bool[ndarray, "text group"] = of[:, None] == np.arange(len(number))
    return values.sum(-1, keepdims=True) - values @ member.astype(float)

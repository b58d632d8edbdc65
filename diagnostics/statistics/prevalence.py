"""How many units (latents, heads, layers) are of a kind, and which: two questions with two methods.

How many: `share_below`, from a random-effects fit. Counting estimates below a threshold counts their noise too. Units
that were measured on the same prompts err together: give it their `error_in_common`.
Which: `false_discovery` on p-values (`diagnostics.statistics.p_value`), within one family of tests. Its list is no
prevalence: units with little data are missing from it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Num
from numpy import ndarray
from scipy import optimize, stats

from diagnostics.statistics.estimate import MIN_PROMPTS, digits
from interventions.errors import ResultError
from interventions.files import Json

Units = Num[ndarray, "unit"]
MIN_UNITS, MIN_UNITS_NORMAL = 10, 20


@dataclass(frozen=True)
class Prevalence(Json):
    """The share of units whose true value lies below a threshold."""

    share: float
    """Φ((threshold − mu)/tau); 0 or 1 where tau is 0, nan where mu then is the threshold"""
    low: float
    """lower end, from the profile likelihood; nan below 10 units"""
    high: float
    """upper end; nan as for `low`"""
    mu: float
    """mean of the true values, in the unit of the estimates"""
    tau: float
    """standard deviation of the true values; 0 where the errors explain all of the spread"""
    counted: float
    """for comparison: the (weighted) share of estimates below the threshold, noise and all"""
    normal_p: float
    """p-value of the model's normality (D'Agostino & Pearson 1973); small: do not trust the fit. nan below 20 units"""
    n: int
    """units"""
    n_effective: float
    """Kish's effective number of units, (Σw)²/Σw²; n without weights"""

    def __str__(self) -> str:
        ends = "" if np.isnan(self.low) else f" [{self.low:.3g}, {self.high:.3g}]"
        return f"{digits(self.share)}{ends} (counted: {digits(self.counted)})"


def _profile(x: ndarray, se: ndarray, w: ndarray, tau: ndarray) -> tuple[ndarray, ndarray, ndarray]:
    """For each tau the log likelihood (without constants) at the best mu, that mu, and the precision of it."""
    parts = []
    for some in np.array_split(tau, len(tau) * len(x) // (1 << 21) + 1):
        v = se**2 + some[:, None] ** 2
        precision = (w / v).sum(axis=1)
        mu = (w * x / v).sum(axis=1) / precision
        parts.append((-(w * (np.log(v) + (x - mu[:, None]) ** 2 / v)).sum(axis=1) / 2, mu, precision))
    best, mu, precision = (np.concatenate(column) for column in zip(*parts, strict=True))
    return best, mu, precision


def _highest(f: Callable[[ndarray], ndarray], at: ndarray) -> tuple[float, float]:
    """Where on the sorted points `at`, or between the best of them and its neighbours, f is largest; and f there."""
    values = f(at)
    i = int(np.argmax(values))
    if np.isinf(values[i]):
        return float(at[i]), float(values[i])
    bounds = (at[max(i - 1, 0)], at[min(i + 1, len(at) - 1)])
    found = optimize.minimize_scalar(lambda t: -f(np.array([t]))[0], bounds=bounds, method="bounded",
                                     options={"xatol": 1e-10 * bounds[1]})  # fmt: skip
    better = -found.fun > values[i] + 1e-12 * abs(values[i])  # or it is rounding: a maximum at 0 stays at 0
    return (float(found.x), float(-found.fun)) if better else (float(at[i]), float(values[i]))


def share_below(estimates: Units, standard_errors: Units, threshold: float, *, level: float = 0.95,
                weights: Units | None = None, shared_error: float = 0.0) -> Prevalence:  # fmt: skip
    """The share of units whose true value lies below `threshold`, by a normal random-effects model.

    estimate_i ~ N(true_i, se_i²), true_i ~ N(mu, tau²), units independent, standard errors known: mu and tau maximise
    the marginal likelihood Π N(estimate_i; mu, se_i² + tau²), and the share is Φ((threshold − mu)/tau). Its interval
    holds the shares whose best likelihood lies within t²/2 of the maximum on the log scale (profile likelihood, t with
    n − 1 degrees of freedom). Where the errors could explain all of the spread, tau may be 0: the interval then
    reaches 0 or 1, or both where mu may be the threshold.
    Simulated coverage of 95 % intervals, 20 to 300 units, standard errors .3 to 4 times tau: 93–97, and 97–99 where tau
    is small against them and the interval may be most of [0, 1]; the same with standard errors from 20 prompts. Where
    the true share is .16 and the standard errors are about .5, 1, 3 times tau, counting says .19, .24, .38.

    The share is one under the normal curve: other true values bias it, and more units do not help. Skewed ones
    (exponential, thresholds at −1, −½, ½ SD): .15 for 0, .31 for .39, .70 for .78; two equal groups at ±1 SD: .31 for
    .50; t with 5 degrees of freedom: within .03. At 100 units 95 % intervals then cover 0–75, 0–6 and 84–92.
    `normal_p`, of the standardised residuals, finds these at 100 units and errors of half of tau (of tau) in 97 (65),
    99 (36) and 41 (22) of 100 samples, so a large one proves little where noise prevails. Below .05, print `counted`
    beside the share and call neither the prevalence.

    weights [unit]: how many units each stands for, where units of different kinds (bins) were sampled at different
    rates. Unit i then enters the likelihood to the power ω_i = w_i·Σw/Σw², a pseudo-likelihood; the sum of the ω is
    `n_effective`, which stands for n in t and in the least number of units; `normal_p` counts each unit once.
    Simulated coverage, 60 and 200 units in two or three bins, weights 1:3:9 or 1:10, errors of .5 and 1.5 times tau:
    bins alike 95–96; bin means half a tau (two tau) apart 93–98, the interval being wider than it need be, for the
    bins' sizes are fixed. Bins that overlap little (means ±1, tau .5, weights 1:3) are a mixture that is not normal:
    .31 for .26, covered in 98 of 100 samples of 60 units, 83 to 94 of 200; `normal_p` finds 54 and 95 at errors equal
    to tau, 6 to 8 at errors of three tau. Units with small errors count for more than their weight says: bins half a
    tau apart whose errors are as .5:1:2 give .24 to .29 for .22 (90–99). Where bins differ so, fit each by itself.

    shared_error: of each standard error the part that all estimates have in common, for units that were measured on the
    same prompts; see `error_in_common`. It moves mu as a whole, so 1/precision of mu grows by its square, and
    se_i² is less by as much (at most by three quarters). Without it the interval of such units is too short.

    Estimates, standard errors [unit], shared error and threshold in one unit. No interval below 10 units. Raises
    `ResultError` for entries that are not finite, standard errors and weights that are not above 0, a threshold or a
    shared error that is not finite, and a level outside (0, 1). Source: the normal-normal model of meta-analysis (Hardy
    & Thompson 1996); the share, the weights and the shared error are ours.
    """
    x, se = (np.asarray(v, dtype=float) for v in (estimates, standard_errors))
    if x.ndim != 1 or x.shape != se.shape:
        raise ResultError(f"estimates {list(x.shape)}, standard errors {list(se.shape)}; expected one of each per unit")
    if bad := int((~np.isfinite(x) | ~np.isfinite(se) | ~(se > 0)).sum()):
        wanted = "finite estimates and standard errors above 0; drop such units and count them"
        raise ResultError(f"{bad} of {len(x)} units have no usable estimate and standard error; expected {wanted}")
    if not np.isfinite(threshold):
        raise ResultError(f"a threshold of {threshold}; expected a finite number")
    if not 0 <= shared_error < np.inf:
        raise ResultError(f"a shared error of {shared_error}; expected a finite number, 0 or more")
    if not 0 < level < 1:
        raise ResultError(f"level {level}; expected a probability between 0 and 1, such as .95")
    w = np.ones(len(x)) if weights is None else np.asarray(weights, dtype=float)
    if w.shape != x.shape or not (np.isfinite(w) & (w > 0)).all():
        raise ResultError(f"weights {list(w.shape)} for {len(x)} units; expected a finite one above 0 for each")
    if not len(x):
        nan = float("nan")
        return Prevalence(nan, nan, nan, nan, nan, nan, nan, 0, 0.0)
    if shared_error:
        se = np.sqrt(np.maximum(se**2 - shared_error**2, se**2 / 4))
    w = w / w.max()
    w, n, effective = w * (w.sum() / (w * w).sum()), len(x), float(w.sum() ** 2 / (w * w).sum())
    counted = float((w * (x < threshold)).sum() / w.sum())
    taus = np.r_[0.0, np.geomspace(1e-3 * se.min(), 10 * (np.ptp(x) + se.max()), 200)]
    tau, best = _highest(lambda t: _profile(x, se, w, t)[0], taus)
    mu = float(_profile(x, se, w, np.array([tau]))[1][0])
    with np.errstate(all="ignore"):
        share = float(stats.norm.cdf(np.divide(threshold - mu, tau)))
    residual = (x - mu) / np.sqrt(se**2 + tau**2)
    varied = n >= MIN_UNITS_NORMAL and np.ptp(residual) > 1e-6
    normal_p = float(stats.normaltest(residual).pvalue) if varied else np.nan
    if effective < MIN_UNITS:
        return Prevalence(share, np.nan, np.nan, mu, tau, counted, normal_p, n, effective)
    drop = stats.t.ppf((1 + level) / 2, effective - 1) ** 2 / 2

    def above(t: float) -> float:
        return float(_profile(x, se, w, np.array([t]))[0][0] - best + drop)

    inside = np.sort(np.append(taus[_profile(x, se, w, taus)[0] > best - drop], tau))
    below, beyond = taus[taus < inside[0]], taus[taus > inside[-1]]
    first = optimize.root_scalar(above, bracket=(below[-1], inside[0])).root if len(below) else inside[0]
    last = optimize.root_scalar(above, bracket=(inside[-1], beyond[0])).root if len(beyond) else inside[-1]

    def end(sign: float) -> float:
        def z(t: ndarray) -> ndarray:
            loglik, middle, precision = _profile(x, se, w, t)
            precision = precision / (1 + shared_error**2 * precision)
            half = np.sqrt(2 * np.maximum(loglik - best + drop, 0) / precision)
            return np.nan_to_num(sign * (threshold - middle + sign * half) / t, nan=-np.inf, posinf=np.inf)

        with np.errstate(all="ignore"):
            return float(stats.norm.cdf(sign * _highest(z, np.linspace(first, last, 100))[1]))

    return Prevalence(share, end(-1), end(1), mu, tau, counted, normal_p, n, effective)


def error_in_common(deletions: Float[ndarray, "deletion unit"], standard_errors: Units, *,
                    weights: Units | None = None) -> float:  # fmt: skip
    """The error that the estimates of units have in common, where all were measured on the same prompts.

    √max(0, Σ_{i≠j} ω_i ω_j cov_ij): by how much the variance of the mean of the units, Σ ω_i·estimate_i with the weights
    that `share_below` gives it, ω_i ∝ w_i/(se_i² + tau²), is more than that of units whose errors are independent. cov
    is the delete-one-prompt jackknife's: (G−1)/G Σ_g (θ_i₍g₎ − θ̄_i)(θ_j₍g₎ − θ̄_j).
    Simulated: slopes of 30 to 200 latents, each on 80 tokens of the same 20, 40, 100 prompts, whose effects on all
    latents' outcomes are .3 of the variance and vary with the regressor by chance alone: 95 % intervals of the share
    cover 63–92 without, 94–96 with it; the same with no effects of prompts, 96 and 96. Means over the same 25 and 40
    prompts, a fifth or half of the error's variance shared, 60 and 200 units: 52–88 without, 94–96 with it.

    deletions: the estimates on all rows (first) and without each prompt, a unit without rows of a prompt unchanged;
    standard errors [unit], in their unit, as is the result. 0 for fewer than two units or 10 prompts. Raises
    `ResultError` as `share_below` does, and for entries that are not finite. Source: ours.
    """
    values = np.asarray(deletions, dtype=float)
    if values.ndim != 2 or not np.isfinite(values).all():
        raise ResultError(f"deletions {list(values.shape)}; expected finite numbers [1 + prompt, unit]")
    fit = share_below(values[0], standard_errors, 0.0, weights=weights)
    n_prompts, n_units = len(values) - 1, values.shape[1]
    if n_prompts < MIN_PROMPTS or n_units < 2:
        return 0.0
    w = (1.0 if weights is None else np.asarray(weights, dtype=float)) / (np.asarray(standard_errors) ** 2 + fit.tau**2)
    parts = (values[1:] - values[1:].mean(axis=0)) * (w / w.sum())
    common = float((parts.sum(axis=1) ** 2).sum() - (parts**2).sum())
    return float(np.sqrt(max(0.0, common * (n_prompts - 1) / n_prompts)))


def false_discovery(p: Float[ndarray, "test"], method: Literal["bh", "by"] = "bh") -> Float[ndarray, "test"]:
    """p-values [test] adjusted so that the tests with q ≤ .05 are in expectation at most 5 % false discoveries.

    q₍ᵢ₎ = min over j ≥ i of p₍ⱼ₎·m/j, at most 1, m the number of p-values that are not nan: nan stays nan and does not
    count. "bh": Benjamini & Hochberg 1995, for tests that are independent or positively dependent. "by": Benjamini &
    Yekutieli 2001, any dependence, q larger by Σ_{j≤m} 1/j. Computed by scipy.stats.false_discovery_control.

    Raises `ResultError` for a p-value outside [0, 1] and an unknown method.
    """
    p = np.asarray(p, dtype=float)
    if method not in ("bh", "by"):
        raise ResultError(f"no method {method!r}; known: 'bh' (Benjamini-Hochberg), 'by' (Benjamini-Yekutieli)")
    if p.ndim != 1:
        raise ResultError(f"p has shape {list(p.shape)}; expected [test], one p-value for each test")
    if bad := int(((p < 0) | (p > 1)).sum()):
        raise ResultError(f"{bad} of {len(p)} p-values lie outside [0, 1]; give probabilities, not their logarithms")
    q, known = p.copy(), ~np.isnan(p)
    if known.any():
        q[known] = stats.false_discovery_control(p[known], method=method)
    return q

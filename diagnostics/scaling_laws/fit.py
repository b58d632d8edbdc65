"""The joint scaling law in width n and active latents k, fitted to losses, and simpler forms of it.

    L(n, k) = exp(α + β_k log k + β_n log n + γ log k log n) + exp(ζ + η log k)

Source: arXiv:2406.04093. Fitted by the Huber loss of log L̂ − log L (δ = 1e-3) from several starts; the other forms and all intervals
are ours.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.optimize import least_squares

from interventions.errors import ResultError

JOINT, REDUCIBLE, FLAT = "joint", "no irreducible term", "constant in n"
FORMS = {
    JOINT: ("alpha", "beta_k", "beta_n", "gamma", "zeta", "eta"),
    REDUCIBLE: ("alpha", "beta_k", "beta_n", "gamma"),
    FLAT: ("alpha", "beta_k"),
}
"""Parameters of each form; without its last term, and exp(α + β_k log k)."""
DELTA = 1e-3
"""of the Huber loss, in log L"""
IDENTIFIED = 1e-3
"""The smallest share of L, anywhere in the grid, that a term must have for its parameters to mean anything; ours."""
_SHARES = (0.1, 0.4, 0.7, 0.95)  # of the smallest loss of each k that the irreducible term starts from
_EVALUATIONS = 1000
_DEPTH, _STEEPEST = 12.0, 5.0
"""Bounds, about the means of log n and log k: logarithms of both terms beyond those of the losses, and all exponents."""
_WIDTHS = (100 * DELTA, 10 * DELTA, DELTA)
"""δ of each step: from `DELTA` alone it stops on the way, as the slope of |r| hardly changes."""


@dataclass(frozen=True)
class Fit:
    """A form fitted to losses."""

    form: str
    values: dict[str, float]
    """its parameters by name"""
    objective: float
    """Σ of the Huber loss over runs, in units of δ²"""
    converged: bool
    """the best start ended at a minimum"""
    n_starts: int
    """starts that ended at the best objective (within 1 %), of `len(_SHARES) + 1` (one where the problem is convex)"""
    residuals: Float[ndarray, "run"]
    """log L − log L̂"""
    irreducible: Float[ndarray, "run"]
    """share of L̂ in the last term; 0 without one"""
    at_bound: tuple[str, ...] = ()
    """parameters that ended at a bound"""

    @property
    def note(self) -> str:
        """What is wrong with the fit; empty where nothing is."""
        said = [] if self.converged else [f"no convergence within {_EVALUATIONS} evaluations"]
        said += [f"{name} ended at a bound and is not identified" for name in self.at_bound]
        if self.form == JOINT and self.irreducible.max() < IDENTIFIED:
            said.append(f"the irreducible term is below {IDENTIFIED:g} of L everywhere: ζ and η are not identified")
        if self.form == JOINT and self.irreducible.min() > 1 - IDENTIFIED:
            said.append("the irreducible term is all of L: the exponents in n are not identified")
        return "; ".join(said)

    def predict(self, n: Float[ndarray, "run"], k: Float[ndarray, "run"]) -> Float[ndarray, "run"]:
        """L̂ at these widths and k."""
        theta = np.array([self.values[name] for name in FORMS[self.form]])
        return np.exp(_log_loss(theta, _columns(self.form, np.log(n), np.log(k)))[0])

    def slope(self, k: Float[ndarray, "k"]) -> Float[ndarray, "k"]:
        """The exponent of n in the first term at these k: β_n + γ log k."""
        return self.values.get("beta_n", 0.0) + self.values.get("gamma", 0.0) * np.log(k)


def fit(
    n: Float[ndarray, "run"],
    k: Float[ndarray, "run"],
    loss: Float[ndarray, "run"],
    form: str = JOINT,
    *,
    start: Fit | None = None,
) -> Fit:
    """Minimise Σ_runs H_δ(log L̂ − log L); H_δ(r) = r²/2 for |r| ≤ δ, δ(|r| − δ/2) beyond.

    start: a fit of the same form to begin at, in place of the usual starts. Raises `ResultError` for losses that are not finite and
    above 0, and for a grid that does not determine the form: fewer runs than parameters + 1, or logs of n and k that are not
    independent.
    """
    n, k, loss = (np.asarray(x, dtype=float) for x in (n, k, loss))
    if not (np.isfinite(loss).all() and (loss > 0).all()):
        raise ResultError(
            f"losses from {np.nanmin(loss):.3g} to {np.nanmax(loss):.3g}; expected finite numbers above 0"
        )
    if not determined(n, k, form):
        raise ResultError(
            f"{len(loss)} runs of {len(set(n))} widths and {len(set(k))} k do not determine the form {form!r} "
            f"({len(FORMS[form])} parameters); give a grid of at least 3 widths and 3 k"
        )
    # About their means: α, β and γ are far from independent in logs that are not centred.
    centre = np.log(n).mean(), np.log(k).mean()
    columns = _columns(form, np.log(n) - centre[0], np.log(k) - centre[1])
    target = np.log(loss)
    starts = (
        [_moved(np.array([start.values[name] for name in FORMS[form]]), form, -centre[0], -centre[1])]
        if start is not None
        else _starts(form, columns, k, loss)
    )
    ends = [_minimised(theta, columns, target) for theta in starts]
    best = min(ends, key=lambda end: end.cost)
    log_loss, share = _log_loss(best.x, columns)
    values = dict(zip(FORMS[form], _moved(best.x, form, *centre).tolist(), strict=True))
    agreed = sum(bool(end.cost <= 1.01 * best.cost + 1e-12) for end in ends)
    stuck = np.minimum(*(np.abs(best.x - end) for end in _bounds(len(best.x), target))) < 1e-3
    at_bound = tuple(name for name, there in zip(FORMS[form], stuck, strict=True) if there)
    return Fit(form, values, float(best.cost), bool(best.status > 0), agreed, target - log_loss, share, at_bound)


def determined(n: Float[ndarray, "run"], k: Float[ndarray, "run"], form: str = JOINT) -> bool:
    """Whether runs at these widths and k determine a form: more runs than parameters, and independent columns."""
    first, last = _columns(form, np.log(n) - np.log(n).mean(), np.log(k) - np.log(k).mean())
    if len(n) <= len(FORMS[form]):
        return False
    ranks = [np.linalg.matrix_rank(first), np.linalg.matrix_rank(last) if last.shape[1] else 0]
    distinct = len(set(n)) >= 3 if form == JOINT else True
    return distinct and ranks == [first.shape[1], last.shape[1]]


def _columns(form: str, v: ndarray, u: ndarray) -> tuple[ndarray, ndarray]:
    """The columns of both exponents `[run, parameter]`; v: log n, u: log k."""
    one = np.ones_like(u)
    first = [one, u] if form == FLAT else [one, u, v, u * v]
    last = [one, u] if form == JOINT else []
    return np.stack(first, -1), np.stack(last, -1) if last else np.empty((len(u), 0))


def _log_loss(theta: ndarray, columns: tuple[ndarray, ndarray]) -> tuple[ndarray, ndarray]:
    """log L̂ of each run, and the last term's share of L̂."""
    first, last = columns
    own = first @ theta[: first.shape[1]]
    if not last.shape[1]:
        return own, np.zeros_like(own)
    rest = last @ theta[first.shape[1] :]
    log_loss = np.logaddexp(own, rest)
    return log_loss, np.exp(rest - log_loss)


def _minimised(theta: ndarray, columns: tuple[ndarray, ndarray], target: ndarray) -> Any:
    def difference(x: ndarray) -> ndarray:
        return _log_loss(x, columns)[0] - target

    def slopes(x: ndarray) -> ndarray:
        share = _log_loss(x, columns)[1][:, None]
        return np.concatenate([columns[0] * (1 - share), columns[1] * share], axis=1)

    low, high = _bounds(len(theta), target)
    theta = np.clip(theta, low + 1e-6, high - 1e-6)
    how: dict[str, Any] = {"loss": "huber", "x_scale": "jac", "max_nfev": _EVALUATIONS, "bounds": (low, high)}
    how |= dict.fromkeys(("ftol", "xtol", "gtol"), 1e-10)
    found: Any = None
    for delta in _WIDTHS:
        found = least_squares(difference, theta, slopes, f_scale=delta, **how)  # type: ignore[arg-type]
        theta = found.x
    return found


def _bounds(n: int, target: ndarray) -> tuple[ndarray, ndarray]:
    """Of the parameters: a term that the losses do not identify would run off to 0, or to an infinite exponent."""
    level = np.arange(n) % 4 == 0  # α and ζ
    low = np.where(level, target.min() - _DEPTH, -_STEEPEST)
    return low, np.where(level, target.max() + _DEPTH, _STEEPEST)


def _starts(form: str, columns: tuple[ndarray, ndarray], k: ndarray, loss: ndarray) -> list[ndarray]:
    """Least squares without the last term; and with a last term of a share of each k's smallest loss."""
    first, last = columns
    plain = np.linalg.lstsq(first, np.log(loss), rcond=None)[0]
    if form != JOINT:
        return [plain]
    least = np.array([loss[k == one].min() for one in k])
    found = [np.r_[plain, np.linalg.lstsq(last, np.log(1e-2 * least), rcond=None)[0]]]
    for share in _SHARES:
        rest = np.linalg.lstsq(last, np.log(share * least), rcond=None)[0]
        reducible = np.maximum(loss - np.exp(last @ rest), 1e-3 * loss)
        found.append(np.r_[np.linalg.lstsq(first, np.log(reducible), rcond=None)[0], rest])
    return found


def _moved(theta: ndarray, form: str, v: float, u: float) -> ndarray:
    """Parameters about (v, u) as parameters about 0; about 0 as about (−v, −u)."""
    new = theta.copy()
    if form == FLAT:
        new[0] = theta[0] - theta[1] * u
        return new
    a, b_k, b_n, c = theta[:4]
    new[:4] = a - b_k * u - b_n * v + c * u * v, b_k - c * v, b_n - c * u, c
    if form == JOINT:
        new[4] = theta[4] - theta[5] * u
    return new


class Refits(NamedTuple):
    """Fits to resampled losses."""

    fits: list[Fit]
    failed: int
    """refits that did not converge, left out"""

    def interval(self, number: Callable[[Fit], float], level: float = 0.95) -> tuple[float, float]:
        """Percentiles of a number of each fit; nan with fewer than 20 fits."""
        if len(self.fits) < 20:
            return np.nan, np.nan
        values = [number(one) for one in self.fits]
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)


Losses = Callable[[Int[ndarray, "prompt"] | None], Float[ndarray, "run"]]
"""Losses of all runs on prompts drawn so many times each; None: on the text as it is."""


def refits(
    n: Float[ndarray, "run"],
    k: Float[ndarray, "run"],
    losses: Losses,
    found: Fit,
    stream: np.random.Generator,
    *,
    draws: int,
    n_prompts: int,
    runs: bool = True,
) -> Refits:
    """Refit a form to resampled prompts, and (runs) to resampled runs at the same time.

        log L* = log L̂ + (log L_prompts* − log L) + e*,     e* drawn from the residuals of `found`, times √(N/(N − P))

    Prompts are drawn with replacement, whole (none with n_prompts 0), the same for every run. Without `runs` the residuals stay
    where they are: the interval then speaks of these SAEs. With `runs` it speaks of SAEs trained anew at the same n and k; what the form
    misses counts as noise. Simulated coverage of 95 % intervals (100 planted laws on 5 widths × 4 k, noise .005 in log L, 60 refits):
    β_n 96, γ 92, β_k 87, η 95 %, exponent of n at k = 32 89 %. N runs, P parameters. Source: residual bootstrap (Efron 1979); that prompts are drawn in the same draw is ours.
    """
    plain = np.log(losses(None))
    predicted = np.log(found.predict(n, k))
    spare = len(n) - len(FORMS[found.form])
    residuals = (found.residuals - found.residuals.mean()) * np.sqrt(len(n) / spare)
    kept: list[Fit] = []
    for _ in range(draws):
        moved = np.zeros(len(n))
        if n_prompts:
            moved = np.log(losses(stream.multinomial(n_prompts, np.full(n_prompts, 1 / n_prompts)))) - plain
        drawn = predicted + stream.choice(residuals, len(n)) if runs else plain
        kept.append(fit(n, k, np.exp(drawn + moved), found.form, start=found))
    good = [one for one in kept if one.converged]
    return Refits(good, draws - len(good))

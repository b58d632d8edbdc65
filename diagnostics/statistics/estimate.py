"""Estimates with their intervals, as every statistic gives them."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Num
from numpy import ndarray
from scipy import special

from interventions.files import Json

Transform = Literal["log", "logit"] | None
"""None: the statistic's own scale. "log": the interval is formed for its logarithm and exponentiated back. "logit": of a share in
[0, 1], for its log odds, so that its ends lie in [0, 1] (see `share`)."""
MISSING = "–"
"""shown where there is no number"""
MIN_PROMPTS, FEW_PROMPTS = 10, 20
"""effective prompts: below `MIN_PROMPTS` there is no interval, below `FEW_PROMPTS` a warning"""


def effective_number(sizes: Num[ndarray, "prompt"]) -> float:
    """1/Σ share²: how many prompts of equal size hold as much information as prompts of these sizes (Kish 1965).

    sizes: rows of each prompt, or any weights ≥ 0. The result is 0 where there are none.
    """
    total = float(np.sum(sizes))
    # Rounded, so that ten equal prompts are ten.
    return round(total**2 / float(np.square(sizes, dtype=float).sum()), 9) if total else 0.0


def digits(x: float, spec: str = ".3g") -> str:
    """A number as text, three digits unless `spec` says otherwise; a dash for nan."""
    return MISSING if np.isnan(x) else format(x, spec)


def with_interval(value: float, low: float, high: float) -> str:
    """`0.8 [0.6, 1]`, or the value alone where there is no interval."""
    return digits(value) + ("" if np.isnan(low) and np.isnan(high) else f" [{low:.3g}, {high:.3g}]")


def log_odds_interval(share: float, half: float) -> tuple[float, float]:
    """Ends of p ± half formed for the log odds, logit p ± half/(p(1 − p)), within [0, 1]; p above 0 and below 1."""
    low, high = special.expit(special.logit(share) + np.array([-1, 1]) * half / (share * (1 - share)))
    return float(low), float(high)


@dataclass(frozen=True)
class Estimate(Json):
    """A value and its interval."""

    value: float
    """the statistic on all rows; nan where it is undefined"""
    low: float
    """lower end; nan when there is none (fewer than 10 effective prompts) or it cannot be known"""
    high: float
    """upper end; nan as for `low`, inf when nothing bounds the statistic from above"""
    se: float
    """standard error, on the log scale for ratios and `transform="log"`, of the log odds for shares; nan without an interval"""
    n_rows: int
    """rows that entered"""
    n_prompts: int
    """distinct prompts among them, targets and sources together"""
    bound: bool = False
    """True: `value` is only a lower bound"""
    df: float = field(default=np.nan, metadata={"json": False})
    """degrees of freedom of the t distribution that formed the interval; nan without one, and for medians"""
    n_effective: float = np.nan
    """effective prompts, 1/Σ share² of the rows: n_prompts where all have the same number of rows"""
    influence: float = np.nan
    """of a mean or a ratio of means without an interval: the largest share of a sum that a single row holds"""

    def __str__(self) -> str:
        if self.bound:
            return f"≥ {self.value:.3g}"
        return with_interval(self.value, self.low, self.high)


EQUIVALENT = (0.8, 1.25)
"""times another ratio: what lies within counts as equal to it; stated before any result was seen"""


def verdict(ratio: Estimate, *nulls: float) -> Literal["larger", "smaller", "equivalent", "not resolved"]:
    """What the interval of a ratio says about null values, such as 1 or the ratios of randomly initialised models.

    "equivalent": the interval lies within `EQUIVALENT` times every null; else "larger" or "smaller": above, below all of them;
    else "not resolved", also without an interval and where the ratio is only a bound that lies below a null. An interval that
    holds the null does not show equivalence. Two one-sided tests at 2.5 % (Schuirmann 1987); the bounds are ours.
    """
    low, high = ratio.low, ratio.high
    least, most = min(nulls), max(nulls)
    if low >= EQUIVALENT[0] * most and high <= EQUIVALENT[1] * least:
        return "equivalent"
    if low > most:
        return "larger"
    return "smaller" if high < least else "not resolved"


@dataclass(frozen=True)
class CensoredMedian(Json):
    """A median of ratios some of whose denominators lie below the noise floor."""

    estimate: Estimate
    """the median over the rows that have a ratio; `bound` where it falls on a censored row"""
    n_censored: int
    """rows whose denominator alone is at or below the floor: ordered as +∞"""
    n_undefined: int
    """rows whose numerator and denominator both are (0/0): left out"""
    n_rows: int
    """all rows, those left out too"""


@dataclass(frozen=True)
class FiellerInterval(Json):
    """A ratio and the set of ratios that its numerator and denominator do not contradict."""

    value: float
    """numerator/denominator; nan where the denominator is 0"""
    low: float
    """an end of the set, see `kind`; −∞ for "everything" and nan for "none" """
    high: float
    """the other end; ∞ for "everything" and nan for "none" """
    kind: Literal["bounded", "exclusive", "everything", "none"]
    """the set. "bounded": [low, high]. "exclusive": (−∞, low] and [high, ∞), as the denominator may have either sign.
    "everything": no ratio is contradicted. "none": there is no set, for there are fewer than 10 effective prompts, a deletion
    leaves no row, or the denominator is 0 in every row. Only "bounded" identifies the ratio"""
    n_rows: int
    """rows that entered"""
    n_prompts: int
    """distinct prompts among them, targets and sources together"""
    n_effective: float = np.nan
    """effective prompts, as of an `Estimate`"""

    def __str__(self) -> str:
        ends = {"bounded": f" [{self.low:.3g}, {self.high:.3g}]", "everything": " (not identified)", "none": ""}
        return digits(self.value) + ends.get(self.kind, f" (−inf, {self.low:.3g}] or [{self.high:.3g}, inf)")

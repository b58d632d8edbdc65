"""Curves of intended and collateral effect by N, with intervals over groups of texts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy import stats

from diagnostics.statistics.estimate import MIN_PROMPTS, Estimate, FiellerInterval, Transform, effective_number
from diagnostics.statistics.jackknife import covariance_from_deletions, from_deletions
from diagnostics.statistics.measures import fieller_from

KEEP = "keep"
"""the condition without a selectivity"""
EVERY = "all"
"""in place of a data set's name: the mean over all concepts"""


@dataclass(frozen=True, eq=False)
class Curve:
    """Intended and collateral effect of one condition by N, and without each group of texts."""

    sae: str
    site: str
    data: str
    concept: str
    """a concept of `data`, or `mean of` how many"""
    ranking: str
    arm: str
    form: str
    counts: Int[ndarray, "count"]
    """N, ascending; for `keep` from 0"""
    value: Float[ndarray, "count 2"]
    """intended, collateral"""
    texts: tuple[Int[ndarray, "text"], Int[ndarray, "other_text"]]
    """the texts of the intended, and those of the collateral effect"""
    groups: Int[ndarray, "group"]
    """of these texts, ascending; each text its own where none were given"""
    sides: Int[ndarray, "group 2"]
    """texts of each group of the intended, and of the collateral effect"""
    without: Float[ndarray, "group count 2"]
    """the same without each group"""

    def estimate(self, k: int, part: int) -> Estimate:
        """Intended (0) or collateral (1) effect at the k-th N."""
        return self._one_sided(part, self.value[k, part], self.without[:, k, part])

    def selectivity(self, k: int) -> Estimate:
        """intended/(intended + collateral) in [0, 1]; 0 without an interval where the intended effect is not above 0, nan where both
        are 0. Ends of intervals may leave [0, 1]."""
        whole, parts = selectivity(self.value[k]), selectivity(self.without[:, k])
        if self.value[k, 0] <= 0:
            parts = np.full(len(parts), np.nan)
        return two_sided(float(whole), parts, self.sides, self.n_texts)

    def ratio(self, k: int) -> FiellerInterval:
        """intended/collateral with Fieller's interval."""
        few = fewer_side(self.sides)
        covariance, _ = covariance_from_deletions(self.without[:, k], self.sides.sum(axis=1))
        (var_a, cov), (_, var_b) = covariance if few >= MIN_PROMPTS else np.full((2, 2), np.nan)
        t = float(stats.t.ppf(0.975, max(1, few - 1)))
        a, b = self.value[k]
        size = {"n_rows": self.n_texts, "n_prompts": len(self.groups)}
        found = fieller_from(float(a), float(b), float(var_a), float(cov), float(var_b), t, **size)
        return replace(found, n_effective=few)

    def log_ratio(self, k: int) -> Estimate:
        """intended/collateral, the interval by the jackknife of its logarithm; nan unless both are above 0."""
        with np.errstate(all="ignore"):
            whole, parts = (
                np.where((v > 0).all(-1), v[..., 0] / v[..., 1], np.nan) for v in (self.value[k], self.without[:, k])
            )
        return two_sided(float(whole), parts, self.sides, self.n_texts, "log")

    def recovered(self, k: int, part: int) -> Estimate:
        """1 − effect with N kept / effect with none kept, for `keep` in the KL form, on texts with (0) or without (1) the concept."""
        with np.errstate(all="ignore"):
            whole, parts = (1 - v[..., k, part] / v[..., 0, part] for v in (self.value, self.without))
        return self._one_sided(part, float(whole), parts)

    @property
    def n_texts(self) -> int:
        """Number of texts of either effect."""
        return len(np.union1d(*self.texts))

    def _one_sided(self, part: int, whole: float, without: Float[ndarray, "group"]) -> Estimate:
        """Of one effect: only groups with a text of it count."""
        there = self.sides[:, part] > 0
        return from_deletions(float(whole), without[there], self.sides[there, part])


def fewer_side(sides: Int[ndarray, "group 2"]) -> float:
    """Effective groups of the kind of texts that has fewer of them."""
    return min(effective_number(sides[:, part]) for part in (0, 1))


def two_sided(
    whole: float,
    without: Float[ndarray, "group"],
    sides: Int[ndarray, "group 2"],
    n_rows: int,
    transform: Transform = None,
) -> Estimate:
    """`from_deletions` of a statistic of two kinds of texts, with t of the kind with fewer effective groups; no interval below 10 of either."""
    few = fewer_side(sides)
    if few < MIN_PROMPTS:
        return Estimate(whole, np.nan, np.nan, np.nan, n_rows, len(without), n_effective=few)
    found = replace(
        from_deletions(whole, without, sides.sum(axis=1), transform=transform), n_rows=n_rows, n_effective=few
    )
    if not np.isfinite(found.se):
        return found
    half = float(stats.t.ppf(0.975, few - 1)) * found.se
    low, high = (whole * np.exp(-half), whole * np.exp(half)) if transform else (whole - half, whole + half)
    return replace(found, low=float(low), high=float(high), df=float(few - 1))


def selectivity(effects: Float[ndarray, "*any 2"]) -> Float[ndarray, "*any"]:
    """max(I, 0)/(max(I, 0) + C) of intended and collateral effects."""
    intended = np.maximum(effects[..., 0], 0)
    with np.errstate(invalid="ignore"):
        return intended / (intended + effects[..., 1])


def joined(
    some: Sequence[Curve],
) -> tuple[tuple[Int[ndarray, "text"], Int[ndarray, "other_text"]], Int[ndarray, "group"], Int[ndarray, "group 2"]]:
    """Texts, groups and sides of several curves together; of a group's numbers of texts the largest."""
    own, others = (np.unique(np.concatenate([c.texts[part] for c in some])) for part in (0, 1))
    groups = np.unique(np.concatenate([c.groups for c in some]))
    sides = np.zeros((len(groups), 2), dtype=int)
    for c in some:
        at = np.searchsorted(groups, c.groups)
        sides[at] = np.maximum(sides[at], c.sides)
    return (own, others), groups, sides


def deleted(parts: Sequence[tuple[ndarray, Any, ndarray]], groups: Int[ndarray, "group"]) -> ndarray:
    """The mean of several statistics without each group, from (groups, value, value without each group) of each."""
    total = np.zeros((len(groups), *np.shape(parts[0][1])))
    for own, value, without in parts:
        whole = np.broadcast_to(value, total.shape).copy()
        whole[np.searchsorted(groups, own)] = without
        total += whole
    return total / len(parts)

"""Collateral effects of SAEs at equal intended effect."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from diagnostics.concept_ablation.curves import EVERY, KEEP, Curve, deleted, joined, two_sided
from diagnostics.statistics.estimate import Estimate
from interventions.errors import ResultError
from interventions.files import Json

REACHED, WITHIN, NOT_REACHED = "reached", "within the smallest N", "not reached"


@dataclass(frozen=True)
class EqualEffect(Json):
    """The collateral effect of one condition at the intended effect at which SAEs are compared."""

    sae: str
    site: str
    data: str
    concept: str
    ranking: str
    arm: str
    level: float
    """the intended effect, in the form's unit; nan for a mean over concepts"""
    status: str
    """`reached`; `within the smallest N`: the smallest N has a larger effect, and effects are interpolated to (0, 0); `not reached`"""
    count: float
    """N at that effect, interpolated on a log scale; nan where it is not reached, and for a mean"""
    collateral: Estimate | None
    selectivity: Estimate | None
    """level/(level + collateral)"""


def equal_effects(some: Sequence[Curve], share: float = 0.5) -> list[EqualEffect]:
    """Collateral effect at equal intended effect, of each curve of one form, then of the mean over concepts.

    The level of a concept and site is `share` of the median over SAEs of the largest intended effect of `selected` latents, which
    most SAEs reach. Between two N both effects are linear in log N; below the smallest N they are proportional. Intervals are
    jackknife intervals at the fixed level. Means are of selectivities, over the concepts whose level every SAE's selected latents
    reach. Empty without `selected`. Source: ours.
    """
    if not 0 < share < 1:
        raise ResultError(f"a share of {share} of the intended effect; expected one between 0 and 1")
    if len({c.form for c in some}) > 1:
        raise ResultError(f"curves of forms {sorted({c.form for c in some})}; give those of one")
    if all(c.arm != "selected" for c in some):
        return []
    levels: dict[tuple[str, ...], float] = {}
    for key in dict.fromkeys(map(_place, some)):
        own = [c.value[:, 0] for c in some if _place(c) == key and c.arm == "selected"]
        largest = [np.nanmax(value) for value in own if np.isfinite(value).any()]
        levels[key] = share * float(np.median(largest)) if largest else np.nan
    found = []
    parts: dict[tuple[str, ...], list[tuple[Curve, float, ndarray]]] = {}
    for c in some:
        if c.arm == KEEP:
            continue
        level = levels[_place(c)]
        one, count, status = _at(c.counts, c.value, level)
        head = (c.sae, c.site, c.data, c.concept, c.ranking, c.arm, level, status)
        if status == NOT_REACHED:
            found.append(EqualEffect(*head, np.nan, None, None))
            continue
        without = np.array([_at(c.counts, v, level)[0] for v in c.without])
        selective = level / (level + without)
        estimates = [
            two_sided(whole, parts, c.sides, c.n_texts)
            for whole, parts in ((one, without), (level / (level + one), selective))
        ]
        found.append(EqualEffect(*head, count, *estimates))
        parts.setdefault((c.sae, c.site, c.ranking, c.arm), []).append((c, level / (level + one), selective))
    return found + _means_of(some, parts)


def _means_of(
    some: Sequence[Curve], parts: dict[tuple[str, ...], list[tuple[Curve, float, ndarray]]]
) -> list[EqualEffect]:
    concepts = {(c.site, c.data, c.concept, c.ranking) for c in some}
    saes = {(c.sae, c.site) for c in some}
    reached = {
        (site, data, concept, ranking)
        for site, data, concept, ranking in concepts
        if all(
            any((c.data, c.concept) == (data, concept) for c, *_ in parts.get((sae, site, ranking, "selected"), ()))
            for sae, at in saes
            if at == site
        )
    }
    found = []
    for sae, site, ranking, arm in dict.fromkeys((c.sae, c.site, c.ranking, c.arm) for c in some if c.arm != KEEP):
        wanted = [key for key in reached if key[0] == site and key[3] == ranking]
        own = [p for p in parts.get((sae, site, ranking, arm), ()) if _place(p[0]) in reached]
        head = (sae, site, EVERY, f"mean of {len(wanted)}", ranking, arm, np.nan)
        if not wanted or len(own) < len(wanted):
            status = f"{NOT_REACHED} in {len(wanted) - len(own)}" if wanted else NOT_REACHED
            found.append(EqualEffect(*head, status, np.nan, None, None))
            continue
        texts, groups, sides = joined([c for c, *_ in own])
        without = deleted([(c.groups, value, each) for c, value, each in own], groups)
        mean = float(np.mean([value for _, value, _ in own]))
        selective = two_sided(mean, without, sides, len(np.union1d(*texts)))
        found.append(EqualEffect(*head, REACHED, np.nan, None, selective))
    return found


def _place(c: Curve) -> tuple[str, ...]:
    return c.site, c.data, c.concept, c.ranking


def _at(counts: Int[ndarray, "count"], value: Float[ndarray, "count 2"], level: float) -> tuple[float, float, str]:
    """Collateral effect and N where the intended effect first is `level`; N without finite effects are skipped."""
    known = np.isfinite(value).all(1)
    counts, value = counts[known], value[known]
    effects = np.vstack([[0.0, 0.0], value])
    there = np.flatnonzero(effects[:, 0] >= level) if level > 0 else np.zeros(0, dtype=int)
    if not len(there):
        return np.nan, np.nan, NOT_REACHED
    k = int(there[0])
    part = (level - effects[k - 1, 0]) / (effects[k, 0] - effects[k - 1, 0])
    collateral = float(effects[k - 1, 1] + part * (effects[k, 1] - effects[k - 1, 1]))
    if k == 1:
        return collateral, float(counts[0]), WITHIN
    return collateral, float(np.exp(np.log(counts[k - 2]) * (1 - part) + np.log(counts[k - 1]) * part)), REACHED

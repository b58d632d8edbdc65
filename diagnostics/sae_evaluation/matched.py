"""SAEs of two architectures at equal L0, and at equal FVE: each measure interpolated over a sweep of sparsity."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy import ndarray
from scipy import stats

from diagnostics.figures.looks import SPARSITY
from diagnostics.sae_evaluation.measures import MEASURES
from diagnostics.statistics.estimate import MIN_PROMPTS, Estimate
from diagnostics.statistics.jackknife import from_deletions
from diagnostics.statistics.tables import few_prompts, lines_of

COMPARED = (*MEASURES, "dead_share")
"""The measures that are interpolated."""
AXES = {"l0": "equal L0", "fve": "equal FVE"}
Groups = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Family:
    """SAEs of one site that differ in sparsity alone."""

    name: str
    """the members' name without their k or l1; the first member's with … where they have no such name"""
    site: str
    trained: tuple[Any, Any]
    """seed and steps of the training; None where not known"""
    saes: tuple[str, ...]


def families(saes: Mapping[str, Mapping[str, Any]]) -> list[Family]:
    """SAEs that differ in sparsity alone, two or more together, from what provenance says of each.

    The same: site, width, score, kind of selector, input normalisation and, where it is known, the recipe but for k and l1, the
    text and the number of training steps. Source: ours.
    """
    found: dict[str, list[str]] = {}
    for name, said in saes.items():
        found.setdefault(json.dumps(_settings(said), sort_keys=True), []).append(name)
    swept = [
        Family(_name(names), saes[names[0]]["site"], _trained(saes[names[0]])[2:], tuple(names))
        for names in found.values()
        if len(names) > 1
    ]
    named = [family.name for family in swept]
    return [f if named.count(f.name) == 1 else replace(f, name=f"{f.saes[0]} …") for f in swept]


def counterpart(name: str, saes: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The SAE that another is compared with: the first of its site with its k, l1, seed and steps, else the first of its site.

    None for that SAE itself.
    """
    here = [other for other, said in saes.items() if said["site"] == saes[name]["site"]]
    alike = [other for other in here if _trained(saes[other]) == _trained(saes[name])]
    first = alike[0] if alike[0] != name else here[0]
    return first if first != name else None


def matched(
    swept: Sequence[Family], groups: Groups, deletions: pd.DataFrame, at: Mapping[str, float] | None = None
) -> Iterator[dict[str, Any]]:
    """A line for each family and corpus and each of equal L0 and equal FVE: its difference from the reference in every measure.

        Δm(q) = m_family(q) − m_reference(q),   m(q) linear between neighbours in log L0 (equal FVE: in FVE)

    The reference is the site's first family of the same training seed and steps, else its first. q (`value`): `at`["l0"] or ["fve"], by
    default the middle of the range that both sweeps cover (`low`, `high`; of L0 the geometric one). Nothing is extrapolated:
    where a q lies outside, or a sweep does not rise, `note` says so and the measures are nan. Each measure is an `Estimate`, in its
    own unit, with the delete-one-prompt jackknife interval of the difference at the same q: paired over prompts, so a prompt's
    share in both sweeps cancels. A deletion that moves q out of the range leaves no interval. `n_prompts`: of the measure that
    has fewest. `of_family`, `of_reference`: the two values.

    groups: a line for each SAE and corpus, over all counted tokens. deletions: `SAEEvaluation.deletions`. Source: ours.
    """
    for corpus in dict.fromkeys(g["corpus"] for g in groups):
        here = {g["sae"]: g for g in groups if g["corpus"] == corpus}
        curves = {f.name: _Curve(f, here, lines_of(deletions, corpus=corpus)) for f in swept}
        for family in swept:
            beside = [f for f in swept if f.site == family.site]
            first = next(f for f in beside if f.trained == family.trained)
            reference = first if first != family else beside[0]
            if reference == family:
                continue
            place = {name: here[family.saes[0]][name] for name in ("site", "layer", "point", "corpus")}
            place |= {"family": family.name, "reference": reference.name}
            for axis in AXES:
                yield place | _difference(axis, curves[reference.name], curves[family.name], (at or {}).get(axis))


class _Curve:
    """The measures of a family's members, on all prompts (first) and without each."""

    def __init__(self, family: Family, groups: Mapping[str, Mapping[str, Any]], deletions: pd.DataFrame):
        members = [groups[name] for name in family.saes]
        rows = [lines_of(deletions, sae=name) for name in family.saes]
        self.values: dict[str, Float[ndarray, "deletion member"]] = {}
        for name in COMPARED:
            value = [g[name].value if isinstance(g[name], Estimate) else g[name] for g in members]
            without = [row[name].to_numpy(float) for row in rows]
            self.values[name] = np.column_stack([np.r_[v, w] for v, w in zip(value, without, strict=True)])
        self.sizes = rows[0]["n_tokens"].to_numpy()
        self.n_rows = {name: members[0][name].n_rows for name in MEASURES} | {"dead_share": members[0]["fve"].n_rows}
        self.n_prompts = {name: min(g[name].n_prompts for g in members) for name in MEASURES}
        self.n_prompts["dead_share"] = self.n_prompts["fve"]

    def range(self, axis: str) -> tuple[float, float]:
        x = self.values[axis][0]
        return float(x.min()), float(x.max())

    def rises(self) -> bool:
        """Whether FVE rises with L0, so that one L0 belongs to an FVE."""
        l0, fve = self.values["l0"][0], self.values["fve"][0]
        return bool((np.diff(fve[np.argsort(l0)]) > 0).all())

    def at(self, axis: str, q: float) -> dict[str, Float[ndarray, "deletion"]]:
        """Every measure at an L0 or FVE; nan outside the range, or where the sweep does not rise."""
        with np.errstate(divide="ignore"):  # an SAE that never fires lies outside every range
            log_l0 = np.log(self.values["l0"])
        x, q = (log_l0, float(np.log(q))) if axis == "l0" else (self.values["fve"], q)
        order = np.argsort(log_l0, axis=1)
        x = np.take_along_axis(x, order, 1)
        rising = [bool((np.diff(row) > 0).all()) for row in x]
        found = {}
        for name in COMPARED:
            y = np.take_along_axis(log_l0 if name == "l0" else self.values[name], order, 1)
            each = [
                np.interp(q, a, b, left=np.nan, right=np.nan) if up else np.nan
                for a, b, up in zip(x, y, rising, strict=True)
            ]
            found[name] = np.exp(each) if name == "l0" else np.array(each)
        return found


def _difference(axis: str, one: _Curve, other: _Curve, q: float | None) -> dict[str, Any]:
    ends = [curve.range(axis) for curve in (one, other)]
    low, high = max(e[0] for e in ends), min(e[1] for e in ends)
    note = ""
    if axis == "fve" and not (one.rises() and other.rises()):
        note = "FVE does not rise with L0 in a sweep"
    elif not low < high:
        said = " and ".join(f"{a:.3g} to {b:.3g}" for a, b in ends)
        note = f"no common range: the sweeps have {AXES[axis].split()[1]} {said}"
    elif q is not None and not low <= q <= high:
        note = "outside the common range, not extrapolated"
    elif q is None:
        q = float(np.sqrt(low * high)) if axis == "l0" else (low + high) / 2
    q = np.nan if q is None else float(q)
    line: dict[str, Any] = {"axis": axis, "value": q, "low": low, "high": high, "note": note}
    sides = [curve.at(axis, np.nan if note else q) for curve in (one, other)]
    for name in COMPARED:
        if name != axis:
            delta = sides[1][name] - sides[0][name]
            n = min(curve.n_prompts[name] for curve in (one, other))
            line[name] = replace(of_differences(delta, n, one.sizes), n_rows=one.n_rows[name])
    line["of_reference"], line["of_family"] = (
        {name: float(side[name][0]) for name in COMPARED if name != axis} for side in sides
    )
    return line


def of_differences(values: Float[ndarray, "deletion"], n_prompts: int, sizes: Int[ndarray, "prompt"]) -> Estimate:
    """From a difference on all prompts (first) and without each of them; n_prompts: of those, with what is measured.

    sizes: tokens of each prompt.
    """
    with few_prompts():  # few prompts: their number stands beside each interval
        found = from_deletions(float(values[0]), values[1:], sizes)
    effective = min(found.n_effective, float(n_prompts))
    found = replace(found, n_prompts=n_prompts, n_effective=effective)
    if effective < MIN_PROMPTS or not found.se > 0:
        return replace(found, low=np.nan, high=np.nan, se=np.nan, df=np.nan)
    half = float(stats.t.ppf(0.975, effective - 1)) * found.se
    return replace(found, low=found.value - half, high=found.value + half, df=effective - 1)


def _name(names: Sequence[str]) -> str:
    stems = {SPARSITY.sub("", name) for name in names}
    return stems.pop() if len(stems) == 1 and stems != set(names) else f"{names[0]} …"


def _settings(said: Mapping[str, Any]) -> dict[str, Any]:
    """What SAEs of one family share."""
    metadata = said.get("metadata") or {}
    recipe = {name: value for name, value in (metadata.get("recipe") or {}).items() if name not in ("k", "l1")}
    known = {name: said.get(name) for name in ("site", "d_sae", "score", "normalise", "restore_norm")}
    trained = {name: metadata.get(name) for name in ("architecture", "text", "steps", "tokens")}
    return (
        known | trained | {"selector": (said.get("selector") or {}).get("kind"), "recipe": recipe, "step": _step(said)}
    )


def _step(said: Mapping[str, Any]) -> Any:
    return ((said.get("metadata") or {}).get("training") or {}).get("step")


def _trained(said: Mapping[str, Any]) -> tuple[Any, ...]:
    """k, l1, seed and steps of the training; None for what is not known."""
    recipe = (said.get("metadata") or {}).get("recipe") or {}
    return *(recipe.get(name) for name in ("k", "l1", "seed")), _step(said)

"""Statistics of probe perturbation: TPP and SCR with intervals over groups of texts; probes and latents held fixed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pandas as pd
from numpy import ndarray
from scipy import stats

from diagnostics.probe_perturbation.work import SCR, TPP
from diagnostics.results.headlines import Headline
from diagnostics.statistics.estimate import Estimate, FiellerInterval, effective_number
from diagnostics.statistics.jackknife import covariance_from_deletions, from_deletions
from diagnostics.statistics.measures import fieller_from
from diagnostics.statistics.tables import each, few_prompts, lines_of

_KEYS = ("protocol", "sae", "dataset", "kind", "k")
EVERY = "every"
"""In place of a class: the mean over all."""
NOTE = (
    "tpp: intended − collateral, the fall of the accuracy of the ablated class' own probe less the mean fall of the others'. scr: rise of "
    "the biased probe's accuracy ÷ its gap to a probe of balanced texts. Held-out texts; 95 % delete-one-group jackknife (one text unless groups are "
    "given), probes and latents held fixed, splits pooled. random: latents of similar dose, scaled to the same ‖Δx̄‖; direction: the probe's own direction projected out."
)


def groups_of(cells: pd.DataFrame, texts: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """For each protocol × SAE × data set × kind × k × what is ablated (of TPP also their mean): the estimates."""
    shown = ["dose", "before", "after", "oracle", "latents"]
    doses = cast(pd.DataFrame, cells.groupby([*_KEYS, "ablated"], sort=True)[shown].mean())
    for (protocol, sae, dataset, kind, k), some in each(texts, _KEYS):
        keys = {"protocol": protocol, "sae": sae, "dataset": dataset, "kind": kind, "k": int(k)}
        names = list(dict.fromkeys(some["ablated"]))
        with few_prompts():  # few groups: their number stands beside each interval
            perturbed = _perturbed(some, names) if protocol == TPP else {}
            for name in [EVERY, *names] if protocol == TPP else names:
                known = doses.loc[(protocol, sae, dataset, kind, k)]
                means = known.mean() if name == EVERY else known.loc[name]
                line = {"intended": None, "collateral": None, "tpp": None, "scr": None, "rise": None}
                line |= perturbed[name] if protocol == TPP else removed(lines_of(some, ablated=name))
                yield keys | {"ablated": name} | line | {column: float(means[column]) for column in shown}


def _perturbed(some: pd.DataFrame, names: Sequence[str]) -> dict[str, dict[str, Estimate]]:
    """Intended, collateral and TPP of each class, and their means over classes.

    Probe j's fall when class i is ablated is Σ fell / Σ n over its held-out texts, here also without each group.
    """
    place, number = {name: i for i, name in enumerate(names)}, np.unique(some["group"], return_inverse=True)[1]
    at = number, some["ablated"].map(place).to_numpy(int), some["probe"].map(place).to_numpy(int)
    fell, n = (np.zeros((number.max() + 1, len(names), len(names))) for _ in range(2))
    np.add.at(fell, at, some["fell"].to_numpy(float))
    np.add.at(n, at, some["n"].to_numpy(float))
    with np.errstate(all="ignore"):
        theta, without = fell.sum(0) / n.sum(0), (fell.sum(0) - fell) / (n.sum(0) - n)
    sizes, found = n.sum((1, 2)), {}
    whole, parts = _three(theta), _three(without)
    for name in (EVERY, *names):
        pick = (lambda x: x.mean(-1)) if name == EVERY else (lambda x, i=place[name]: x[..., i])
        found[name] = {what: _estimate(float(pick(whole[what])), pick(parts[what]), sizes) for what in whole}
    return found


def _three(fall: ndarray) -> dict[str, ndarray]:
    """Of falls [… ablated probe], by ablated class: its own probe's, the mean of the others', and the difference."""
    own = np.diagonal(fall, axis1=-2, axis2=-1)
    others = (fall.sum(-1) - own) / (fall.shape[-1] - 1)
    return {"intended": own, "collateral": others, "tpp": own - others}


def _estimate(theta: float, without: ndarray, sizes: ndarray) -> Estimate:
    return from_deletions(theta, without, sizes.astype(int))


def removed(lines: pd.DataFrame) -> dict[str, Estimate | FiellerInterval]:
    """The rise of the biased probe's accuracy, and SCR = rise ÷ gap with Fieller's interval."""
    number = np.unique(lines["group"], return_inverse=True)[1]
    rise, gap, n = (np.bincount(number, x) for x in (-lines["fell"].to_numpy(float), lines["gap"].to_numpy(float), lines["n"].to_numpy(float)))  # fmt: skip
    whole = np.array([rise.sum(), gap.sum()]) / n.sum()
    with np.errstate(all="ignore"):
        without = np.stack([(x.sum() - x) / (n.sum() - n) for x in (rise, gap)], axis=1)
    covariance, df = covariance_from_deletions(without, n)
    t = float(stats.t.ppf(0.975, df)) if np.isfinite(df) else 1.0
    size = {"n_rows": int(n.sum()), "n_prompts": len(n)}
    (var_a, cov), (_, var_b) = covariance.tolist()
    ratio = fieller_from(float(whole[0]), float(whole[1]), var_a, cov, var_b, t, **size)
    scr = replace(ratio, n_effective=effective_number(n))
    return {"rise": _estimate(float(whole[0]), without[:, 0], n), "scr": scr}


def table_of(groups: Sequence[Mapping[str, Any]], protocol: str) -> pd.DataFrame:
    """A line for each k of one protocol: of TPP the mean over classes."""
    shown = ("intended", "collateral", "tpp") if protocol == TPP else ("before", "after", "oracle", "scr")
    named = ("sae", "dataset", *(("ablated",) if protocol == SCR else ()), "kind", "k", *shown, "dose")
    some = [g for g in groups if g["protocol"] == protocol and (protocol == SCR or g["ablated"] == EVERY)]
    return pd.DataFrame([{name: g[name] for name in named} for g in some])


def headlines(groups: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any]) -> Iterator[Headline]:
    """TPP and SCR at the middle k, beside random latents at the same dose and the probe's direction."""
    ks = sorted(provenance["ks"])
    k = ks[len(ks) // 2]
    for g in groups:
        if g["kind"] != "selected" or g["k"] != k or (g["protocol"] == TPP and g["ablated"] != EVERY):
            continue
        if g["protocol"] == SCR and not np.isfinite(g["scr"].value):
            continue  # no gap to close: see `without_gap`
        same = ("protocol", "sae", "dataset", "ablated")
        beside = {
            o["kind"]: o[g["protocol"]].value
            for o in groups
            if o["k"] in (k, 0) and all(o[name] == g[name] for name in same)
        }
        against = (
            f"random latents at the same dose: {beside['random']:.3g}; the probe's direction: {beside['direction']:.3g}"
        )
        what = "targeted probe perturbation" if g["protocol"] == TPP else f"spurious {g['ablated']} removed"
        yield Headline(f"{what}, {k} latents, {g['sae']}, {g['dataset']}", str(g[g["protocol"]]), against)


def without_gap(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Spurious attributes that the biased probe does not lean on: SCR is not defined; a line each."""
    some = [g for g in groups if g["protocol"] == SCR and g["kind"] == "direction" and not np.isfinite(g["scr"].value)]
    return list(dict.fromkeys(
        f"{g['dataset']}: the biased probe is right in {g['before']:.3g} of the balanced texts, as a probe of balanced texts is; "
        f"{g['ablated']} is not leaned on, so it has no scr"
        for g in some
    ))  # fmt: skip

"""Intended and collateral effects by N, from the table of a feature ablation."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray

from diagnostics.concept_ablation.curves import EVERY, KEEP, Curve, deleted, joined
from diagnostics.concept_ablation.equal_effects import EqualEffect
from diagnostics.results.headlines import Headline
from diagnostics.statistics.jackknife import sums_without
from interventions.errors import ResultError
from interventions.texts.labelled import UNSPLIT

FORMS = ("kl", "logit", "probe")
"""Forms of intended and collateral effect: see `feature_ablation`."""
_KEYS = ("sae", "layer", "point", "data", "concept", "ranking", "arm")


def curves(frame: pd.DataFrame, forms: Sequence[str]) -> list[Curve]:
    """A curve for each SAE × concept × ranking × condition × form of a table of `feature_ablation`.

    Texts have equal weights and count where their effect is finite; the jackknife deletes groups. Raises `ResultError` for a table in
    which an N lacks some text.
    """
    found = []
    for keys, rows in frame.groupby(list(_KEYS), sort=False):
        labels: dict[str, Any] = dict(zip(_KEYS, cast(tuple[Any, ...], keys), strict=True))
        rows = rows.sort_values(["count", "own", "text"], ascending=[True, False, True], kind="stable")
        counts = np.unique(rows["count"].to_numpy())
        if len(rows) % len(counts) or rows.groupby("count")["text"].nunique().nunique() > 1:
            raise ResultError(f"{labels}: not every text has a line at every N; give a whole table")
        shape = len(counts), -1
        own = rows["own"].to_numpy(bool).reshape(shape)[0]
        texts, group = (rows[name].to_numpy().reshape(shape)[0] for name in ("text", "group"))
        columns = {name: rows[name].to_numpy(float).reshape(shape) for name in ("kl", "target_fall", "other_square")}
        columns["fall"] = (rows["class_probe_clean"] - rows["class_probe"]).to_numpy(float).reshape(shape)
        named = {
            "sae": labels["sae"],
            "site": f"{labels['layer']}.{labels['point']}",
            **{name: labels[name] for name in ("data", "concept", "ranking", "arm")},
        }
        for form in forms:
            if form == "probe" and np.isnan(columns["fall"]).all():
                continue  # a data set without classes
            found.append(Curve(**named, form=form, counts=counts, **_effects(columns, texts, own, group, form)))
    return found


def _effects(
    columns: dict[str, Float[ndarray, "count text"]], texts: ndarray, own: ndarray, group: ndarray, form: str
) -> dict[str, Any]:
    """Fields of a `Curve`: both effects, their texts, groups and sides, and both effects without each group."""
    if form == "logit":
        parts = [(columns["target_fall"], own), (columns["other_square"], own)]
    else:
        which = columns["kl"] if form == "kl" else columns["fall"]
        parts = [(which, own), (which if form == "kl" else np.abs(which), ~own)]
    value, without = (np.stack(some, axis=-1) for some in zip(*(_means(*part, group) for part in parts), strict=True))
    if form == "logit":
        value[..., 1], without[..., 1] = np.sqrt(value[..., 1]), np.sqrt(without[..., 1])
    groups = np.unique(group)
    sides = np.stack(
        [np.bincount(np.searchsorted(groups, group[of]), minlength=len(groups)) for _, of in parts], axis=-1
    )
    used = sides.any(1)
    return {
        "value": value,
        "texts": (texts[parts[0][1]], texts[parts[1][1]]),
        "groups": groups[used],
        "sides": sides[used],
        "without": without[used],
    }


def _means(values: Float[ndarray, "count text"], of: ndarray, group: ndarray) -> tuple[ndarray, ndarray]:
    """The mean over some texts with finite values, and without each group, `[group, count]`."""
    known = of & np.isfinite(values)
    own = np.where(known, values, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        without = sums_without(own, group) / sums_without(known.astype(float), group)
        return own.sum(1) / known.sum(1), np.maximum(without, 0).T if (own >= 0).all() else without.T


def mean_over_concepts(some: Sequence[Curve]) -> list[Curve]:
    """The mean over concepts of each SAE × ranking × arm × form; a group of texts is deleted from all concepts at once."""
    alike: dict[tuple[str, ...], list[Curve]] = {}
    for curve in some:
        alike.setdefault((curve.sae, curve.site, curve.ranking, curve.arm, curve.form), []).append(curve)
    found = []
    for (sae, site, ranking, arm, form), own in alike.items():
        texts, groups, sides = joined(own)
        value = np.mean([c.value for c in own], axis=0)
        without = deleted([(c.groups, c.value, c.without) for c in own], groups)
        head = (sae, site, EVERY, f"mean of {len(own)}", ranking, arm, form, own[0].counts)
        found.append(Curve(*head, value, texts, groups, sides, without))
    return found


def summaries(frame: pd.DataFrame, some: Sequence[Curve]) -> list[dict[str, Any]]:
    """A line for each point of each curve, with intervals; doses beside them."""
    doses = _doses(frame)
    found = []
    for c in some:
        for k, n in enumerate(c.counts.tolist()):
            names = ("sae", "site", "data", "concept", "ranking", "arm", "form")
            line: dict[str, Any] = {name: getattr(c, name) for name in names}
            line |= {"count": n, "intended": c.estimate(k, 0), "collateral": c.estimate(k, 1)}
            if c.arm == KEEP:
                line |= {"selectivity": None, "ratio": None}
                known = c.form == "kl"
                line |= {"recovered": c.recovered(k, 0), "recovered_others": c.recovered(k, 1)} if known else {}
            else:
                line |= {"selectivity": c.selectivity(k), "ratio": c.ratio(k)}
            found.append(line | doses[c.sae, c.data, c.concept, c.ranking, c.arm, n])
    return found


def _doses(frame: pd.DataFrame) -> dict[tuple[Any, ...], dict[str, float]]:
    """Mean ‖Δx‖², share of tokens edited and coherence, on texts with and without the concept; latents removed."""
    table = frame.assign(edited=frame["n_edited"] / frame["n_tokens"])
    keys = ["sae", "data", "concept", "ranking", "arm", "count"]
    means = cast(
        pd.DataFrame,
        table.groupby([*keys, "own"], sort=False)[["delta_square", "edited", "coherence", "n_latents"]].mean(),
    )
    found: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in means.reset_index().to_dict("records"):
        side = "" if row["own"] else "_others"
        found.setdefault(tuple(row[key] for key in keys), {"n_latents": int(row["n_latents"])}).update(
            {f"{name}{side}": float(row[name]) for name in ("delta_square", "edited", "coherence")}
        )
    return found


def first_numbers(form: str, means: Sequence[Curve]) -> Iterator[Headline]:
    """Selectivity at the middle N of the selected latents, mean over concepts, beside that of random latents and of placebos."""
    for c in (c for c in means if c.arm == "selected"):
        k = len(c.counts) // 2
        others = [o for o in means if (o.sae, o.ranking) == (c.sae, c.ranking) and o.arm in ("random", "placebo")]
        against = "; ".join(f"{o.arm}: {o.selectivity(k)}" for o in others)
        words = f"selectivity ({form}) of the {int(c.counts[k])} latents of a concept, mean over concepts, {c.sae}"
        yield Headline(words, str(c.selectivity(k)), against or "0.5: as much collateral as intended")


NOTE = (
    "Intervals: 95 % delete-one-group jackknife; a group is one text unless groups are given, and is not split between ranking and "
    "measuring. Intended and collateral effect: over groups of their own texts; selectivity: t of the smaller number of groups; none below "
    "10 groups. Units: kl in nats, logit and probe in logits. ‖Δx‖²: mean over tokens; coherence: ‖ΣΔx‖/Σ‖Δx‖ over a text; both on texts "
    "with / without the concept. At equal intended effect: half the median over SAEs of the largest one."
)


def tables(
    frame: pd.DataFrame, by_form: Mapping[str, tuple[Sequence[Curve], Sequence[EqualEffect]]]
) -> dict[str, pd.DataFrame]:
    """Of each form: means over concepts by N, and SAEs at equal intended effect (empty without selected latents)."""
    found = {}
    for form, (means, equal) in by_form.items():
        found[f"{form}, mean over concepts"] = _mean_lines(frame, means)
        found[f"{form}, at equal intended effect"] = pd.DataFrame([_line(e) for e in equal])
    return found


def _mean_lines(frame: pd.DataFrame, curves: Sequence[Curve]) -> pd.DataFrame:
    means = frame.groupby(["sae", "ranking", "arm", "count", "own"])[["delta_square", "coherence"]].mean()
    doses: dict[str, dict[Any, float]] = cast(pd.DataFrame, means).to_dict()
    lines = []
    for c in curves:
        for k, n in enumerate(c.counts.tolist()):
            line: dict[str, Any] = {"sae": c.sae, "ranking": c.ranking, "arm": c.arm, "N": n}
            line |= {"intended": c.estimate(k, 0), "collateral": c.estimate(k, 1)}
            line |= {"selectivity": "" if c.arm == "keep" else c.selectivity(k)}
            for name, column in (("‖Δx‖²", "delta_square"), ("coherence", "coherence")):
                both = [doses[column][c.sae, c.ranking, c.arm, n, own] for own in (True, False)]
                line[name] = " / ".join(f"{value:.3g}" for value in both)
            lines.append(line)
    return pd.DataFrame(lines)


def _line(e: EqualEffect) -> dict[str, Any]:
    said = {"sae": e.sae, "data": e.data, "concept": e.concept, "arm": e.arm, "ranking": e.ranking}
    return said | {
        "intended": e.level,
        "N": e.count,
        "collateral": "" if e.collateral is None else e.collateral,
        "selectivity": "" if e.selectivity is None else e.selectivity,
        "status": e.status,
    }


def measured(found: dict[str, Any]) -> str:
    """The number of measuring texts of a data set, their groups if any, and missing classes, from provenance."""
    texts, groups = (found["measured"][what] for what in ("texts", "groups"))
    said = f"{texts} texts measured{f' in {groups} groups' * (groups < texts)}, {len(found['concepts'])} concepts"
    return said + "".join(f" (without {why})" for why in found.get("dropped", {}) if why.endswith(UNSPLIT))

"""Pooled estimates of sparse probing: over classes and splits, by jackknife over groups; differences of SAEs; tables."""

import warnings
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pandas as pd
from numpy import ndarray

from diagnostics.results.headlines import Headline
from diagnostics.statistics.estimate import Estimate
from diagnostics.statistics.jackknife import from_deletions, sums_without
from diagnostics.statistics.tables import with_ends
from interventions.errors import ResultError
from interventions.texts.labelled import UNSPLIT

MEAN = "mean"
"""In place of a data set's name: the mean over data sets."""
NOTE = (
    "Held-out accuracy, pooled over classes (each against the rest, balanced: chance .5) and splits. Intervals: 95 % delete-one-group "
    "jackknife, none below 10 groups; a group is one text unless groups are given. Probes are held fixed: intervals do not include "
    "variation between training sets, draws of random latents, or trained SAEs. Seeds: of the split."
)
MEASURES = ("accuracy", "cross_entropy")
_KEYS = ["sae", "dataset", "kind", "k"]


def groups(frame: pd.DataFrame, held_out: pd.DataFrame) -> list[dict[str, Any]]:
    """For each SAE × data set × kind × k, and the mean over data sets: estimates of `MEASURES`, values by split, training loss."""
    columns = [*MEASURES, "auc", "cross_entropy_train"]
    by_seed = cast(pd.DataFrame, frame.groupby([*_KEYS, "seed"], sort=False)[columns].mean())
    seeds = {key: part.to_numpy(float) for key, part in by_seed.groupby(level=_KEYS, sort=False)}
    texts = {key: part for key, part in held_out.groupby(_KEYS, sort=False)}
    names, datasets = (list(dict.fromkeys(frame[column])) for column in ("sae", "dataset"))
    probes = list(dict.fromkeys(zip(frame["kind"], frame["k"], strict=True)))
    found = []
    for sae in names:
        for kind, k in probes:
            parts = {name: (sae, name, kind, k) for name in datasets}
            for dataset in (*datasets, *([MEAN] if len(datasets) > 1 else [])):
                keys = [parts[dataset]] if dataset != MEAN else list(parts.values())
                split = np.mean([seeds[key] for key in keys], axis=0)
                group: dict[str, Any] = {"sae": sae, "dataset": dataset, "kind": kind, "k": int(k)}
                group |= {name: _pooled([texts[key] for key in keys], name) for name in MEASURES}
                group["auc"], group["cross_entropy_train"] = (float(split[:, i].mean()) for i in (2, 3))
                group["by_seed"] = {name: split[:, i].tolist() for i, name in enumerate((*MEASURES, "auc"))}
                found.append(group)
    return found


def difference(held_out: pd.DataFrame, first: str, second: str, kind: str, k: int) -> dict[str, Estimate]:
    """Accuracy of one SAE − another's, by data set and their mean, paired by text. Raises `ResultError` for missing probes."""
    some = cast(pd.DataFrame, held_out[(held_out["kind"] == kind) & (held_out["k"] == k)])
    parts = [cast(pd.DataFrame, some[some["sae"] == name]) for name in (first, second)]
    for name, part in zip((first, second), parts, strict=True):
        if part.empty:
            known = sorted(set(zip(held_out["sae"], held_out["kind"], held_out["k"], strict=True)))
            raise ResultError(f"no probe of {name!r}, kind {kind!r}, k {k} in this result; known: {known}")
    own = {}
    for dataset in dict.fromkeys(parts[0]["dataset"]):
        both = [part[part["dataset"] == dataset].set_index("text") for part in parts]
        every = both[0].index.union(both[1].index)
        pairs = [part.reindex(every, fill_value=0) for part in both]
        group = pd.concat([part["group"] for part in both]).groupby(level=0).first().loc[every].to_numpy()
        (a, a_without, n), (b, b_without, _) = (_ratio(part.assign(group=group), "correct") for part in pairs)
        own[dataset] = a - b, a_without - b_without, n
    found = {dataset: _mean([part]) for dataset, part in own.items()}
    return found | ({MEAN: _mean(list(own.values()))} if len(own) > 1 else {})


def _pooled(parts: list[pd.DataFrame], measure: str) -> Estimate:
    column = "correct" if measure == "accuracy" else measure
    return _mean([_ratio(part, column) for part in parts])


def _ratio(part: pd.DataFrame, column: str) -> tuple[float, ndarray, ndarray]:
    """Σ column / Σ n, the same without each group, and each group's number of texts."""
    total, n = (part[name].to_numpy(float) for name in (column, "n"))
    group = part["group"].to_numpy()
    with np.errstate(all="ignore"):
        return (
            float(total.sum() / n.sum()),
            sums_without(total, group) / sums_without(n, group),
            np.unique(group, return_counts=True)[1],
        )


def _mean(parts: list[tuple[float, ndarray, ndarray]]) -> Estimate:
    """The mean over data sets without common texts, with a jackknife over the groups of all."""
    value = float(np.mean([theta for theta, *_ in parts]))
    without = np.concatenate([value + (each - theta) / len(parts) for theta, each, _ in parts])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few groups: n_prompts stands beside each interval
        return from_deletions(value, without, np.concatenate([n for *_, n in parts]))


def summary_frame(found: list[dict[str, Any]]) -> pd.DataFrame:
    """A line for each group: estimates with ends, and the range over splits."""
    rows = []
    for group in found:
        row = {name: group[name] for name in _KEYS}
        row |= with_ends({name: group[name] for name in MEASURES})
        ends = group["by_seed"]["accuracy"]
        row |= {"accuracy_seed_min": min(ends), "accuracy_seed_max": max(ends), "n_texts": group["accuracy"].n_rows}
        row["n_groups"] = group["accuracy"].n_prompts
        rows.append(row | {name: group[name] for name in ("auc", "cross_entropy_train")})
    return pd.DataFrame(rows)


def short_frame(found: list[dict[str, Any]], provenance: dict[str, Any]) -> pd.DataFrame:
    """Accuracy by SAE, data set and probe, and probe loss."""
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for group in found:
        line = lines.setdefault((group["sae"], group["dataset"]), {"sae": group["sae"], "dataset": group["dataset"]})
        accuracy = group["accuracy"]
        if group["kind"] == "selected":
            line[f"k={group['k']}"] = accuracy
        elif group["kind"] == "best":
            line["probe loss"] = f"{group['cross_entropy']} (in sample {group['cross_entropy_train']:.3g})"
        elif group["k"] == min(provenance["ks"]) or group["kind"] in ("all", "raw"):
            line[group["kind"]] = accuracy.value
    return pd.DataFrame(list(lines.values()))


def first_numbers(found: list[dict[str, Any]], provenance: dict[str, Any]) -> Iterator[Headline]:
    """Accuracy of the fewest latents selected, beside that of random ones and of all of the activation."""
    datasets = list(provenance["texts"])
    data, k = MEAN if len(datasets) > 1 else datasets[0], min(provenance["ks"])
    said = {"random": "random latents", "raw": "all of the activation"}
    for sae in provenance["saes"]:
        own = [g for g in found if (g["sae"], g["dataset"]) == (sae, data)]
        shown = [g for kind in said for g in own if g["kind"] == kind and g["k"] in (0, k)]
        against = "; ".join(f"{said[g['kind']]}: {g['accuracy'].value:.3g}" for g in shown)
        of = "mean over data sets" if data == MEAN else data
        for g in own:
            if (g["kind"], g["k"]) == ("selected", k):
                yield Headline(f"accuracy of {k} latent{'s' * (k > 1)}, {sae}, {of}", str(g["accuracy"]), against)


def described(texts: dict[str, Any]) -> str:
    """The number of texts of a set, its groups by class if any, and missing classes, from provenance."""
    counts, groups = texts["counts"], texts["groups"]
    said = [", ".join(f"{name} {n}" for name, n in groups.items())] if groups != counts else []
    said += [f"without {why}" for why in texts["dropped"] if why.endswith(UNSPLIT)]
    return f"{sum(counts.values())} texts{' in groups' * (groups != counts)}" + (
        f" ({'; '.join(said)})" if said else ""
    )

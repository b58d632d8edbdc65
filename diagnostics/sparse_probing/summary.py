"""Pooled estimates of sparse probing: over classes and splits, by jackknife over groups; differences of SAEs; tables."""

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray
from scipy import stats

from diagnostics.results.headlines import Headline
from diagnostics.statistics.estimate import MIN_PROMPTS, Estimate
from diagnostics.statistics.jackknife import from_deletions, sums_without
from diagnostics.statistics.tables import few_prompts, lines_of, with_ends
from interventions.errors import ResultError
from interventions.texts.labelled import UNSPLIT

MEAN = "mean"
"""In place of a data set's name: the mean over data sets."""
NOTE = (
    "Held-out accuracy, pooled over classes (each against the rest, balanced: chance .5) and splits. Intervals: 95 % delete-one-group "
    "jackknife, none below 10 groups; a group is one text unless groups are given. They hold the probes fixed; `refits` select and fit anew "
    "on each split: mean, and t interval with SE² = (1/splits + held out/training) · variance over splits. Shuffled: labels exchanged "
    "between groups, then split, selection and fit anew; p: share of shuffles (and the observed one) that reach the accuracy. No interval "
    "includes draws of random latents or trained SAEs. Seeds: of the split."
)
MEASURES = ("accuracy", "cross_entropy")
_KEYS = ["sae", "dataset", "kind", "k"]


def groups(frame: pd.DataFrame, held_out: pd.DataFrame, draws: pd.DataFrame) -> list[dict[str, Any]]:
    """For each SAE × data set × kind × k, and the mean over data sets: estimates of `MEASURES`, values by split, training loss.

    Of `selected`: `refits` (see `with_refits`), and `shuffled`, the null: its mean, sd, 95 % range, number n, and the observed
    accuracy's p = (1 + #{null ≥ observed})/(n + 1).
    """
    columns = [*MEASURES, "auc", "cross_entropy_train"]
    by_seed = cast(pd.DataFrame, frame.groupby([*_KEYS, "seed"], sort=False)[columns].mean())
    seeds = {key: part.to_numpy(float) for key, part in by_seed.groupby(level=_KEYS, sort=False)}
    texts = {key: part for key, part in held_out.groupby(_KEYS, sort=False)}
    drawn = {key: Draws.of(part) for key, part in draws.groupby(["draw", "sae", "dataset", "k"], sort=False)}
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
                if kind == "selected":
                    null, splits = (
                        _mean_draws([drawn[d, sae, key[1], k] for key in keys]) for d in ("shuffled", "split")
                    )
                    group["refits"] = with_refits(splits, group["accuracy"])
                    group["shuffled"] = against_null(group["accuracy"].value, null.accuracy)
                found.append(group)
    return found


class Draws(NamedTuple):
    """Draws of one data set, or of several draw by draw."""

    accuracy: Float[ndarray, "draw"]
    test_ratio: float

    @classmethod
    def of(cls, part: pd.DataFrame) -> "Draws":
        return cls(part["accuracy"].to_numpy(float), float(part["test_ratio"].mean()))


def _mean_draws(parts: list[Draws]) -> Draws:
    accuracy, ratio = zip(*parts, strict=True)
    return Draws(np.mean(accuracy, axis=0), float(np.mean(ratio)))


def with_refits(draws: Draws, pooled: Estimate) -> Estimate:
    """Mean accuracy over splits, each with selection and fit anew, and the interval that includes them.

        SE² = (1/M + n_test/n_train) · S²,   t with M − 1 degrees of freedom;   S²: variance over the M splits

    pooled: whose numbers of texts and groups these are; none below 10 groups. Splits overlap, so S²/M alone is too small. Simulated
    coverage of the expected accuracy, 400 data sets (± .011), k = 1 and 5, 24 to 120 groups, one strong latent, many weak ones, none, group
    effects: 90–99 % at M = 20 (probes held fixed, 3 splits: 84–96 %). Deleting each group in turn and refitting gives errors 1.5 to 4 times
    too large, for a selection jumps. Source: Nadeau & Bengio 2003; the simulation is ours.
    """
    x, m = draws.accuracy, len(draws.accuracy)
    none = pooled.n_prompts < MIN_PROMPTS
    se = np.nan if none else float(np.sqrt((1 / m + draws.test_ratio) * x.var(ddof=1)))
    half, df = (np.nan, np.nan) if none else (float(stats.t.ppf(0.975, m - 1)) * se, m - 1.0)
    value = float(x.mean())
    return Estimate(value, value - half, value + half, se, pooled.n_rows, pooled.n_prompts, df=df)


def against_null(observed: float, null: Float[ndarray, "draw"]) -> dict[str, float]:
    """Mean, SD and 95 % range of a null, and p = (1 + #{null ≥ observed})/(n + 1)."""
    low, high = np.quantile(null, (0.025, 0.975))
    reached = int((null >= observed - 1e-9).sum())  # sums in another order
    line = {"mean": null.mean(), "sd": null.std(ddof=1) if len(null) > 1 else np.nan, "low": low, "high": high}
    return {name: float(v) for name, v in line.items()} | {"n": len(null), "p": (1 + reached) / (1 + len(null))}


def refitted_difference(
    draws: pd.DataFrame, found: list[dict[str, Any]], first: str, second: str, k: int
) -> dict[str, Estimate]:
    """Accuracy of one SAE − another's over splits, with refits, paired by split. Raises `ResultError` for missing probes."""
    some = lines_of(draws, draw="split", k=k)
    pooled = {(g["sae"], g["dataset"]): g["accuracy"] for g in found if (g["kind"], g["k"]) == ("selected", k)}
    if missing := [name for name in (first, second) if name not in {sae for sae, _ in pooled}]:
        raise ResultError(f"no probe of {missing[0]!r}, k {k} in this result; known: {sorted(pooled)}")
    parts = {}
    for dataset in dict.fromkeys(some["dataset"]):
        a, b = (Draws.of(lines_of(some, sae=name, dataset=dataset)) for name in (first, second))
        parts[dataset] = Draws(a.accuracy - b.accuracy, a.test_ratio)
    own = {dataset: with_refits(part, pooled[first, dataset]) for dataset, part in parts.items()}
    return own | ({MEAN: with_refits(_mean_draws(list(parts.values())), pooled[first, MEAN])} if len(own) > 1 else {})


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
    with few_prompts():  # few groups: n_prompts stands beside each interval
        return from_deletions(value, without, np.concatenate([n for *_, n in parts]))


def summary_frame(found: list[dict[str, Any]]) -> pd.DataFrame:
    """A line for each group: estimates with ends, and the range over splits."""
    rows = []
    for group in found:
        row = {name: group[name] for name in _KEYS}
        row |= with_ends({name: group[name] for name in MEASURES})
        ends = group["by_seed"]["accuracy"]
        if group["kind"] == "selected":
            row |= with_ends({"refits": group["refits"]})
            row |= {f"shuffled_{name}": value for name, value in group["shuffled"].items()}
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


def null_frame(found: list[dict[str, Any]]) -> pd.DataFrame:
    """Accuracy of selected latents with probes fixed and with refits, and the null of shuffled labels.

    Of several data sets the fewest latents of each, and every k of their mean.
    """
    selected = [group for group in found if group["kind"] == "selected"]
    several, least = any(group["dataset"] == MEAN for group in selected), min(group["k"] for group in selected)
    lines = []
    for group in selected:
        if not several or group["dataset"] == MEAN or group["k"] == least:
            null = group["shuffled"]
            line = {"sae": group["sae"], "dataset": group["dataset"], "k": group["k"], "accuracy": group["accuracy"]}
            line |= {
                "refits": group["refits"],
                "shuffled": f"{null['mean']:.3g} ({null['low']:.3g} to {null['high']:.3g})",
            }
            lines.append(line | {"shuffled sd": f"{null['sd']:.2g}", "p": f"{null['p']:.2g}"})
    return pd.DataFrame(lines)


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
                null = g["shuffled"]
                beside = (
                    f"with refits: {g['refits']}; shuffled labels: {null['mean']:.3g}, p = {null['p']:.2g}; {against}"
                )
                yield Headline(f"accuracy of {k} latent{'s' * (k > 1)}, {sae}, {of}", str(g["accuracy"]), beside)


def described(texts: dict[str, Any]) -> str:
    """The number of texts of a set, its groups by class if any, and missing classes, from provenance."""
    counts, groups = texts["counts"], texts["groups"]
    said = [", ".join(f"{name} {n}" for name, n in groups.items())] if groups != counts else []
    said += [f"without {why}" for why in texts["dropped"] if why.endswith(UNSPLIT)]
    return f"{sum(counts.values())} texts{' in groups' * (groups != counts)}" + (
        f" ({'; '.join(said)})" if said else ""
    )

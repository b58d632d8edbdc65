"""Statistics of disentanglement: cause, isolation and their mean with intervals clustered by entity, at each k and at k chosen elsewhere."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.results.headlines import Headline
from diagnostics.statistics.measures import fieller, mean
from diagnostics.statistics.tables import each, lines_of, one_table

EVERY, CHOSEN = "every", -1
"""In place of an attribute: all of them. In place of k: that which is best on the other half of the entities."""
SWEPT = ("latents", "random", "pca", "subspace")
"""kinds with a number of directions"""
NOTHING = 0.5
"""Score of exchanging nothing: cause 0, isolation 1."""


def groups_of(frame: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """For each site × kind × SAE × k, and k chosen on the other half (−1), of each target and of every target: the estimates."""
    for (layer, point, kind, sae), some in each(frame, ["layer", "point", "kind", "sae"]):
        sweep = {int(k): lines for (k,), lines in each(some, ["k"])}
        if kind in SWEPT and len(sweep) > 1:
            sweep[CHOSEN] = chosen_elsewhere(some)
        for k, lines in sweep.items():
            keys = {"layer": int(layer), "point": point, "kind": kind, "sae": sae, "k": k}
            for target in (EVERY, *dict.fromkeys(lines["target"])):
                own = lines if target == EVERY else lines_of(lines, target=target)
                yield (
                    keys
                    | {"target": target}
                    | _numbers(own)
                    | {"over_random": _over_random(own, frame) if kind == "latents" else None}
                )


def chosen_elsewhere(some: pd.DataFrame) -> pd.DataFrame:
    """The lines of each half at the k whose score is largest on the other half (of equal ones the smallest)."""
    parts = []
    for (fold,), own in each(some, ["fold"]):
        other = some.loc[some["fold"] != fold]
        score = (other["cause"] + other["isolation"]).groupby(other["k"]).mean()
        if len(score):
            parts.append(lines_of(own, k=int(score.index[int(np.argmax(score.to_numpy()))])))
    return one_table(parts)


def _numbers(lines: pd.DataFrame) -> dict[str, Any]:
    clusters = lines[["base", "source"]].to_numpy(int)
    cause, isolation = lines["cause"].to_numpy(float), lines["isolation"].to_numpy(float)
    found: dict[str, Any] = {
        name: mean(x, clusters, transform="logit")
        for name, x in (("cause", cause), ("isolation", isolation), ("score", (cause + isolation) / 2))
    }
    for name, top, whole in (("moved", "moved", "whole"), ("moved_others", "moved_others", "whole_others")):
        found[name] = fieller(lines[top].to_numpy(float), lines[whole].to_numpy(float), clusters)
    found |= {"dose": float(lines["dose"].mean()), "relative_dose": float(lines["relative_dose"].mean())}
    return found | {
        "pairs": len(lines),
        "entities": len(np.unique(clusters)),
        "n": float(lines["n"].mean()),
    }


def _over_random(own: pd.DataFrame, frame: pd.DataFrame) -> Any:
    """Mean score of chosen latents less that of random ones in the same pairs, at the same k and dose."""
    keys = ["layer", "point", "sae", "k", "fold", "target", "context", "base", "source"]
    both = own.merge(lines_of(frame, kind="random"), on=keys, suffixes=("", "_random"))
    gain = sum((both[name].astype(float) - both[f"{name}_random"].astype(float)) / 2 for name in ("cause", "isolation"))
    return mean(np.asarray(gain), both[["base", "source"]].to_numpy(int))


def table_of(groups: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """A line for each kind and k, of every target."""
    columns = (
        "layer",
        "kind",
        "sae",
        "k",
        "n",
        "score",
        "cause",
        "isolation",
        "moved",
        "moved_others",
        "relative_dose",
    )
    lines = [{name: g[name] for name in columns} for g in groups if g["target"] == EVERY]
    return pd.DataFrame(lines).assign(k=lambda t: t["k"].map({CHOSEN: "chosen", 0: ""}).fillna(t["k"].astype(str)))


def headlines(groups: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any]) -> Iterator[Headline]:
    """The score of each SAE at k chosen on the other half, beside what else is exchanged at its own chosen k."""
    most = CHOSEN if len(provenance["ks"]) > 1 else provenance["ks"][0]
    for g in groups:
        if g["kind"] == "latents" and g["target"] == EVERY and g["k"] == most:
            beside = [
                f"{o['kind']}: {o['score'].value:.3g}"
                for o in groups
                if o["target"] == EVERY and o["layer"] == g["layer"] and o["point"] == g["point"] and o["sae"] in ("", g["sae"])
                and o["k"] in (most, 0) and o is not g
            ]  # fmt: skip
            what = f"disentanglement score, {g['sae']}, {'k chosen on other entities' if most == CHOSEN else f'k = {most}'}"
            against = [f"nothing: {NOTHING:g}", *beside, f"less random latents at the same k: {g['over_random']}"]
            yield Headline(what, str(g["score"]), "; ".join(against))

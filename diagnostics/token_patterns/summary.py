"""Statistics of token patterns: means over latents with intervals, what one pattern explains, examples of patterns."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray

from diagnostics.results.headlines import Group, Headline
from diagnostics.statistics.over_latents import mean_over_latents, share_of_latents
from diagnostics.statistics.tables import each, lines_of
from diagnostics.token_patterns.work import COUNTS, KINDS, OF, PREDICTED_BY

DIFFERENCES = (
    ("trie", "tokens_best"),
    ("trie", "tokens_seen"),
    ("one", "one_token"),
    ("trie", "random"),
    ("tokens_best", "random"),
)
"""Of F1, latent by latent: a prediction less another one, or less the same of random directions."""
EXPLAINED = 0.5
"""A latent is explained whose held-out precision and recall both reach this."""
MEASURES = ("precision", "recall", "f1", "explained")
NOTE = (
    "Held-out text. Means over latents, weighted by how many each stands for; active: z ≠ 0 with the latent's polarity. Precision leaves out "
    "latents of which nothing is predicted (counted); explained: share of latents with precision and recall of at least .5. all patterns, best "
    "pattern: N2G; the others are sets of current tokens, of as many entries. random: a random direction that is active as often. "
    "Intervals: 95 %, over prompts and over the latents drawn."
)


def groups_of(frame: pd.DataFrame, held_out: pd.DataFrame, test: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A line for each SAE, latents or random directions, and kind, then `DIFFERENCES` of F1. test: the held-out prompts."""
    place = {prompt: i for i, prompt in enumerate(test)}
    for (sae, layer, point), some in each(frame, ["sae", "layer", "point"]):
        rows, f1 = lines_of(held_out, sae=sae), {}
        for of, kind in product(OF, KINDS):
            own = lines_of(some, of=of, kind=kind)
            total, without = _counted(own, lines_of(rows, of=of, kind=kind), place)
            whole, left = measures(*total), measures(*without)
            how = own["weight"].to_numpy(float), own["bin"].to_numpy(int)
            f1[of, kind] = whole["f1"], left["f1"]
            line: dict[str, Any] = {
                "sae": sae, "layer": int(layer), "point": point, "of": of, "kind": kind, "less": "", "latents": len(own),
                "entries": float(np.average(own["entries"], weights=how[0])), "predicts_nothing": int((total[1] == 0).sum()),
                **{name: int(own[name].sum()) for name in ("examples", "no_suffix", "no_token")},
            }  # fmt: skip
            for name in MEASURES[:-1]:
                line[name] = mean_over_latents(whole[name], left[name], *how, (0.0, 1.0))
            line["explained"] = share_of_latents(whole["explained"] > 0, how[0], len(test))
            n, tp = own["strong"].to_numpy(float), own["strong_tp"].to_numpy(float)
            known = n > 0
            line["strong_recall"] = (
                float(np.average(tp[known] / n[known], weights=how[0][known])) if known.any() else np.nan
            )
            yield line
        own = lines_of(some, of="latent", kind="trie")
        how = own["weight"].to_numpy(float), own["bin"].to_numpy(int)
        for kind, less in DIFFERENCES:
            other = ("random", kind) if less == "random" else ("latent", less)
            value, left = (a - b for a, b in zip(f1["latent", kind], f1[other], strict=True))
            line = {
                "sae": sae,
                "layer": int(layer),
                "point": point,
                "of": "difference",
                "kind": kind,
                "less": less,
                "latents": len(own),
            }
            yield line | {"f1": mean_over_latents(value, left, *how, (-1.0, 1.0))}


def _counted(
    own: pd.DataFrame, by_prompt: pd.DataFrame, place: Mapping[int, int]
) -> tuple[Float[ndarray, "count latent"], Float[ndarray, "count prompt latent"]]:
    """`COUNTS` of each latent over all held-out prompts, and without each of them."""
    at = {key: i for i, key in enumerate(zip(own["latent"], own["polarity"], strict=True))}
    counts = np.zeros((len(COUNTS), len(place), len(own)))
    column = [at[key] for key in zip(by_prompt["latent"], by_prompt["polarity"], strict=True)]
    counts[:, [place[p] for p in by_prompt["prompt"]], column] = by_prompt[list(COUNTS)].to_numpy(float).T
    total = counts.sum(1)
    return total, total[:, None] - counts


def measures(
    tp: Float[ndarray, "..."], predicted: Float[ndarray, "..."], active: Float[ndarray, "..."]
) -> dict[str, Float[ndarray, "..."]]:
    """`MEASURES` of counts; nan where undefined."""
    with np.errstate(all="ignore"):
        precision, recall, f1 = tp / predicted, tp / active, 2 * tp / (predicted + active)
    explained = (np.nan_to_num(precision) >= EXPLAINED) & (np.nan_to_num(recall) >= EXPLAINED)
    return {"precision": precision, "recall": recall, "f1": f1, "explained": explained.astype(float)}


def headlines(groups: Sequence[Group]) -> Iterator[Headline]:
    """F1 of all patterns, and the share of latents that one pattern explains."""
    by = {(g["sae"], g["of"], g["kind"]): g for g in groups}
    for sae in dict.fromkeys(g["sae"] for g in groups):
        for measure, kind, what, base in (
            ("f1", "trie", "held-out F1 of all patterns", "tokens_best"),
            ("explained", "one", "share of latents that one pattern explains", "one_token"),
        ):
            g, b, r = (by.get(key) for key in ((sae, "latent", kind), (sae, "latent", base), (sae, "random", kind)))
            if g and b and r:
                against = f"{PREDICTED_BY[base]}: {b[measure]}; random directions: {r[measure]}"
                yield Headline(f"{what}, {sae}, {g['latents']} latents", str(g[measure]), against)


def short_frame(groups: Sequence[Group]) -> pd.DataFrame:
    """Scores by SAE and kind."""
    return pd.DataFrame(
        {"sae": g["sae"], "of": g["of"], "predicted by": PREDICTED_BY[g["kind"]], "entries": g["entries"]}
        | {name: str(g[name]) for name in MEASURES}
        | {"recall of strong": g["strong_recall"]}
        for g in groups
        if g["of"] in OF
    )  # fmt: skip


def difference_frame(groups: Sequence[Group]) -> pd.DataFrame:
    """Differences of F1 by SAE."""
    return pd.DataFrame(
        {"sae": g["sae"], "predicted by": PREDICTED_BY[g["kind"]], "less": PREDICTED_BY.get(g["less"], "the same of random directions")}
        | {"latents": g["latents"], "difference": str(g["f1"])}
        for g in groups
        if g["of"] not in OF
    )  # fmt: skip


def best_patterns(patterns: pd.DataFrame, most: int) -> pd.DataFrame:
    """The patterns of largest held-out F1, one of a latent."""
    some = lines_of(patterns, of="latent")
    f1 = measures(*(some[name].to_numpy(float) for name in COUNTS))["f1"]
    some = (
        some.assign(f1=f1)
        .sort_values("f1", ascending=False, kind="stable")
        .drop_duplicates(["sae", "latent", "polarity"])
    )
    return some[["sae", "latent", "polarity", "text", *COUNTS, "f1"]].head(most).reset_index(drop=True)


def left_out(provenance: Mapping[str, Any], groups: Sequence[Group]) -> list[str]:
    """Latents and examples that are not measured; a line each."""
    said = []
    for sae, drawn in provenance["drawn"].items():
        skipped = [
            f"{n:,} {reason}" for reason, n in drawn.items() if reason.startswith("active at") or reason == "never fire"
        ]
        said.append(
            f"{sae}: {drawn['drawn']} of {drawn['eligible']:,} latents drawn, of {drawn['latents']:,}; {', '.join(skipped)}"
        )
    for g in groups:
        if g["of"] in OF and g["kind"] == "trie" and (g["no_suffix"] or g["no_token"]):
            said.append(
                f"{g['sae']}, {g['of']}: of {g['examples']} examples {g['no_suffix']} keep half in no suffix of {provenance['longest']} "
                f"tokens, {g['no_token']} keep it whichever token is replaced; they give no pattern"
            )
    p = provenance["probing"]
    return [*said, f"probing took {p['forward_passes']:,} forward passes, {p['tokens']:,} tokens"]

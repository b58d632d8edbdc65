"""Statistics of pairs of latents: interaction and its placebo's, with intervals, and a matrix of latents in clustered order."""

from typing import Any

import numpy as np
import pandas as pd
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from diagnostics.statistics.measures import median_ratio
from diagnostics.statistics.tables import few_prompts, mean_of, median_of, median_ratio_of

NOTE = (
    "interaction: median of rms(joint − sum of singles) over rms(i) + rms(j), logits vocabulary-centred and weighted by the clean "
    "distribution; placebos: the same edits turned about x as one (equal norms, cosines to x and to each other). Intervals: 95 %, "
    "over prompts"
)


@few_prompts()
def pair_summary(table: pd.DataFrame, sae: str, kind: str, real: str) -> dict[str, Any]:
    """Of one SAE's lines of one kind. `latents / kind`: the latents' interaction over this kind's, of the pairs that have both."""
    keys = ["target_prompt", "target_position", "latent_i", "latent_j"]
    parts = {name: table[table["kind"] == name].set_index(keys) for name in dict.fromkeys((real, kind))}
    own = parts[kind].reset_index()
    both = pd.DataFrame(index=parts[real].index.intersection(parts[kind].index))
    for name, part in (("real", parts[real]), ("own", parts[kind])):
        both[name] = part["rms_interaction"] / (part["rms_i"] + part["rms_j"])
    prompt = own["target_prompt"].to_numpy()
    bottom = own["rms_i"] + own["rms_j"]
    beyond = own["kl_joint"] - own["kl_sum"]
    return {
        "sae": sae,
        "kind": kind,
        "pairs": len(own),
        "interaction": median_ratio(own["rms_interaction"].to_numpy(), bottom.to_numpy(), 0.0, prompt),
        "interaction (p-centred)": median_ratio(
            own["spread_interaction"].to_numpy(), (own["spread_i"] + own["spread_j"]).to_numpy(), 0.0, prompt
        ),
        "latents / kind": median_ratio_of(both.dropna().reset_index(), "real", "own"),
        "joint KL": median_of(own, "kl_joint"),
        "KL beyond sum / joint KL": median_of(
            own.assign(share=beyond / own["kl_joint"]).dropna(subset=["share"]), "share"
        ),
        "singles' KL": median_of(own.assign(both=(own["kl_i"] + own["kl_j"]) / 2), "both"),
        "dose": mean_of(own, "delta_norm"),
        "noise": float(own["noise_rms"].mean() / (bottom.mean() or np.nan)),
    }


def pair_matrix(table: pd.DataFrame, real: str, null: str, at_least: int, most: int) -> pd.DataFrame:
    """Interaction minus the placebo's, `[latent, latent]`, of pairs that meet at `at_least` tokens; nan elsewhere and on the diagonal.

    Each a ratio of sums over the tokens at which both are active. At most `most` latents, those in the most pairs, in the order of an
    average-linkage clustering in which latents are far that interact little: distance = largest value − value, unknown pairs as 0
    interaction. Empty where no pair recurs.
    """
    keys = ["latent_i", "latent_j"]
    sums = {
        kind: part.assign(bottom=part["rms_i"] + part["rms_j"], tokens=1)
        .groupby(keys)[["rms_interaction", "bottom", "tokens"]]
        .sum()
        for kind, part in table[table["kind"].isin((real, null))].groupby("kind")
    }
    if len(sums) < 2:
        return pd.DataFrame()
    own = sums[real][sums[real]["tokens"] >= at_least]
    placebo = sums[null].reindex(own.index)
    excess = own["rms_interaction"] / own["bottom"] - placebo["rms_interaction"] / placebo["bottom"]
    excess = excess[np.isfinite(excess)]
    ends = np.concatenate([excess.index.get_level_values(name).to_numpy() for name in keys])
    latents, number = np.unique(ends, return_counts=True)
    kept = np.sort(latents[np.argsort(-number, kind="stable")[:most]])
    matrix = pd.DataFrame(np.nan, index=kept, columns=kept)
    for (i, j), value in excess.items():
        if i in matrix.index and j in matrix.index:
            matrix.loc[i, j] = matrix.loc[j, i] = value
    matrix = matrix.loc[matrix.notna().any(axis=1), matrix.notna().any(axis=0)]
    if len(matrix) < 3:
        return matrix
    close = matrix.fillna(0).to_numpy()
    distance = close.max() - close
    np.fill_diagonal(distance, 0)
    order = leaves_list(linkage(squareform(distance, checks=False), "average", optimal_ordering=True))
    return matrix.iloc[order, order]

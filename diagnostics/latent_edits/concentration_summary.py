"""Statistics of effects as latents are removed or kept one after another: counts, curves, additivity, with intervals."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pandas as pd

from diagnostics.statistics.jackknife import from_deletions
from diagnostics.statistics.measures import mean
from diagnostics.statistics.tables import (
    columns_of,
    each,
    few_prompts,
    from_sums,
    mean_of,
    median_of,
    median_ratio_of,
    totals,
    where,
)

NOTE = (
    "n50, n80, n90: mean over tokens of the first n whose KL reaches that share of the KL of removing all active latents (keep: of which "
    "that share is saved); in brackets 95 % intervals over prompts. KL of all: median. Σ: KL, cosine and rms ratio of the sum of the single "
    "changes of the logits against the joint one"
)
GRID = np.linspace(0, 1, 21)
"""Shares of the active latents at which curves are read."""


def shares(lines: pd.DataFrame, keep: bool) -> np.ndarray:
    """Share of the joint effect at each line: KL/KL_all, or for what is kept 1 − KL/KL_all."""
    with np.errstate(all="ignore"):
        share = lines["kl"].to_numpy(float) / lines["kl_all"].to_numpy(float)
    return 1 - share if keep else share


def counts(lines: pd.DataFrame, share: float, keep: bool) -> pd.DataFrame:
    """The first n of each token that reaches a share of the joint effect; nan where none does or there is no effect."""
    reached = lines.assign(n=np.where(shares(lines, keep) >= share * (1 - 1e-12), lines["n"], np.nan))
    keys = ["target_prompt", "target_position", "n_active"]
    return cast(pd.DataFrame, reached.groupby(keys, sort=True)[["n"]].min()).reset_index()


@few_prompts()
def summary_of(lines: pd.DataFrame, wanted: Sequence[float], keep: bool) -> dict[str, Any]:
    """Of one SAE, edit and order."""
    last = where(lines, lines["n"] == lines["n_active"])
    found: dict[str, Any] = {
        "tokens": len(last),
        "active": mean_of(last, "n_active"),
        "KL of all": median_of(last, "kl_all"),
    }
    for share in wanted:
        n = counts(lines, share, keep).dropna()
        found[f"n{100 * share:.0f}"] = mean(n["n"].to_numpy(float), n["target_prompt"].to_numpy()) if len(n) else None
        found[f"n{100 * share:.0f} / active"] = (
            from_sums(n, ["n", "n_active"], lambda a, b: a / b, "logit") if len(n) else None
        )
    known = last.dropna(subset=["kl_sum", "sum_cosine", "sum_ratio"])
    if len(known):
        found["KL of Σ / KL of all"] = median_ratio_of(known, "kl_sum", "kl_all")
        for name, said in (("sum_cosine", "cosine of Σ"), ("sum_ratio", "size of Σ")):
            found[said] = mean_of(known, name)
    return found


@few_prompts()
def curve(lines: pd.DataFrame, keep: bool) -> pd.DataFrame:
    """Σ KL_n / Σ KL_all over tokens (keep: 1 − that) at shares of each token's active latents, with its jackknife interval.

    Between whole numbers of latents a token's KL is interpolated; at none it is 0, or for what is kept KL_all.
    """
    tops, alls, prompts = [], [], []
    for (prompt, _), token in each(lines, ["target_prompt", "target_position"], sort=True):
        token = token.sort_values("n")
        start = float(token["kl_all"].iloc[0]) if keep else 0.0
        at = np.r_[0, token["n"]] / token["n_active"].iloc[0]
        tops.append(np.interp(GRID, at, np.r_[start, token["kl"]]))
        alls.append(float(token["kl_all"].iloc[0]))
        prompts.append(prompt)
    both = pd.DataFrame(np.column_stack([tops, alls]))
    table, sizes = (
        totals(both, np.array(prompts), list(both.columns)).to_numpy(),
        np.unique(prompts, return_counts=True)[1],
    )
    whole, left = table.sum(0), table.sum(0) - table
    with np.errstate(all="ignore"):  # a token of one prompt alone leaves nothing
        theta, by_prompt = whole[:-1] / whole[-1], left[:, :-1] / left[:, -1:]
    if keep:
        theta, by_prompt = 1 - theta, 1 - by_prompt
    found = [from_deletions(float(t), b, sizes) for t, b in zip(theta, by_prompt.T, strict=True)]
    return pd.DataFrame({"share_of_latents": GRID} | columns_of(found))

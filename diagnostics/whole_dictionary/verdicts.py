"""What each latent's rows say: medians with intervals over prompts, a test against its placebos, a verdict."""

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy import ndarray
from scipy import stats

from diagnostics import statistics
from diagnostics.statistics.estimate import MIN_PROMPTS, Estimate, effective_number
from diagnostics.statistics.tables import few_prompts
from diagnostics.whole_dictionary.scan import Scan

VERDICTS = {
    "more than dose": "its KL is above its placebos': q at most .05",
    "no more than dose": "not shown to do more than its placebos",
    "small": "the interval of its median KL lies below .001 nats",
    "silent": "the interval of its median KL lies within ten noise floors",
    "too few prompts": "fewer than 10 effective prompts, of all rows or of those with a placebo: not tested",
    "never active": "at no usable token of the text",
}
"""Each latent has the first that holds, from the last on: `small` and `silent` are said of effects whatever their placebos do."""
SMALL = 1e-3
"""nats"""
FALSE_DISCOVERY = 0.05


def p_above(
    sign: Float[ndarray, "row"], group: Int[ndarray, "row"], prompt: Int[ndarray, "row"], n_groups: int
) -> Float[ndarray, "group"]:
    """One-sided p of each group for more signs + than −, its rows clustered by prompt.

        T = (Σ S_g − 1)/√(Σ S_g²),   S_g the sum of signs (+1, 0, −1) of prompt g,   p = 1 − Φ(T)

    Without an effect each S_g is as likely as −S_g (the 1 is the correction for steps of 2); however many of a prompt's rows agree by
    its own doing, they count as one draw. 1 where there is no sign. Source: sign-flip test by cluster; the normal tail is checked in
    simulations (`tests/diagnostics/whole_dictionary/test_verdicts.py`).
    """
    pair, inverse = np.unique(group.astype(np.int64) * (int(prompt.max(initial=0)) + 1) + prompt, return_inverse=True)
    by_prompt = np.bincount(inverse, sign, len(pair))
    of = pair // (int(prompt.max(initial=0)) + 1)
    total, square = np.bincount(of, by_prompt, n_groups), np.bincount(of, by_prompt**2, n_groups)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(square > 0, stats.norm.sf((total - 1) / np.sqrt(square)), 1.0)


@few_prompts()
def latent_statistics(rows: pd.DataFrame, scan: Scan, floor: float, quota: int) -> pd.DataFrame:
    """A line for each latent of one SAE, but for names and tokens: `columns.LATENTS`, `firings` to `verdict`.

    rows: of this SAE. floor: KL of identity edits, nats. quota: rows asked for. Medians with Woodruff intervals over prompts
    (`statistics.median`, `statistics.median_ratio`); q: Benjamini–Hochberg over the latents tested.
    """
    n = len(scan.firings)
    rows = rows.sort_values("latent", kind="stable")
    latent, prompt = rows.latent.to_numpy(np.int64), rows.prompt.to_numpy(np.int64)
    kl, placebo = rows.kl.to_numpy(float), rows.kl_placebo.to_numpy(float)
    count = np.bincount(latent, minlength=n)
    starts = np.cumsum(count) - count
    found: dict[str, ndarray] = {
        "latent": np.arange(n), "firings": scan.firings, "frequency": scan.firings / max(1, int(scan.usable.sum())),
        "rows": count, "prompts": np.zeros(n, dtype=int), "short": count < quota, "max_z": scan.max_z, "median_z": scan.median_z,
    }  # fmt: skip
    medians = rows.assign(dose=rows.delta_norm / rows.norm).groupby("latent")
    for name, column in {"dose": "dose", "kl_direct": "kl_direct", "kl_placebo": "kl_placebo"}.items():
        found[name] = medians[column].median().reindex(range(n)).to_numpy(float)
    found["top1_changed"] = medians.top1_changed.mean().reindex(range(n)).to_numpy(float)
    names = ("kl", "kl_low", "kl_high", "over_placebo", "over_placebo_low", "over_placebo_high", "effective")
    found |= {name: np.full(n, np.nan) for name in names}
    known = np.isfinite(placebo)
    for i in np.flatnonzero(count):
        own = slice(starts[i], starts[i] + count[i])
        both = known[own]
        typical = statistics.median(kl[own], prompt[own])
        ratio = statistics.median_ratio(kl[own][both], placebo[own][both], floor, prompt[own][both])
        beside = effective_number(np.unique(prompt[own][both], return_counts=True)[1])
        found["prompts"][i], found["effective"][i] = typical.n_prompts, min(typical.n_effective, beside)
        for name, e in (("kl", typical), ("over_placebo", ratio)):
            found[name][i], found[f"{name}_low"][i], found[f"{name}_high"][i] = e.value, e.low, e.high
    tested = found.pop("effective") >= MIN_PROMPTS
    above = p_above(np.sign(kl - placebo)[known], latent[known], prompt[known], n)
    found["p"], found["q"] = np.where(tested, above, np.nan), np.full(n, np.nan)
    if tested.any():
        found["q"][tested] = stats.false_discovery_control(above[tested])
    table = pd.DataFrame(found)
    more = np.where(table.q <= FALSE_DISCOVERY, "more than dose", "no more than dose")
    said = np.where(table.kl_high < SMALL, "small", more)
    said = np.where(table.kl_high <= statistics.CLEAR * floor, "silent", said)
    said = np.where(tested, said, "too few prompts")
    table["verdict"] = np.where(scan.firings == 0, "never active", said)
    return table


def over_all(rows: pd.DataFrame, floor: float) -> dict[str, Estimate]:
    """Over all rows of one SAE: median KL, its ratio to the placebo's, direct KL, share of changed tokens, with intervals over prompts."""
    prompt = rows.prompt.to_numpy(np.int64)
    kl, placebo = rows.kl.to_numpy(float), rows.kl_placebo.to_numpy(float)
    both = np.isfinite(placebo)
    return {
        "kl": statistics.median(kl, prompt),
        "kl_direct": statistics.median(rows.kl_direct.to_numpy(float), prompt),
        "kl_over_placebo": statistics.median_ratio(kl[both], placebo[both], floor, prompt[both]),
        "top1_changed": statistics.share(rows.top1_changed.to_numpy(), prompt),
    }

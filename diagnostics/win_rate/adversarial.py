"""Tokens with a high cosine and a low norm against tokens with a low cosine and a high norm: with doses and placebos beside."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray

from diagnostics import statistics
from diagnostics.statistics.estimate import Estimate
from diagnostics.statistics.share_errors import clopper_pearson, share_of, sign_covariance
from diagnostics.win_rate.rows import read
from interventions.files import Json


@dataclass(frozen=True)
class AdversarialGroups(Json):
    """What `adversarial_groups` found. First: high |cos|, low norm. Second: low |cos|, high norm."""

    edit: str
    """the main edit"""
    share: Estimate
    """of latents whose mean KL is larger in the first group, each counted `latent_weight` times"""
    n_larger: int
    """those latents, each counted once"""
    n_latents: int
    """latents that entered"""
    n_left_out: int
    """latents with fewer than `min_tokens` rows or none in one of the groups"""
    n_rows: tuple[int, int]
    """rows of the main edit in the first and in the second group"""
    n_not_finite: int
    """rows dropped because KL, the cosine, a norm or the dose is no finite number"""
    clopper_pearson_iid: tuple[float, float]
    """95 % interval of n_larger/n_latents for independent latents; they share prompts and are not, hence the name"""
    kl_ratio: Estimate
    """mean KL of the first group over that of the second"""
    dose_ratio: Estimate
    """the same ratio of mean doses `delta_norm`: the groups are not edited equally"""
    placebo_kl_ratios: dict[str, Estimate]
    """the ratio of the mean KLs of each placebo on the same tokens, which has the main edit's doses"""
    over_placebos: dict[str, Estimate]
    """kl_ratio over that: what the direction adds to dose and place"""
    over_placebos_p: dict[str, float]
    """two-sided p-values of 1 for these"""


def adversarial_groups(rows: pd.DataFrame, *, edit: str = "zero", min_tokens: int = 10) -> AdversarialGroups:
    """KL of tokens with high |cos| and low norm against tokens with low |cos| and high norm, by each latent's medians.

    High: above the median over the main edit's rows of the latent; low: at or below. share: Σ w_i·1[mean KL larger in the
    first group]/Σ w_i, w = latent_weight, errors as for `win_rates` from the margin (a − b)/(a + b) of the two means.
    kl_ratio: Σ_i w_i/n_i Σ KL over the first group's rows, divided by Σ_i w_i/n_i times their number; over the same of the
    second (n_i: rows of latent i in both): each latent counts w_i. Interval by the jackknife on its logarithm.
    The first group has the larger dose wherever |cos| varies more than ‖x‖, so the published 81 of 90 and 10.4× say
    nothing by themselves: compare them with `dose_ratio` and with the ratios of the placebos, which have these doses.

    Latents and their medians are held fixed. Simulated, 30 latents × 60 tokens, 20 and 40 prompts, KLs as there that follow
    the dose: intervals of kl_ratio cover 95–96, of share 94–95 (90–91 where all latents share the effects of prompts);
    `over_placebos_p` is below .05 in .03–.06. Raises `ResultError` as `win_rates` does.
    Source: arXiv:2606.15054; doses and placebos are ours.
    """
    some = read(rows, edit, ["kl", "cosine", "norm", "delta_norm"])
    table, main, n_latents = some.table, some.edit == 0, len(some.latents)
    cos, norm = np.abs(table["cosine"].to_numpy(dtype=float)), table["norm"].to_numpy(dtype=float)
    count = np.bincount(some.latent[main], minlength=n_latents)
    high = []
    for x in (cos, norm):
        middle = pd.Series(x[main]).groupby(some.latent[main]).median().reindex(range(n_latents)).to_numpy()
        high.append(x > middle[some.latent])
    group = np.where(high[0] & ~high[1], 0, np.where(high[1] & ~high[0], 1, -1))
    sizes = np.stack([np.bincount(some.latent[main & (group == g)], minlength=n_latents) for g in (0, 1)])
    entered = (count >= min_tokens) & (sizes > 0).all(axis=0)
    prompts, prompt = np.unique(some.prompt, return_inverse=True)
    keep = entered[some.latent] & (group >= 0)

    def sums(x: ndarray, e: int) -> Float[ndarray, "deletion group latent"]:
        """Of each group and latent, on all rows of an edit and without each prompt."""
        at = keep & (some.edit == e)
        shape = (len(prompts), 2, n_latents)
        code = np.ravel_multi_index((prompt[at], group[at], some.latent[at]), shape)
        parts = np.bincount(code, x[at], int(np.prod(shape))).reshape(shape)
        whole = parts.sum(axis=0)
        return np.concatenate([whole[None], whole - parts])[..., entered]

    kl, dose, one = table["kl"].to_numpy(dtype=float), table["delta_norm"].to_numpy(dtype=float), np.ones(len(table))
    n, total, weight = sums(one, 0), sums(kl, 0), some.weight[entered]
    with np.errstate(all="ignore"):
        means = np.where(n > 0.5, total / n, np.nan)
        margin = (means[:, 0] - means[:, 1]) / (means[:, 0] + means[:, 1])
        margin = np.where(means[:, 0] == means[:, 1], 0.0, margin)
    present = np.rint(n[0].sum(axis=0) - n[1:].sum(axis=1)).astype(int)
    covariance = sign_covariance(margin, present, np.zeros(len(weight), dtype=int))
    wins = margin[0] > 0
    per_row = weight / np.maximum(n[0].sum(axis=0), 1)

    def log_ratio(x: ndarray, e: int) -> Float[ndarray, "deletion"]:
        with np.errstate(all="ignore"):
            mean = (sums(x, e) @ per_row) / (sums(one, e) @ per_row)
            return np.log(mean[:, 0]) - np.log(mean[:, 1])

    rows_of = present.sum(axis=1)

    def ratio(logs: ndarray) -> Estimate:
        values = np.exp(logs)
        return statistics.from_deletions(
            float(values[0]), values[1:][rows_of > 0], rows_of[rows_of > 0], transform="log"
        )

    own = log_ratio(kl, 0)
    placebos = {name: log_ratio(kl, e) for e, name in enumerate(some.edits) if e}
    over = {name: ratio(own - logs) for name, logs in placebos.items()}
    return AdversarialGroups(
        edit, share_of(wins, weight, covariance, present), int(wins.sum()), len(weight), n_latents - len(weight),
        (int(n[0, 0].sum()), int(n[0, 1].sum())), some.n_not_finite, clopper_pearson(int(wins.sum()), len(weight)),
        ratio(own), ratio(log_ratio(dose, 0)), {name: ratio(logs) for name, logs in placebos.items()}, over,
        {name: statistics.p_value(estimate, 1.0, "log") for name, estimate in over.items()},
    )  # fmt: skip

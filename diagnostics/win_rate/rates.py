"""Replication of two tables of arXiv:2606.15054 with their nulls and errors: does KL go with the cosine or the product?

A win rate is not an estimand: it grows with the number of tokens of each latent, and falls within bands of the norm whatever is
true. Compare it with the placebos' rate; `diagnostics.projections.norm_exponent` answers the question itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy import stats

from diagnostics import statistics
from diagnostics.statistics.estimate import Estimate
from diagnostics.statistics.prevalence import Prevalence, error_in_common, false_discovery, share_below
from diagnostics.statistics.share_errors import clopper_pearson, linear, share_of, sign_covariance
from diagnostics.statistics.within_groups import GroupSums
from diagnostics.win_rate.rows import EditRows, read
from interventions.errors import ResultError
from interventions.files import Json


@dataclass(frozen=True)
class WinRate(Json):
    """The share of latents whose margin |r_cos| − |r_inner| is above 0 (signed: r_cos − r_inner)."""

    estimate: Estimate
    """each latent counted `latent_weight` times; the interval is for the share's expectation: see `win_rates`"""
    n_latents: int
    """latents that entered"""
    n_wins: int
    """those that win, each counted once"""
    n_few: int
    """latents left out: fewer than `min_tokens` rows here"""
    n_constant: int
    """latents left out: KL or a predictor is constant here, or one predictor is a linear function of the other"""
    clopper_pearson_iid: tuple[float, float]
    """95 % interval of n_wins/n_latents for independent latents; they share prompts and are not, hence the name"""


@dataclass(frozen=True)
class EditRates(Json):
    """The win rates of one edit."""

    edit: str
    """its name"""
    overall: WinRate
    """on all of its rows"""
    quartiles: tuple[WinRate, ...]
    """on its rows of each quartile of ‖x‖, ascending"""


@dataclass(frozen=True)
class Difference(Json):
    """The win rate of the main edit less a placebo's, both over the latents that entered both."""

    estimate: Estimate
    """the difference of the shares, between −1 and 1"""
    p: float
    """two-sided p-value of no difference; nan without an interval"""
    n_latents: int
    """latents that entered both"""


@dataclass(frozen=True)
class Differences(Json):
    """The differences to one placebo."""

    placebo: str
    """its name"""
    overall: Difference
    """on all rows"""
    quartiles: tuple[Difference, ...]
    """on the rows of each quartile of ‖x‖, ascending"""


@dataclass(frozen=True, eq=False)
class WinRates(Json):
    """What `win_rates` found, and the options that it found it with."""

    edit: str
    """the main edit"""
    predictors: tuple[str, str]
    """the columns that stand for the cosine and for the inner product"""
    absolute: bool
    """True: predictors and activations entered as absolute values"""
    signed: bool
    """True: a win is r_cos > r_inner; False: |r_cos| > |r_inner|"""
    token_weighted: bool
    """True: each row counted `token_weight` times"""
    min_tokens: int
    """rows that a latent needed, over all and within a quartile"""
    n_not_finite: int
    """rows dropped because KL, a predictor or the norm is no finite number"""
    main: EditRates
    """of the main edit"""
    placebos: dict[str, EditRates]
    """the null, by its name: what the protocol gives where the direction has no meaning"""
    differences: dict[str, Differences]
    """main − placebo, by the placebo's name"""
    mean_correlations: dict[str, dict[str, Estimate]]
    """"pearson", "spearman": of KL with "cos", "inner", "activation", "norm"; mean over latents by `latent_weight`,
    without latents of which one prompt decides whether they have the correlation"""
    latents: pd.DataFrame
    """a line for each latent that entered: see `win_rates`"""
    prevalence: Prevalence
    """the share of latents whose true margin is above 0, by a random-effects fit: `share_below` of −margin and 0, with
    their shared error; alone here it speaks of latents that were not drawn"""
    n_without_error: int
    """latents that entered but not the prevalence, for their margin has no standard error (fewer than 10 prompts)"""


class _Cells(NamedTuple):
    """Correlations within cells, each the rows of one stratum, edit and latent."""

    within: GroupSums
    stratum: Int[ndarray, "cell"]
    edit: Int[ndarray, "cell"]
    latent: Int[ndarray, "cell"]
    margin: Float[ndarray, "deletion cell"]
    few: Bool[ndarray, "cell"]
    constant: Bool[ndarray, "cell"]


def _standard(x: ndarray, group: ndarray, weight: ndarray) -> ndarray:
    """x in units of its group's spread, 0 where that is rounding: latents of tiny KLs keep their precision."""
    total = np.bincount(group, weight)
    size = np.sqrt(np.bincount(group, weight * x * x) / total)
    x = x - (np.bincount(group, weight * x) / total)[group]
    spread = np.sqrt(np.bincount(group, weight * x * x) / total)
    return np.divide(x, spread[group], out=np.zeros_like(x), where=(spread > 1e-12 * size)[group])


def _cells(
    columns: Mapping[str, ndarray], stratum: ndarray, some: EditRows, weight: ndarray, signed: bool, min_tokens: int
) -> _Cells:
    shape = (int(stratum.max()) + 1, len(some.edits), len(some.latents))
    kinds, group = np.unique(np.ravel_multi_index((stratum, some.edit, some.latent), shape), return_inverse=True)
    standard = {name: _standard(x, group, weight) for name, x in columns.items()}
    within = GroupSums.of(standard, group, some.prompt, weight)
    cos, inner = within.correlation("kl", "cos"), within.correlation("kl", "inner")
    margin = cos - inner if signed else np.abs(cos) - np.abs(inner)
    few = within.present.sum(axis=0) < min_tokens
    with np.errstate(invalid="ignore"):
        apart = np.abs(within.correlation("cos", "inner")[0]) < 1 - 1e-12
    constant = ~few & ~(np.isfinite(margin[0]) & apart)
    place, edit, latent = np.unravel_index(kinds, shape)
    return _Cells(within, place, edit, latent, margin, few, constant)


def _rates(cells: _Cells, stratum: int, some: EditRows) -> tuple[list[WinRate], list[Difference]]:
    """Of one stratum: the win rate of each edit, and the differences of the main edit's to the others'."""
    chosen = (cells.stratum == stratum) & ~cells.few & ~cells.constant
    margin, present = cells.margin[:, chosen], cells.within.present[:, chosen]
    edit, latent, wins = cells.edit[chosen], cells.latent[chosen], margin[0] > 0
    covariance = sign_covariance(margin, present, edit)
    rates, differences = [], []
    for e in range(len(some.edits)):
        own, here = edit == e, (cells.stratum == stratum) & (cells.edit == e)
        n, k = int(own.sum()), int(wins[own].sum())
        found = share_of(wins, np.where(own, some.weight[latent], 0.0), covariance, present)
        n_few, n_constant = len(some.latents) - int((here & ~cells.few).sum()), int((here & cells.constant).sum())
        rates.append(WinRate(found, n, k, n_few, n_constant, clopper_pearson(k, n)))
        if e:
            both = np.intersect1d(latent[edit == 0], latent[own])
            weight = np.where(np.isin(latent, both), some.weight[latent], 0.0) / max(some.weight[both].sum(), 1e-300)
            contrast = np.where(edit == 0, weight, np.where(own, -weight, 0.0))
            value = float(contrast[wins].sum()) if len(both) else np.nan
            difference = linear(value, contrast, covariance, present)
            differences.append(Difference(difference, statistics.p_value(difference, 0.0), len(both)))
    return rates, differences


def _rank_correlations(
    columns: Mapping[str, ndarray], prompt: ndarray, prompts: ndarray, weight: ndarray
) -> dict[str, Float[ndarray, "deletion"]]:
    """Spearman's correlation of the column "kl" with each other, on all rows and without each of `prompts`, ranked anew."""
    own, g = np.unique(prompt, return_inverse=True)
    mass = np.where(np.arange(-1, len(own))[:, None] == g, 0.0, weight)  # deletion × row
    half, ranks = mass.sum(axis=1, keepdims=True) / 2, {}
    for name, x in columns.items():
        order = np.argsort(x)
        below = np.pad(np.cumsum(mass[:, order], axis=1), ((0, 0), (1, 0)))
        first, last = (np.searchsorted(x[order], x, side=side) for side in ("left", "right"))
        rank = (below[:, first] + below[:, last]) / 2 - half
        spread = np.sqrt((mass * rank * rank).sum(axis=1, keepdims=True))
        with np.errstate(all="ignore"):
            ranks[name] = np.where(spread > 1e-9 * half**1.5, rank / spread, np.nan)
    found, at = {}, np.searchsorted(prompts, own)
    for name in (name for name in columns if name != "kl"):
        here = (mass * ranks["kl"] * ranks[name]).sum(axis=1)
        found[name] = np.full(len(prompts) + 1, here[0])
        found[name][1 + at] = here[1:]
    return found


def _mean(
    r: Float[ndarray, "deletion latent"], weight: Float[ndarray, "latent"], present: Int[ndarray, "prompt latent"]
) -> Estimate:
    """The weighted mean over the latents that have the correlation, without any one prompt too."""
    known = np.isfinite(r).all(axis=0)
    used = present[:, known]
    values = r[:, known] @ weight[known] / weight[known].sum() if known.any() else np.full(len(r), np.nan)
    sizes = used.sum(axis=1)
    return statistics.from_deletions(float(values[0]), values[1:][sizes > 0], sizes[sizes > 0])


def win_rates(
    rows: pd.DataFrame, *, edit: str = "zero", signed: bool = False, absolute: bool = True, min_tokens: int = 10,
    predictors: Sequence[str] = ("cosine", "inner"), token_weighted: bool = False,
) -> WinRates:  # fmt: skip
    """How often KL correlates more with the cosine than with the inner product, over all rows and by quartile of ‖x‖.

    margin_i = |r(KL, cos)| − |r(KL, inner)| over the rows of latent i (`signed`: r − r); a win is margin_i > 0; the rate is
    Σ w_i·1[margin_i > 0]/Σ w_i with w = latent_weight. The same for the placebos, which have the main edit's doses and no
    meaning, and main − placebo. For the published form give the rows of active tokens and `absolute=False`; over tokens
    with cosines of both signs take |cos|, |inner| and |activation| (`absolute`, the default). `token_weighted` counts
    each row token_weight times, as in the population that it was drawn from. r is Pearson's; `mean_correlations` and
    `latents` have Spearman's too, ranked anew after each deletion.

    Errors: latents held fixed, prompts drawn anew. The rate is a step function of the rows, and its own jackknife has 1.1
    to 2.8 times the true standard error. So the jackknife of the margins (SE_i, correlations ρ_ij) goes through the step:
    SE² = Σ_ij w_i w_j [Φ₂(z_i, z_j; ρ_ij) − Φ(z_i)Φ(z_j)]/(Σ w)², the covariance of the signs of normal margins; t with one
    degree of freedom less than there are prompts. z is margin/SE, all pulled to their mean until their variance is less
    by 1, the errors' part of it: as they are, z of latents that all are ties would give .8 of the standard error. A
    latent without SE_i counts as a fair coin of its own. The interval is for the expected rate at this number of tokens
    and prompts, which is not the share of latents whose true margin is above 0: `prevalence`. Ends may leave [0, 1].
    Simulated, 50 and 200 latents × 60 tokens, 20 and 40 prompts, log-normal KLs (SD 1 of the logarithm, .3 of its variance
    between prompts), rates of .5 to .8, 200 to 400 replications: 95 % intervals cover 94–99, within a quartile 93–98; 90–95
    where KL depends on the cosine, all latents share the effects of prompts, and half of the variance of log‖x‖ is
    between prompts: there the margins' jackknife is 5–10 % short. The jackknife of the rate covers 93–100, mostly 100.
    Main − placebo, both without meaning, rejects .04–.05 at p < .05 (20 to 50 latents × 30 and 60 tokens).

    latents, a line for each that entered: latent, n, n_prompts, latent_weight, r_cos, r_inner, r_activation, r_norm,
    spearman_ of the same, win, margin, margin_se (jackknife), p (of margin = 0, t), q (false discovery within this table).

    rows: one group (site, context, SAE), a line for each latent, token and edit. Raises `ResultError` for columns that
    are not there, two rows of one edit and token, and an edit without rows.
    Source: arXiv:2606.15054 for the win rate; placebos and errors are ours.
    """
    if len(predictors) != 2:
        raise ResultError(f"predictors {list(predictors)}; expected two columns, the cosine's and the inner product's")
    some = read(rows, edit, ["kl", *predictors, "norm", "norm_quartile", *(["token_weight"] if token_weighted else [])])
    table, size = some.table, np.abs if absolute else np.asarray
    weight = table["token_weight"].to_numpy(dtype=float) if token_weighted else np.ones(len(table))
    columns = {"kl": table["kl"].to_numpy(dtype=float)}
    for name, column in zip(("cos", "inner"), predictors, strict=True):
        columns[name] = size(table[column].to_numpy(dtype=float))
    narrow, others = dict(columns), {"norm": table["norm"].to_numpy(dtype=float)}
    if "activation" in table and np.isfinite(table["activation"].to_numpy(dtype=float)).all():
        others["activation"] = size(table["activation"].to_numpy(dtype=float))
    cells = _cells(columns | others, np.zeros(len(table), dtype=int), some, weight, signed, min_tokens)
    quartile = table["norm_quartile"].to_numpy().astype(int)
    if not np.isin(quartile, range(4)).all():
        raise ResultError(f"norm_quartile has values {sorted(set(quartile))}; expected 0, 1, 2, 3")
    by_quartile = _cells(narrow, quartile, some, weight, signed, min_tokens)
    strata = [_rates(cells, 0, some), *(_rates(by_quartile, q, some) for q in range(4))]
    rates = {
        name: EditRates(name, strata[0][0][e], tuple(rate[e] for rate, _ in strata[1:]))
        for e, name in enumerate(some.edits)
    }
    differences = {
        name: Differences(name, strata[0][1][e], tuple(difference[e] for _, difference in strata[1:]))
        for e, name in enumerate(some.edits[1:])
    }
    means, latents, prevalence = _latents(cells, columns | others, some, weight)
    return WinRates(
        edit, (predictors[0], predictors[1]), absolute, signed, token_weighted, min_tokens, some.n_not_finite,
        rates.pop(edit), rates, differences, means, latents, prevalence, len(latents) - prevalence.n,
    )  # fmt: skip


def _latents(
    cells: _Cells, columns: Mapping[str, ndarray], some: EditRows, weight: ndarray
) -> tuple[dict[str, dict[str, Estimate]], pd.DataFrame, Prevalence]:
    """The mean correlations, the table of the main edit's latents, and the share of margins above 0 among them."""
    within, chosen = cells.within, np.flatnonzero((cells.edit == 0) & ~cells.few & ~cells.constant)
    latent, names = cells.latent[chosen], ("cos", "inner", "activation", "norm")
    nothing = np.full((within.n_prompts + 1, len(chosen)), np.nan)
    pearson = {n: within.correlation("kl", n)[:, chosen] if n in columns else nothing for n in names}
    spearman = {n: nothing.copy() for n in names}
    prompts, main = np.unique(some.prompt), np.flatnonzero(some.edit == 0)
    ordered = main[np.argsort(some.latent[main], kind="stable")]
    starts = np.searchsorted(some.latent[ordered], np.arange(len(some.latents) + 1))
    for i, unit in enumerate(latent):
        at = ordered[starts[unit] : starts[unit + 1]]
        own = {name: x[at] for name, x in columns.items()}
        for name, r in _rank_correlations(own, some.prompt[at], prompts, weight[at]).items():
            spearman[name][:, i] = r
    each = within.each(cells.margin)
    margin, se, df = (x[chosen] for x in each)
    with np.errstate(all="ignore"):
        p = 2 * stats.t.sf(np.abs(margin) / np.where(se > 0, se, np.nan), df)
    found: dict[str, Any] = {"latent": some.latents[latent], "n": within.present.sum(axis=0)[chosen]}
    found |= {"n_prompts": (within.present > 0).sum(axis=0)[chosen], "latent_weight": some.weight[latent]}
    found |= {f"r_{name}": pearson[name][0] for name in names}
    found |= {f"spearman_{name}": spearman[name][0] for name in names}
    found |= {"win": margin > 0, "margin": margin, "margin_se": se, "p": p, "q": false_discovery(p)}
    w = some.weight[latent]
    means = {
        kind: {name: _mean(r[name], w, within.present[:, chosen]) for name in names}
        for kind, r in (("pearson", pearson), ("spearman", spearman))
    }
    known = se > 0
    deletions, se, w = -cells.margin[:, chosen[known]], se[known], w[known]
    common = error_in_common(deletions, se, weights=w)
    return means, pd.DataFrame(found), share_below(deletions[0], se, 0.0, weights=w, shared_error=common)

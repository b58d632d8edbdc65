"""Replication of two tables of arXiv:2606.15054 with their nulls and errors: does KL go with the cosine or the product?

A win rate is no estimand: it grows with the tokens of each latent, and falls within bands of the norm whatever is true.
Read it beside the same rate of the placebos; the question itself is `diagnostics.norm_exponent`'s.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy import stats

from diagnostics import statistics
from diagnostics.iid_tests import meng_rosenthal_rubin, steiger
from diagnostics.prevalence import Prevalence, error_in_common, false_discovery, share_below
from diagnostics.statistics import MIN_PROMPTS, Estimate
from diagnostics.within import Within
from interventions.errors import ResultError

PLACEBOS = ("placebo_token", "placebo_isotropic")
_KEY = ["latent", "edit", "target_prompt", "target_position"]
_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(20)


class _Result:
    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them: nan and ±inf become None, a table a list of its rows."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}  # pyright: ignore[reportArgumentType]


def _plain(x: Any) -> Any:
    if is_dataclass(x):
        return x.as_dict()  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(x, pd.DataFrame):
        return [_plain(row) for row in x.to_dict("records")]
    if isinstance(x, Mapping):
        return {k: _plain(v) for k, v in x.items()}
    if isinstance(x, tuple | list):
        return [_plain(v) for v in x]
    return None if isinstance(x, float) and not np.isfinite(x) else x


@dataclass(frozen=True)
class WinRate(_Result):
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
class EditRates(_Result):
    """The win rates of one edit."""

    edit: str
    """its name"""
    overall: WinRate
    """on all of its rows"""
    quartiles: tuple[WinRate, ...]
    """on its rows of each quartile of ‖x‖, ascending"""


@dataclass(frozen=True)
class Difference(_Result):
    """The win rate of the main edit less a placebo's, both over the latents that entered both."""

    estimate: Estimate
    """the difference of the shares, between −1 and 1"""
    p: float
    """two-sided p-value of no difference; nan without an interval"""
    n_latents: int
    """latents that entered both"""


@dataclass(frozen=True)
class Differences(_Result):
    """The differences to one placebo."""

    placebo: str
    """its name"""
    overall: Difference
    """on all rows"""
    quartiles: tuple[Difference, ...]
    """on the rows of each quartile of ‖x‖, ascending"""


@dataclass(frozen=True, eq=False)
class WinRates(_Result):
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


@dataclass(frozen=True)
class AdversarialGroups(_Result):
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


class _Rows(NamedTuple):
    """The rows of a main edit and its placebos, with numbers for the labels."""

    table: pd.DataFrame
    edits: list[str]  # the main one first
    edit: Int[ndarray, "row"]
    latents: Int[ndarray, "latent"]
    latent: Int[ndarray, "row"]
    weight: Float[ndarray, "latent"]
    prompt: Int[ndarray, "row"]
    n_not_finite: int


class _Cells(NamedTuple):
    """Correlations within cells, each the rows of one stratum, edit and latent."""

    within: Within
    stratum: Int[ndarray, "cell"]
    edit: Int[ndarray, "cell"]
    latent: Int[ndarray, "cell"]
    margin: Float[ndarray, "deletion cell"]
    few: Bool[ndarray, "cell"]
    constant: Bool[ndarray, "cell"]


def _read(rows: pd.DataFrame, edit: str, numbers: Sequence[str]) -> _Rows:
    if missing := [name for name in (*_KEY, "latent_weight", *numbers) if name not in rows]:
        raise ResultError(f"the rows have no column {missing}; known: {list(rows.columns)}")
    names = rows["edit"].to_numpy()
    if not (names == edit).any():
        raise ResultError(f"no row of the edit {edit!r}; known: {sorted(set(names))}")
    edits = [edit, *(p for p in PLACEBOS if p != edit and (names == p).any())]
    some = cast(pd.DataFrame, rows[np.isin(names, edits)])
    if some[_KEY].duplicated().any():
        raise ResultError("a latent has two rows of one edit and token; give the rows of one site, context and SAE")
    finite = np.isfinite(cast(pd.DataFrame, some[list(numbers)]).to_numpy(dtype=float)).all(axis=1)
    table = cast(pd.DataFrame, some[finite])
    if not (table["edit"] == edit).any():
        raise ResultError(f"no row of the edit {edit!r} has finite {list(numbers)}")
    latents, first, latent = np.unique(table["latent"].to_numpy(), return_index=True, return_inverse=True)
    weight = table["latent_weight"].to_numpy(dtype=float)[first]
    if not (np.isfinite(weight) & (weight > 0)).all():
        raise ResultError("a latent_weight is not above 0")
    code = np.array([edits.index(name) for name in table["edit"]])
    return _Rows(
        table, edits, code, latents, latent, weight, table["target_prompt"].to_numpy(), int((~finite).sum())
    )  # fmt: skip


def _standard(x: ndarray, group: ndarray, weight: ndarray) -> ndarray:
    """x in units of its group's spread, 0 where that is rounding: latents of tiny KLs keep their precision."""
    total = np.bincount(group, weight)
    size = np.sqrt(np.bincount(group, weight * x * x) / total)
    x = x - (np.bincount(group, weight * x) / total)[group]
    spread = np.sqrt(np.bincount(group, weight * x * x) / total)
    return np.divide(x, spread[group], out=np.zeros_like(x), where=(spread > 1e-12 * size)[group])


def _cells(
    columns: Mapping[str, ndarray], stratum: ndarray, some: _Rows, weight: ndarray, signed: bool, min_tokens: int
) -> _Cells:
    shape = (int(stratum.max()) + 1, len(some.edits), len(some.latents))
    kinds, group = np.unique(np.ravel_multi_index((stratum, some.edit, some.latent), shape), return_inverse=True)
    standard = {name: _standard(x, group, weight) for name, x in columns.items()}
    within = Within.of(standard, group, some.prompt, weight)
    cos, inner = within.correlation("kl", "cos"), within.correlation("kl", "inner")
    margin = cos - inner if signed else np.abs(cos) - np.abs(inner)
    few = within.present.sum(axis=0) < min_tokens
    with np.errstate(invalid="ignore"):
        apart = np.abs(within.correlation("cos", "inner")[0]) < 1 - 1e-12
    constant = ~few & ~(np.isfinite(margin[0]) & apart)
    place, edit, latent = np.unravel_index(kinds, shape)
    return _Cells(within, place, edit, latent, margin, few, constant)


def _pulled(z: Float[ndarray, "unit"]) -> Float[ndarray, "unit"]:
    """z, each with an error of variance 1, pulled to their mean until their spread is that of the true ones."""
    if len(z) < 2:
        return z
    centre, spread = z.mean(), z.var(ddof=1)
    return centre + (z - centre) * np.sqrt(max(0.0, 1 - 1 / spread)) if spread > 0 else z


def _sign_covariance(
    margin: Float[ndarray, "deletion unit"], present: Int[ndarray, "prompt unit"], family: Int[ndarray, "unit"]
) -> Float[ndarray, "unit unit"]:
    """The covariance of the indicators that margins are above 0, from their jackknife: see `win_rates`."""
    here = present > 0
    count = here.sum(axis=0)
    with np.errstate(all="ignore"):
        centre = np.where(here, margin[1:], 0.0).sum(axis=0) / count
        step = np.where(here, margin[1:] - centre, 0.0) * np.sqrt((count - 1) / count)
        se = np.sqrt((step * step).sum(axis=0))
        z = np.clip(margin[0] / se, -20, 20)
    known = np.isfinite(se) & (se > 0)
    step, z = np.where(known, step / np.where(known, se, 1.0), 0.0), np.where(known, z, 0.0)
    for name in np.unique(family):
        z[known & (family == name)] = _pulled(z[known & (family == name)])
    correlation = np.clip(step.T @ step, -1, 1)
    np.fill_diagonal(correlation, 1.0)
    # P(both above 0) − P·P is the integral of the bivariate normal density over the correlation, from 0 up.
    top, square, product = np.arcsin(correlation), z[:, None] ** 2 + z**2, np.outer(z, z)
    total = np.zeros_like(top)
    for node, weight in zip(_NODES, _NODE_WEIGHTS, strict=True):
        sine = np.sin(top * (1 + node) / 2)
        total += weight * np.exp(-(square - 2 * product * sine) / (2 * (1 - sine * sine)))
    return total * top / (4 * np.pi)


def _linear(
    value: float, contrast: Float[ndarray, "unit"], covariance: Float[ndarray, "unit unit"],
    present: Int[ndarray, "prompt unit"],
) -> Estimate:  # fmt: skip
    """Σ contrast·indicator with its interval; units whose contrast is 0 do not enter."""
    used = present[:, contrast != 0]
    n_rows, n_prompts = int(used.sum()), int((used.sum(axis=1) > 0).sum())
    if n_prompts < MIN_PROMPTS:
        return Estimate(value, np.nan, np.nan, np.nan, n_rows, n_prompts)
    se = float(np.sqrt(max(contrast @ covariance @ contrast, 0.0)))
    half = float(stats.t.ppf(0.975, n_prompts - 1)) * se
    return Estimate(value, value - half, value + half, se, n_rows, n_prompts, df=float(n_prompts - 1))


def _clopper_pearson(k: int, n: int) -> tuple[float, float]:
    if not n:
        return np.nan, np.nan
    low = float(stats.beta.ppf(0.025, k, n - k + 1)) if k else 0.0
    return low, float(stats.beta.ppf(0.975, k + 1, n - k)) if k < n else 1.0


def _share(
    wins: Bool[ndarray, "unit"], weight: Float[ndarray, "unit"], covariance: ndarray, present: ndarray
) -> Estimate:
    """The weighted share of units that win; units of weight 0 do not enter."""
    total = weight.sum()
    if not total:
        return Estimate(np.nan, np.nan, np.nan, np.nan, 0, 0)
    return _linear(float(weight[wins].sum() / total), weight / total, covariance, present)


def _rates(cells: _Cells, stratum: int, some: _Rows) -> tuple[list[WinRate], list[Difference]]:
    """Of one stratum: the win rate of each edit, and the differences of the main edit's to the others'."""
    chosen = (cells.stratum == stratum) & ~cells.few & ~cells.constant
    margin, present = cells.margin[:, chosen], cells.within.present[:, chosen]
    edit, latent, wins = cells.edit[chosen], cells.latent[chosen], margin[0] > 0
    covariance = _sign_covariance(margin, present, edit)
    rates, differences = [], []
    for e in range(len(some.edits)):
        own, here = edit == e, (cells.stratum == stratum) & (cells.edit == e)
        n, k = int(own.sum()), int(wins[own].sum())
        found = _share(wins, np.where(own, some.weight[latent], 0.0), covariance, present)
        n_few, n_constant = len(some.latents) - int((here & ~cells.few).sum()), int((here & cells.constant).sum())
        rates.append(WinRate(found, n, k, n_few, n_constant, _clopper_pearson(k, n)))
        if e:
            both = np.intersect1d(latent[edit == 0], latent[own])
            weight = np.where(np.isin(latent, both), some.weight[latent], 0.0) / max(some.weight[both].sum(), 1e-300)
            contrast = np.where(edit == 0, weight, np.where(own, -weight, 0.0))
            value = float(contrast[wins].sum()) if len(both) else np.nan
            difference = _linear(value, contrast, covariance, present)
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
    return statistics.from_deletions(float(values[0]), values[1:][used.sum(axis=1) > 0], int(used.sum()))


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
    spearman_ of the same, win, margin, margin_se (jackknife), p (of margin = 0, t), q (false discovery within this table),
    steiger_z_iid, steiger_p_iid, mrr_z_iid, mrr_p_iid (`diagnostics.iid_tests`, rows taken as independent).

    rows: one group (site, context, SAE), a line for each latent, token and edit. Raises `ResultError` for columns that
    are not there, two rows of one edit and token, and an edit without rows.
    Source: arXiv:2606.15054 for the win rate; placebos and errors are ours.
    """
    if len(predictors) != 2:
        raise ResultError(f"predictors {list(predictors)}; expected two columns, the cosine's and the inner product's")
    some = _read(
        rows, edit, ["kl", *predictors, "norm", "norm_quartile", *(["token_weight"] if token_weighted else [])]
    )
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
    means, latents, prevalence = _latents(cells, columns | others, some, weight, signed)
    return WinRates(
        edit, (predictors[0], predictors[1]), absolute, signed, token_weighted, min_tokens, some.n_not_finite,
        rates.pop(edit), rates, differences, means, latents, prevalence, len(latents) - prevalence.n,
    )  # fmt: skip


def _latents(
    cells: _Cells, columns: Mapping[str, ndarray], some: _Rows, weight: ndarray, signed: bool
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
    n = within.present.sum(axis=0)[chosen]
    found: dict[str, Any] = {"latent": some.latents[latent], "n": n}
    found |= {"n_prompts": (within.present > 0).sum(axis=0)[chosen], "latent_weight": some.weight[latent]}
    found |= {f"r_{name}": pearson[name][0] for name in names}
    found |= {f"spearman_{name}": spearman[name][0] for name in names}
    found |= {"win": margin > 0, "margin": margin, "margin_se": se, "p": p, "q": false_discovery(p)}
    a, b, c = pearson["cos"][0], pearson["inner"][0], within.correlation("cos", "inner")[0][chosen]
    a, b, c = (a, b, c) if signed else (np.abs(a), np.abs(b), c * np.sign(a) * np.sign(b))
    usable = (np.abs([a, b]) < 1).all(axis=0) & (n >= 4)
    a = np.where(usable, a, np.nan)
    for name, test in (("steiger", steiger), ("mrr", meng_rosenthal_rubin)):
        found[f"{name}_z_iid"], found[f"{name}_p_iid"] = test(a, b, c, np.maximum(n, 4).astype(float))
    w = some.weight[latent]
    means = {
        kind: {name: _mean(r[name], w, within.present[:, chosen]) for name in names}
        for kind, r in (("pearson", pearson), ("spearman", spearman))
    }
    known = se > 0
    deletions, se, w = -cells.margin[:, chosen[known]], se[known], w[known]
    common = error_in_common(deletions, se, weights=w)
    return means, pd.DataFrame(found), share_below(deletions[0], se, 0.0, weights=w, shared_error=common)


def adversarial_groups(rows: pd.DataFrame, *, edit: str = "zero", min_tokens: int = 10) -> AdversarialGroups:
    """KL of tokens with high |cos| and low norm against tokens with low |cos| and high norm, by each latent's medians.

    High: above the median over the main edit's rows of the latent; low: at or below. share: Σ w_i·1[mean KL larger in the
    first group]/Σ w_i, w = latent_weight, errors as for `win_rates` from the margin (a − b)/(a + b) of the two means.
    kl_ratio: Σ_i w_i/n_i Σ KL over the first group's rows, divided by Σ_i w_i/n_i times their number; over the same of the
    second (n_i: rows of latent i in both): each latent counts w_i. Interval by the jackknife on its logarithm.
    The first group has the larger dose wherever |cos| varies more than ‖x‖, so the published 81 of 90 and 10.4× say
    nothing by themselves: `dose_ratio` and the placebos' ratios, which have these doses, stand beside them.

    Latents and their medians are held fixed. Simulated, 30 latents × 60 tokens, 20 and 40 prompts, KLs as there that follow
    the dose: intervals of kl_ratio cover 95–96, of share 94–95 (90–91 where all latents share the effects of prompts);
    `over_placebos_p` is below .05 in .03–.06. Raises `ResultError` as `win_rates` does.
    Source: arXiv:2606.15054; doses and placebos are ours.
    """
    some = _read(rows, edit, ["kl", "cosine", "norm", "delta_norm"])
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
    covariance = _sign_covariance(margin, present, np.zeros(len(weight), dtype=int))
    wins = margin[0] > 0
    per_row = weight / np.maximum(n[0].sum(axis=0), 1)

    def log_ratio(x: ndarray, e: int) -> Float[ndarray, "deletion"]:
        with np.errstate(all="ignore"):
            mean = (sums(x, e) @ per_row) / (sums(one, e) @ per_row)
            return np.log(mean[:, 0]) - np.log(mean[:, 1])

    n_rows = int(n[0].sum())

    def ratio(logs: ndarray) -> Estimate:
        values = np.exp(logs)
        return statistics.from_deletions(float(values[0]), values[1:], n_rows, transform="log")

    own = log_ratio(kl, 0)
    placebos = {name: log_ratio(kl, e) for e, name in enumerate(some.edits) if e}
    over = {name: ratio(own - logs) for name, logs in placebos.items()}
    return AdversarialGroups(
        edit, _share(wins, weight, covariance, present), int(wins.sum()), len(weight), n_latents - len(weight),
        (int(n[0, 0].sum()), int(n[0, 1].sum())), some.n_not_finite, _clopper_pearson(int(wins.sum()), len(weight)),
        ratio(own), ratio(log_ratio(dose, 0)), {name: ratio(logs) for name, logs in placebos.items()}, over,
        {name: statistics.p_value(estimate, 1.0, "log") for name, estimate in over.items()},
    )  # fmt: skip

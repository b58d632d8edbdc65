"""Does the effect of removing a direction follow its cosine with the activation, or the inner product? The norm exponent.

effect ~ |cos|^β_c · ‖x‖^β_n, and a = β_n/β_c: 0 where the cosine alone predicts, 1 where the inner product does. Twice:
from how the effect differs between tokens (`observational`, in which all that goes along with ‖x‖ is part of β_n), and
from what becomes of it when a token's own activation is made longer (`interventional`), beside the same of a placebo: what
the site does to any direction is no property of a latent. A win rate of the one score's correlation over the other's is no
estimand: at a fixed truth it moves with the number of tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy import ndarray
from scipy import stats

from diagnostics import statistics
from diagnostics.statistics.estimate import Estimate, FiellerInterval
from diagnostics.statistics.measures import CLEAR
from diagnostics.statistics.poisson_regression import poisson_slopes, sums_without, varies
from diagnostics.statistics.prevalence import Prevalence, error_in_common, share_below
from diagnostics.statistics.tables import PLACEBOS, few_prompts
from diagnostics.statistics.within_groups import GroupSums, ratio_from_deletions
from interventions.errors import ResultError
from interventions.files import Json

TOKEN = ["latent", "target_prompt", "target_position"]
Steps = Mapping[str, tuple[str, float, float]]
"""The four rows of a token that the interventional exponent reads: edit, scale, removed."""


def _steps(placebo: str = "", reference: str = "zero") -> Steps:
    """Those of the latent, or of a placebo: the main edit's is that of the whole projection where the reference is `zero`."""
    end = f"_{placebo}" if placebo else ""
    whole = placebo if placebo and reference == "zero" else f"zero{end}"
    return {
        "half": (f"half{end}", 1.0, 0.5),
        "whole": (whole, 1.0, 1.0),
        "down": (f"scaled{end}", 0.9, 1.0),
        "up": (f"scaled{end}", 1.1, 1.0),
    }


@dataclass(frozen=True)
class Exponent(Json):
    """A norm exponent, the tests of its two special values, and how many latents are nearer to the first.

    Every interval and p-value is by the delete-one-prompt jackknife with the latents held fixed: it says how far other
    prompts would move the result for these latents. `share_below_half` alone speaks of latents that were not drawn.
    """

    a: FiellerInterval
    """the exponent with the set of values that are not contradicted; not identified unless that is "bounded" """
    p_cosine: float
    """of H_cosine, a = 0, tested on the numerator: holds where a is not identified; nan below 10 prompts"""
    p_inner: float
    """of H_inner, a = 1, tested on numerator − denominator; nan as for `p_cosine`"""
    share_below_half: Prevalence
    """share of latents with numerator_i − ½·denominator_i < 0, that is a_i < ½ where the denominator is above 0;
    latents weighted by what they stand for"""
    n_latents: int
    """latents with a row that entered"""
    n_without_error: int
    """of them, those left out of `share_below_half`: no standard error (below 10 prompts, or their own fit fails)"""
    n_reversed: int
    """of the others, those whose denominator's 95 % interval ends at or below 0: there a_i < ½ is not what is counted"""
    n_rows: int
    """rows that entered: tokens of a latent, each token once for each latent"""
    n_below_floor: int
    """rows left out because an effect is at or below 10 noise floors"""
    share_below_floor: float
    """those as a share of all that could have entered"""
    n_unusable: int
    """rows left out because a number that is needed is missing, not finite, or a 0 that has no logarithm"""

    @property
    def identified(self) -> bool:
        return self.a.kind == "bounded"

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them, and whether a is identified."""
        return {"identified": self.identified} | super().as_dict()

    def __str__(self) -> str:
        a = str(self.a) if self.identified else "not identified"
        return f"a {a}, p(cos) {self.p_cosine:.2g}, p(inner) {self.p_inner:.2g}, a_i < ½: {self.share_below_half}"


@dataclass(frozen=True)
class Observational(Exponent):
    """From differences between tokens: numerator β_n, denominator β_c of `observational`."""

    beta_cosine: Estimate
    """β_c: 2 where KL goes with the square of the dose; in units of log KL for each unit of log |cos|"""
    beta_norm: Estimate
    """β_n, for each unit of log ‖x‖"""
    poisson: FiellerInterval
    """a where the mean of KL, not that of its logarithm, is a power of both; rows below the floor enter"""
    with_covariates: FiellerInterval | None
    """a of the first fit with clean entropy and log(1 + position) added; None where that was not asked for"""


@dataclass(frozen=True)
class BesidePlacebo(Json):
    """The interventional exponents of latents and of a placebo on the same tokens, and their difference."""

    latent: FiellerInterval
    """a of the latents at these tokens"""
    placebo: FiellerInterval
    """a of the placebos: of directions at random that have the latent's cosine with x, one for each token"""
    difference: Estimate
    """latent less placebo; nan where either is not identified"""
    placebo_scale_slope: Estimate
    placebo_dose_slope: Estimate
    n_rows: int
    """tokens of a latent that entered: all eight effects are there and above 10 noise floors"""
    n_below_floor: int
    share_below_floor: float
    n_unusable: int
    """these three as in `Exponent`"""


@dataclass(frozen=True)
class Interventional(Exponent):
    """From one token's activation at three lengths: numerator `scale_slope`, denominator `dose_slope`."""

    scale_slope: Estimate
    """∂log k/∂log s: what 1 % more of the whole activation does to the effect, in %"""
    dose_slope: Estimate
    """∂log k/∂log λ: what 1 % more of the projection that is removed does, in %"""
    placebos: dict[str, BesidePlacebo] = field(default_factory=dict)
    """by the placebo's name; without those that were not measured"""


def observational(
    rows: pd.DataFrame, floor: float, *, centred: bool = False, encoder: bool = False, covariates: bool = True
) -> Observational:
    """The norm exponent from how the effects of one edit differ between tokens, within latents.

    log KL = α_latent + β_c·log|cos| + β_n·log‖x‖ by least squares on the rows with KL > 10 · floor (nats) and cos ≠ 0;
    a = β_n/β_c. Each latent counts `latent_weight` times for each of its rows; tokens are not weighted, for they are
    stratified on the two regressors, and choosing rows by regressors biases no slope of a model that holds. Leaving
    out small effects does: it chooses by the outcome and flattens both slopes. Simulated with normal noise, 50 % of
    the rows below the floor take β_c from 2 to 1.3 but both alike, a by less than .02; `poisson` leaves out none.

    Simulated with 12 latents × 60 tokens, log-normal noise (SD 1, correlation .3 within a prompt), weights 1:3:9, a
    correlation of −.4 of log‖x‖ and log|cos|, 20 and 40 prompts, 1,000 replications (± .007): the set for a covers 94–96
    at a = 0, ½, 1, the same with covariates; that of `poisson` 95–96; noise of SD 1.5 (500 replications, ± .01) 94–96.
    H_cosine and H_inner reject a true null at p < .05 in .045–.054. Where neither score predicts (β_c = β_n = 0) they
    reject as rarely, and a is identified in 5–6 %. `share_below_half`, 40 and 80 latents × 80 tokens of the same 20 or 40
    prompts, 200 replications: covers 94–96, with their `error_in_common`; errors that latents have in common through their
    prompts would leave it at 63–88.

    rows: one edit's (`zero`) of one group, [row] with the columns latent, target_prompt, target_position, kl, the
    score's, clean_entropy, latent_weight. centred: cosine and norm of x − b_dec; encoder: the cosine with the encoder's
    row. Nothing is determined (nan) where no row is left. Raises `ResultError` for rows of several edits, tokens that
    occur twice, a latent with two weights, encoder cosines of plain directions, a negative floor, and covariates that
    are not finite. Does not warn of 10 to 20 prompts: `n_prompts` stands in each interval. Source: ours.
    """
    cosine, norm = "cosine" + "_encoder" * encoder + "_centred" * centred, "norm" + "_centred" * centred
    _check(rows, floor)
    if "edit" in rows and rows.edit.nunique() > 1:
        raise ResultError(f"rows of the edits {sorted(rows.edit.unique())}; expected those of one")
    if encoder and len(rows) and rows[cosine].isna().all():
        raise ResultError(f"{cosine} is nan in all rows: these directions have no encoder; give encoder=False")
    kl = rows.kl.to_numpy(float)
    with np.errstate(all="ignore"):
        log = {
            "kl": np.log(kl),
            "cosine": np.log(np.abs(rows[cosine].to_numpy(float))),
            "norm": np.log(rows[norm].to_numpy(float)),
        }
    usable = np.isfinite(kl) & np.isfinite(log["cosine"]) & np.isfinite(log["norm"])
    clear = usable & (kl > CLEAR * floor)
    latent, prompt, weight = rows.latent.to_numpy(int), rows.target_prompt.to_numpy(int), _weights(rows)
    more: dict[str, ndarray] = {}
    if covariates:
        position = np.log1p(rows.target_position.to_numpy(float))
        more = {"entropy": rows.clean_entropy.to_numpy(float), "position": position}
        more = {name: column for name, column in more.items() if varies(column[clear], latent[clear])}
    with few_prompts():  # few prompts
        within = _within({k: v[clear] for k, v in (log | more).items()}, latent[clear], prompt[clear])
        w = weight.loc[within.groups].to_numpy(float)
        pooled = within.slopes("kl", ["norm", "cosine"], w)
        found = _shared(within, pooled, within.slopes_each("kl", ["norm", "cosine"]), w)
        beta_norm, beta_cosine = (within.estimate(beta) for beta in pooled.T)
        adjusted = within.slopes("kl", ["norm", "cosine", *more], w)
        regressors = np.column_stack([log["norm"], log["cosine"]])[usable]
        power = poisson_slopes(np.maximum(kl[usable], 0), regressors, latent[usable], prompt[usable], weight)
        return Observational(
            **found,
            n_below_floor=int((usable & ~clear).sum()),
            share_below_floor=_share(int((usable & ~clear).sum()), int(usable.sum())),
            n_unusable=int((~usable).sum()),
            beta_cosine=beta_cosine,
            beta_norm=beta_norm,
            poisson=ratio_from_deletions(power[:, 0], power[:, 1], np.unique(prompt[usable], return_counts=True)[1]),
            with_covariates=within.ratio(adjusted[:, 0], adjusted[:, 1]) if covariates else None,
        )


def interventional(rows: pd.DataFrame, floor: float, reference: str = "zero") -> Interventional:
    """The norm exponent from how an effect changes when the same token's activation is scaled.

    k(s, λ) = KL(run with s·x ‖ run with s·x less the share λ of its projection), nats; for each token of each latent
    the chords  scale = log[k(1.1, 1)/k(.9, 1)]/log(1.1/.9),  dose = log[k(1, 1)/k(1, ½)]/log 2;  a = mean scale ÷ mean
    dose over tokens as sampled, each counting its latent's `latent_weight`. Least squares over s = .9, 1, 1.1 would
    lower the variance of the scale slope by .1 % and give it the error of k(1, 1), which the dose slope has too.

    a = 0 exactly where k does not depend on s, so H_cosine needs no model. a = 1 where k is a power of s·λ. Where k is
    another function of s·λ the two chords lie at different places, about s·λ = 1 and ½ … 1, and a is their ratio: .76
    for k ~ u²/(1 + u²), which saturates at u near 1; above 1 for a k that steepens. So H_inner may be rejected for
    the bend of k alone, H_cosine never. Simulated with 10 latents × 40 tokens, 20 and 40 prompts, slopes with effects
    of prompts, 500 replications (± .01): the set for a covers 95–96 at a = 0, ½, 1, true nulls are rejected in .04–.05.

    `placebos`: the same of directions at random with the latent's cosine, one a token, so a dose that is equal at each s
    and λ. Where their a is the latent's, a says how the site responds to any direction, and nothing of latents. The
    difference of the two ratios has the jackknife interval of prompts, latent and placebo of a token left out together;
    no interval where either ratio is not identified. Simulated likewise, latents and placebos correlated .5: 95–97 where
    they are equal, 95–97 where they differ by ½ or 1 (500 replications, ± .01), misses on both sides.

    rows: of one group; used are `zero` (removed 1), `half` (removed .5) and `scaled` (scale .9 and 1.1, removed 1),
    joined by latent, target_prompt and target_position. A token with a `half` or `scaled` row enters where all four are
    there (others: `n_unusable`) and above 10 · floor (others: `n_below_floor`; the smallest is mostly the half dose, so
    this keeps flat dose slopes); beside a placebo, where all eight are. reference: whose placebos `placebo_…` are; where
    it is not `zero`, those of `zero` are `zero_placebo_…`.
    Nothing is determined (nan) where no token is left. Raises `ResultError` for a token with two rows of one kind, a
    latent with two weights, and a negative floor. Does not warn of 10 to 20 prompts. Source: ours.
    """
    own = _chords(rows, floor, [_steps()])
    with few_prompts():  # few prompts
        found = _shared(own.within, own.pooled[0], own.each[0], own.weight)
        scale_slope, dose_slope = (own.within.estimate(slope) for slope in own.pooled[0].T)
        measured = [name for name in PLACEBOS if (rows.edit == f"scaled_{name}").any()]
        beside = {name: _beside(_chords(rows, floor, [_steps(), _steps(name, reference)])) for name in measured}
    return Interventional(**found, **own.counts, scale_slope=scale_slope, dose_slope=dose_slope, placebos=beside)


def _beside(both: "_Chords") -> BesidePlacebo:
    latent, placebo = (both.within.ratio(*slopes.T) for slopes in both.pooled)
    with np.errstate(all="ignore"):
        a, b = (slopes[:, 0] / slopes[:, 1] for slopes in both.pooled)
    difference = both.within.estimate(a - b)
    if not latent.kind == placebo.kind == "bounded":
        difference = replace(difference, low=np.nan, high=np.nan, se=np.nan, df=np.nan)
    scale_slope, dose_slope = (both.within.estimate(slope) for slope in both.pooled[1].T)
    return BesidePlacebo(latent, placebo, difference, scale_slope, dose_slope, n_rows=both.within.n_rows, **both.counts)


@dataclass(frozen=True)
class _Chords:
    """Scale and dose slopes (last axis) of experiments on the same tokens, on all rows and without each prompt."""

    within: GroupSums
    pooled: Float[ndarray, "experiment deletion 2"]
    each: Float[ndarray, "experiment deletion latent 2"]
    weight: Float[ndarray, "latent"]
    counts: dict[str, Any]


def _chords(rows: pd.DataFrame, floor: float, experiments: Sequence[Steps]) -> _Chords:
    edit = rows.edit.to_numpy()
    of_x, of_projection = rows["scale"].to_numpy(float), rows["removed"].to_numpy(float)
    kind, names = np.full(len(rows), "", dtype=object), []
    for i, steps in enumerate(experiments):
        for name, (of, scale, removed) in steps.items():
            names.append(f"{name} {i}")
            kind[(edit == of) & np.isclose(of_x, scale) & np.isclose(of_projection, removed)] = names[-1]
    rows = cast(pd.DataFrame, rows.assign(kind=kind).loc[kind != ""])
    _check(rows, floor, "kind")
    weight = _weights(rows)
    table = rows.pivot(index=TOKEN, columns="kind", values="kl").reindex(columns=names)
    detail = [name for name in names if not name.startswith("whole")]
    table = table.loc[table[detail].notna().any(axis=1)]  # the others have no such rows
    k = table.to_numpy(float)
    lowest = np.where(np.isfinite(k), k, -np.inf).min(axis=1)
    usable, clear = lowest > -np.inf, lowest > CLEAR * floor
    half, whole, down, up = np.moveaxis(np.log(k[clear]).reshape(-1, len(experiments), 4), -1, 0)
    slopes = np.stack([(up - down) / np.log(1.1 / 0.9), (whole - half) / np.log(2)], axis=-1)  # [token, experiment, 2]
    latent, prompt = (np.asarray(table.index.get_level_values(name), dtype=int)[clear] for name in TOKEN[:2])
    within = _within({name: slopes[:, 0, i] for i, name in enumerate(("scale", "dose"))}, latent, prompt)
    w = weight.loc[within.groups].to_numpy(float)
    columns = slopes.reshape(-1, 2 * len(experiments)).T
    sums = np.stack([sums_without(column, latent, prompt) for column in columns], axis=-1)
    with np.errstate(all="ignore"):
        pooled = np.einsum("g,dgk->dk", w, sums) / (within.n @ w)[:, None]
        each = sums / within.n[..., None]
    apart = lambda found: np.stack(np.split(found, len(experiments), axis=-1))  # noqa: E731
    below = int((usable & ~clear).sum())
    counts = {"n_below_floor": below, "share_below_floor": _share(below, int(usable.sum()))}
    return _Chords(within, apart(pooled), apart(each), w, counts | {"n_unusable": int((~usable).sum())})


def _check(rows: pd.DataFrame, floor: float, *kind: str) -> None:
    if not 0 <= floor < np.inf:
        raise ResultError(f"a noise floor of {floor}; expected a finite number of nats, 0 or more")
    if twice := int(rows.duplicated([*TOKEN, *kind]).sum()):
        raise ResultError(f"{twice} of {len(rows)} rows repeat a latent and token; expected the rows of one group")


def _weights(rows: pd.DataFrame) -> pd.Series:
    """`latent_weight` by latent."""
    weights = rows.groupby("latent").latent_weight
    if (weights.nunique(dropna=False) > 1).any() or not (rows.latent_weight > 0).all():
        raise ResultError("a latent_weight is not above 0, or a latent has two; expected the rows of one group")
    return weights.first()


def _share(part: int, of: int) -> float:
    return part / of if of else float("nan")


def _within(columns: dict[str, ndarray], latent: Int[ndarray, "row"], prompt: Int[ndarray, "row"]) -> GroupSums:
    """`GroupSums.of`, also of no rows: no groups then, and nothing is determined."""
    if len(latent):
        return GroupSums.of(columns, latent, prompt)
    k, none = len(columns), np.zeros(0, dtype=int)
    return GroupSums(tuple(columns), none, np.zeros((1, 0)), np.zeros((1, 0, k, k)), np.ones(k), none.reshape(0, 0), 0)


def _shared(
    within: GroupSums,
    pooled: Float[ndarray, "deletion 2"],
    each: Float[ndarray, "deletion latent 2"],
    weight: Float[ndarray, "latent"],
) -> dict[str, Any]:
    """The fields of `Exponent` that follow from a numerator and a denominator (last axis), of all and of each latent."""
    top, bottom = pooled.T
    prevalence, without_error, reverse = _half(within, each, weight)
    return {
        "a": within.ratio(top, bottom),
        "p_cosine": statistics.p_value(within.estimate(top), 0.0),
        "p_inner": statistics.p_value(within.estimate(top - bottom), 0.0),
        "share_below_half": prevalence,
        "n_latents": len(within.groups),
        "n_without_error": without_error,
        "n_reversed": reverse,
        "n_rows": within.n_rows,
    }


def _half(
    within: GroupSums, each: Float[ndarray, "deletion latent 2"], weight: Float[ndarray, "latent"]
) -> tuple[Prevalence, int, int]:
    """`share_below_half`, `n_without_error` and `n_reversed`."""
    theta = each[..., 0] - each[..., 1] / 2
    contrast, own = within.each(theta), within.each(each[..., 1])
    known = contrast.se > 1e-12 * np.abs(each[0]).sum(axis=-1)  # below it the error is one of rounding
    theta, se, w = theta[:, known], contrast.se[known], weight[known]
    common = error_in_common(theta, se, weights=w)
    highest = own.value + stats.t.ppf(0.975, np.maximum(own.df, 1)) * own.se
    found = share_below(theta[0], se, 0.0, weights=w, shared_error=common)
    return found, int((~known).sum()), int((highest[known] <= 0).sum())

"""Is there a Simpson's paradox between a score and what an ablation does, and if not, what is there?

Published: a score's win rate, the share of latents with |r(KL, cos)| > |r(KL, inner)|, is 80–100 % over all tokens and
43–77 % within quartiles of ‖x‖, "Simpson's paradox". A win rate that falls is no paradox: among tokens of one norm the
inner product is a multiple of the cosine. `simpson` asks of each score S ∈ {cosine, inner, activation} how its slope
changes when norms are held fixed, and of the win rates whether one fit to all rows explains them:

    b_pool   log KL = α_latent + b·log|S|                b_in   the same + an intercept for each decile of log‖x‖

`reversal`: opposite signs, both intervals clear of 0: the paradox.

`confounded`: the interval of b_pool − b_in clear of 0, same sign. That is so wherever the norm has an effect of its own
given S and goes with S, for b_pool then has part of it: b_pool − b_in ≈ γ·δ, γ the slope on log‖x‖ given log|S|, δ that of
log‖x‖ on log|S| within latents.

`range restriction`: the interval of overall less mean quartile win rate above 0, and each quartile's win rate within the
95 % band simulated from the pooled fit. It speaks of cosine against inner product, so it is the same for all scores that
none of the above holds for.

`none`: nothing of this is shown; with few latents or prompts little can be. A difference clear of 0 whose signs are
opposite without both being clear is not `confounded`: read `differs`.

What that means for log KL = 2·(log|cos| + a·log‖x‖) + α_latent + noise, a = 0 a cosine truth and 1 an inner product's:

Cosine: γ = 2a, and δ has the sign of corr(log|cos|, log‖x‖): `confounded` says that the norm matters given the cosine.
Where the two are unrelated no label says anything about a: `none` is not a = 0.

Inner: γ = 2(a − 1), and δ > 0 unless |cos| falls as fast as 1/‖x‖, for the inner product contains the norm: `confounded`
is what any a ≠ 1 gives, a rejection of the inner product as the score (b_pool < b_in for a < 1).

Activation: as the score that the encoder is built on, inner for a standard SAE; where the active tokens span a narrow
range of it, b_pool − b_in is larger (−.25, −.49, −.48 for a = 0 in the three designs below).

Labels that simulation gives, as shares of 40 tables of 300 latents × 100 tokens of 100 prompts, noise of SD 1 (correlation
.3 within prompts); "all" and "active" have the SDs of log|cos|, of log‖x‖ and the correlation of tokens drawn from all
strata and from the strongest 5 % for the packaged SAEs (.8–.9, .1–.3, −.03 to .02; .3–.5, .1, .02 to .1):

    tokens (SDs, correlation)  a  win rate, in quartiles  b_pool − b_in of cosine; label        of inner; label
    all (.85, .2, 0)           0  .71, .55                .00; range restriction .68, none .32  −.10; confounded 1
                               ½  .48, .49                .00; none 1                           −.05; confounded 1
                               1  .27, .44                .00; none 1                           .00; none .95
    active (.35, .12, .1)      0  .74, .55                .00; range restriction .53, none .42  −.25; confounded 1
                               ½  .49, .50                .03; confounded 1                     −.12; confounded 1
                               1  .23, .44                .07; confounded 1                     .00; none .95
    opposed (.5, .2, −.3)      0  .84, .58                .00; range restriction .78, none .15  −.08; confounded 1
                               ½  .52, .50                −.11; confounded 1                    −.04; confounded 1
                               1  .17, .42                −.23; confounded 1                    .00; none .95

With 100 latents × 60 tokens of 40 prompts the rows of a = 0 have range restriction in .13, .15, .60 of 60 tables only, for
the interval of the fall is wide (`simpson`); its band, `fall.low` to `fall.high`, lies above 0 in .97, .97, 1 of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy import ndarray
from scipy import optimize, sparse

from diagnostics import statistics
from diagnostics.statistics.estimate import Estimate, effective_number
from diagnostics.statistics.tables import few_prompts
from diagnostics.statistics.within_groups import GroupSums
from diagnostics.win_rate.rows import latent_weights
from interventions.errors import ResultError
from interventions.files import Json

SCORES = ("cosine", "inner", "activation")
ABOVE_FLOOR = 10
"""Rows with a KL of at most this many noise floors are left out: their logarithm is noise."""
Label = Literal["reversal", "confounded", "range restriction", "none"]
_PLACE = ["latent", "target_prompt", "target_position"]
_NEEDED = (*_PLACE, "edit", "kl", "cosine", "inner", "norm", "norm_quartile", "latent_weight")
_AT_ONCE = 1 << 21  # simulated KLs held in memory
_TIE = 1 + 1e-9  # correlations closer than this are equal: where all norms are, cosine and inner product are one score


@dataclass(frozen=True)
class Paradox(Json):
    """A score's slopes with and without intercepts for deciles of the norm, and what their difference is called."""

    label: Label
    """the first of reversal, confounded and range restriction that holds; else none"""
    b_pool: Estimate
    """slope of log KL on log|S|, an intercept for each latent"""
    b_in: Estimate
    """the same with intercepts for deciles of log‖x‖ too"""
    difference: Estimate
    """b_pool − b_in, from joint deletions"""
    opposite: bool
    """the slopes have opposite signs and both their intervals are clear of 0"""
    differs: bool
    """the interval of the difference is clear of 0"""
    n_rows: int
    """rows that entered"""
    n_not_finite: int
    """rows left out: KL, score or log‖x‖ is not finite"""
    n_below_floor: int
    """of the others, left out: a KL of at most 10 floors"""
    n_score_0: int
    """of the others, left out: the score is 0 and has no logarithm"""


@dataclass(frozen=True)
class BandedWinRate(Json):
    """The share of latents with |r(KL, cos)| > |r(KL, inner)|, and what the pooled fit lets one expect."""

    observed: Estimate
    """weighted by latent_weight, with its jackknife interval"""
    low: float
    """2.5th percentile of the win rates of tables simulated from the pooled fit; nan where no latent has a win rate"""
    high: float
    """97.5th percentile"""
    inside: bool | None
    """whether low ≤ observed ≤ high; None where no latent has a win rate"""
    n_latents: int
    """latents with `min_tokens` rows and both correlations"""


@dataclass(frozen=True)
class Simpson(Json):
    """The labels of one group of rows, and the win rates behind `range restriction`."""

    scores: dict[str, Paradox | None]
    """None: there is no label, and `reasons` says why"""
    reasons: dict[str, str]
    """of each score without a label"""
    overall: BandedWinRate
    quartiles: tuple[BandedWinRate, ...]
    """by quartile of ‖x‖, 0 to 3"""
    fall: BandedWinRate
    """the overall win rate less the mean of the quartiles', with its own band"""
    falls: bool
    """the interval of the observed fall lies above 0"""
    inside_band: tuple[bool | None, ...]
    """`inside` of each quartile"""
    cosine_slope: Estimate
    """β_c of the pooled fit"""
    norm_slope: Estimate
    """β_n of the pooled fit"""
    sd_prompt: float
    """standard deviation of the fit's prompt effects, in log KL"""
    sd_token: float
    """of its token effects: what all latents share at a token beyond its prompt"""
    sd_rest: float
    """of the rest"""
    n_rows: int
    """rows of the pooled fit and of the win rates"""


class _Fit(NamedTuple):
    """log KL = α_latent + β_c log|cos| + β_n log‖x‖ + prompt + token + rest, on the rows that have logarithms."""

    rows: pd.DataFrame  # sorted by latent
    latent: Int[ndarray, "row"]  # numbered from 0, as are prompts and tokens
    prompt: Int[ndarray, "row"]
    token: Int[ndarray, "row"]
    weight: Float[ndarray, "latent"]
    slopes: tuple[Estimate, Estimate]
    expected: Float[ndarray, "row"]  # β_c log|cos| + β_n log‖x‖: an intercept moves no correlation within a latent
    sd: Float[ndarray, "3"]  # of prompts, tokens, the rest
    rest: Float[ndarray, "row"]  # of mean square 1


def simpson(rows: pd.DataFrame, floor: float, *, scores: Sequence[str] = SCORES, edit: str = "zero", draws: int = 200,
            seed: int = 0, min_tokens: int = 10, absolute: bool = True, signed: bool = False) -> Simpson:  # fmt: skip
    """What is there of a Simpson's paradox in one group of rows.

    Slopes: least squares of log KL on log|S| with the intercepts named above, latents weighted by latent_weight, tokens
    not; deciles over the rows that enter, kept in all deletions. Rows with a KL of at most 10·floor (nats) are left out,
    and of each score those where it is 0. A score with fewer than 2 latents or 10 effective prompts left, or no slope, has no label.

    Win rates: over those latents, by latent_weight, that have `min_tokens` rows (overall; in the quartile) and both
    correlations, on the rows of the pooled fit: KL above 10·floor, cosine not 0. `absolute`: of KL with |cos| and |inner|
    (True) or with the signed scores (False); |r| is compared, or r where `signed`, and equal ones are no win.

    Band: `draws` tables are simulated from log KL = α_latent + β_c log|cos| + β_n log‖x‖ + prompt + token + rest at the
    rows' own cosines, norms, prompts and tokens, seeded by `seed`. Prompt and token effects (token: what latents share) are
    normal draws, the rest a draw from the latent's own residuals, which keeps their shape and each latent's own spread; the
    three variances are those of MINQUE(0) on the fit's residuals. α_latent moves no correlation. The band is from the 2.5th to
    the 97.5th percentile of the tables' win rates.

    Every interval is by the delete-one-prompt jackknife (clusters: target_prompt), the latents held fixed. Simulated:
    b_pool − b_in = 0 is rejected at 5 % in .03–.05 where the norm has no effect given S and corr(log S, log‖x‖) is −.5 to
    .5 (8 to 200 latents, 20 and 40 prompts, log-normal noise with correlation .3 within prompts, norms with a share of 0,
    .5, .9 between prompts), and in .00 where the norm is also unrelated to S.
    Quartiles' win rates lie within their bands in .93–.98 of tables from the model (50–150 latents, 12–100 prompts, skewed
    or t₅ residuals, slopes or noise that differ by latent, KLs of which the floor cuts 30 %), all four in .74–.93; the
    overall one in .95–1. Less would do worse: normal residuals .90–.92 (overall, skewed), residuals pooled over latents .14
    (overall, latents' noise SDs apart by a factor of e^±.8), no token effects .89–.91 (quartiles).
    A latent's win is a step, which deletions move by chance: the jackknife's SE of a win rate and of a fall is 1.1–2 times
    their true SD, and a fall of .2 (.76 to .56) is found in .2, .4, .7, 1 of tables of 50, 100, 150 latents × 60 tokens and
    300 × 100; where none was planted, in none.

    Raises `ResultError` for unknown scores and edits, missing columns, a floor that is negative or not finite, quartiles
    other than 0 to 3, weights not above 0, and where there is nothing to fit. Source: the win rates by quartile
    arXiv:2606.15054; the labels ours.
    """
    if unknown := [name for name in scores if name not in SCORES]:
        raise ResultError(f"no score {unknown[0]!r}; known: {', '.join(SCORES)}")
    if missing := [name for name in (*_NEEDED, *scores) if name not in rows]:
        raise ResultError(f"the rows have no column {missing[0]!r}; there are: {', '.join(map(str, rows.columns))}")
    if not 0 <= floor < np.inf:
        raise ResultError(f"a noise floor of {floor}; expected a finite number of nats, 0 or more")
    if draws < 1:
        raise ResultError(f"{draws} draws; expected 1 or more, such as 200")
    of_edit = (rows["edit"] == edit).to_numpy()
    if not of_edit.any():
        raise ResultError(f"no row of edit {edit!r}; there are: {', '.join(sorted(map(str, rows['edit'].unique())))}")
    table = cast(pd.DataFrame, rows[of_edit])
    table = table.iloc[np.lexsort([table[name].to_numpy() for name in reversed(_PLACE)])]
    with few_prompts():  # few prompts: their number stands beside each interval
        fit = _fit(table, floor)
        overall, quartiles, fall = _win_rates(fit, draws, seed, min_tokens, absolute, signed)
        inside = tuple(quartile.inside for quartile in quartiles)
        falls = fall.observed.low > 0
        found = {name: _paradox(table, name, floor, falls and False not in inside) for name in scores}
    return Simpson(
        scores={name: None if isinstance(one, str) else one for name, one in found.items()},
        reasons={name: one for name, one in found.items() if isinstance(one, str)},
        overall=overall,
        quartiles=quartiles,
        fall=fall,
        falls=falls,
        inside_band=inside,
        cosine_slope=fit.slopes[0],
        norm_slope=fit.slopes[1],
        sd_prompt=float(fit.sd[0]),
        sd_token=float(fit.sd[1]),
        sd_rest=float(fit.sd[2]),
        n_rows=len(fit.rows),
    )


def _usable(table: pd.DataFrame, score: str, floor: float) -> tuple[pd.DataFrame, dict[str, int]]:
    """The rows whose KL, score and norm have logarithms that are no noise, and the numbers of the others by reason."""
    kl, s, norm = (table[name].to_numpy(float) for name in ("kl", score, "norm"))
    finite = np.isfinite(kl) & np.isfinite(s) & np.isfinite(norm) & (norm > 0)
    above, nonzero = kl > ABOVE_FLOOR * floor, s != 0
    dropped = {"n_not_finite": ~finite, "n_below_floor": finite & ~above, "n_score_0": finite & above & ~nonzero}
    kept = cast(pd.DataFrame, table[finite & above & nonzero])
    return kept, {reason: int(which.sum()) for reason, which in dropped.items()}


def _paradox(table: pd.DataFrame, score: str, floor: float, restricted: bool) -> Paradox | str:
    """The label of one score, or why it has none."""
    rows, dropped = _usable(table, score, floor)
    latent, prompt = rows["latent"].to_numpy(int), rows["target_prompt"].to_numpy(int)
    n_latents, effective = len(np.unique(latent)), effective_number(np.unique(prompt, return_counts=True)[1])
    if n_latents < 2 or effective < statistics.MIN_PROMPTS:
        left = f"{len(rows)} of {len(table)} rows left ({', '.join(f'{name} {n}' for name, n in dropped.items())})"
        expected = f"expected 2 latents and {statistics.MIN_PROMPTS} effective prompts or more"
        return f"{n_latents} latents and {effective:.3g} effective prompts in the {left}; {expected}"
    log_norm = np.log(rows["norm"].to_numpy(float))
    decile = np.searchsorted(np.quantile(log_norm, np.arange(1, 10) / 10), log_norm, side="right")
    dummies = {f"decile {d}": (decile == d).astype(float) for d in np.unique(decile)[1:]}
    own = {"kl": np.log(rows["kl"].to_numpy(float)), "score": np.log(np.abs(rows[score].to_numpy(float)))}
    w = GroupSums.of(own | dummies, latent, prompt)
    weight = latent_weights(rows, np.unique(latent, return_index=True)[1])
    b_pool, b_in = (w.slopes("kl", on, weight)[:, 0] for on in (["score"], ["score", *dummies]))
    if not (np.isfinite(b_pool).all() and np.isfinite(b_in).all()):
        return "log|S| does not vary within latents and deciles of the norm, on all rows or without one of the prompts"
    pool, inner, difference = (w.estimate(b) for b in (b_pool, b_in, b_pool - b_in))
    turned, differs = pool.value * inner.value < 0, _clear(difference)
    opposite = turned and _clear(pool) and _clear(inner)
    label: Label = "range restriction" if restricted else "none"
    if opposite:
        label = "reversal"
    elif differs and not turned:
        label = "confounded"
    return Paradox(label, pool, inner, difference, opposite, differs, len(rows), **dropped)


def _clear(estimate: Estimate) -> bool:
    """Whether the interval leaves 0 out."""
    return estimate.low > 0 or estimate.high < 0


def _fit(table: pd.DataFrame, floor: float) -> _Fit:
    rows, dropped = _usable(table, "cosine", floor)
    if not len(rows):
        raise ResultError(
            f"none of {len(table)} rows can be fitted ({dropped}); expected KLs above {ABOVE_FLOOR} floors"
        )
    y, cosine, norm = (np.log(np.abs(rows[name].to_numpy(float))) for name in ("kl", "cosine", "norm"))
    label, place = rows["latent"].to_numpy(int), rows["target_position"].to_numpy(int)
    prompt = np.unique(rows["target_prompt"].to_numpy(int), return_inverse=True)[1]
    token = np.unique(prompt * (place.max() + 1) + place, return_inverse=True)[1]
    w = GroupSums.of({"kl": y, "cosine": cosine, "norm": norm}, label, prompt)
    latent, weight = np.searchsorted(w.groups, label), latent_weights(rows, np.unique(label, return_index=True)[1])
    slopes = w.slopes("kl", ["cosine", "norm"], weight)
    if not np.isfinite(slopes[0]).all():
        raise ResultError(
            "log|cos| and log‖x‖ do not vary apart from each other within latents: there is nothing to fit"
        )
    expected = slopes[0, 0] * cosine + slopes[0, 1] * norm
    residual = _centred(y - expected, latent)
    rest = _centred(residual, prompt)
    size = np.sqrt((rest * rest).mean())
    sd = _spreads(residual, latent, [prompt, token, np.arange(len(y))])
    if token.max() + 1 == len(y):  # no token has two rows: nothing tells its effect from the rest
        sd = np.array([sd[0], 0.0, np.hypot(sd[1], sd[2])])
    found = w.estimate(slopes[:, 0]), w.estimate(slopes[:, 1])
    return _Fit(rows, latent, prompt, token, weight, found, expected, sd, rest / size if size > 0 else rest)


def _centred(x: Float[ndarray, "row"], group: Int[ndarray, "row"]) -> Float[ndarray, "row"]:
    return x - (np.bincount(group, x) / np.maximum(np.bincount(group), 1))[group]


def _spreads(
    residual: Float[ndarray, "row"], latent: Int[ndarray, "row"], by: Sequence[Int[ndarray, "row"]]
) -> Float[ndarray, "effect"]:
    """The SD of each random effect, given every row's label of it, coarse to fine, from residuals centred within latents.

    With M that centring and Z_a the indicators of effect a, E‖Z_aᵀMy‖² = Σ_b σ_b² ‖Z_aᵀMZ_b‖²: as many equations as
    effects, solved with no variance below 0. Source: MINQUE(0), Hartley, Rao & LaMotte 1978.
    """
    n, each = np.bincount(latent), np.arange(len(latent))
    root = sparse.csr_matrix((1 / np.sqrt(n[latent]), (latent, each)))
    z = [sparse.csr_matrix((np.ones(len(latent)), (each, label))) for label in by]
    means = [sparse.csr_matrix(root @ a) for a in z]
    between = [(m @ m.T).toarray() for m in means]
    left = np.zeros((len(z), len(z)))
    for a in range(len(z)):
        for b in range(a + 1):  # the finer first: the coarser would fill a matrix [latent, row]
            common = sparse.csr_matrix(z[a].T @ z[b])
            crossed = sparse.csr_matrix(means[a] @ common).multiply(means[b]).sum()
            left[a, b] = left[b, a] = common.power(2).sum() - 2 * crossed + (between[a] * between[b]).sum()
    right = np.array([((a.T @ residual) ** 2).sum() for a in z])
    size = np.sqrt(np.maximum(np.diag(left), 1e-300))
    return np.sqrt(optimize.nnls(left / np.outer(size, size), right / size)[0] / size)


def _win_rates(
    fit: _Fit, draws: int, seed: int, min_tokens: int, absolute: bool, signed: bool
) -> tuple[BandedWinRate, tuple[BandedWinRate, ...], BandedWinRate]:
    """Overall, by quartile, and the fall from the one to the mean of the others."""
    quartile, kl = fit.rows["norm_quartile"].to_numpy(int), fit.rows["kl"].to_numpy(float)
    if not np.isin(quartile, range(4)).all():
        raise ResultError(f"norm_quartile has the values {np.unique(quartile).tolist()}; expected 0 to 3")
    cosine, inner = (np.abs(c) if absolute else c for c in (fit.rows[s].to_numpy(float) for s in ("cosine", "inner")))
    cell = 4 * fit.latent + quartile
    whole, parts = (
        GroupSums.of(
            {"kl": _own_size(kl, g), "cosine": _own_size(cosine, g), "inner": _own_size(inner, g)}, g, fit.prompt
        )
        for g in (fit.latent, cell)
    )
    # Groups: the latents, then the latents' quartiles. Kinds: overall, then the four quartiles.
    wins, enough = np.hstack([_wins(whole, signed), _wins(parts, signed)]), np.r_[whole.n[0], parts.n[0]] >= min_tokens
    kind, latent = np.r_[0 * whole.groups, 1 + parts.groups % 4], np.r_[whole.groups, parts.groups // 4]
    chosen = (kind == np.arange(5)[:, None]) & enough & np.isfinite(wins[0])
    weight = chosen * fit.weight[latent]
    column = np.r_[fit.latent, len(whole.groups) + np.searchsorted(parts.groups, cell)]
    scored = [_standardised(np.tile(c, 2), column) for c in (cosine, inner)]
    with np.errstate(all="ignore"):  # nan for a kind without latents
        rate = (np.nan_to_num(wins) @ weight.T) / (np.isfinite(wins) @ weight.T)  # [deletion, kind]
        simulated = _simulated(fit, scored, draws, seed, signed).T @ (weight / weight.sum(axis=1, keepdims=True)).T
    there = 1 + np.flatnonzero(chosen[1:].any(axis=1))
    sizes = np.hstack([whole.present, parts.present]) @ (kind == np.arange(5)[:, None]).T
    found = [_win_rate(rate[:, k], simulated[:, k], sizes[:, k], int(chosen[k].sum())) for k in range(5)]
    fall, expected = (
        r[:, 0] - (r[:, there].mean(axis=1) if len(there) else np.full(len(r), np.nan)) for r in (rate, simulated)
    )
    return found[0], tuple(found[1:]), _win_rate(fall, expected, sizes[:, 0], found[0].n_latents)


def _win_rate(
    rate: Float[ndarray, "deletion"], simulated: Float[ndarray, "draw"], sizes: ndarray, n_latents: int
) -> BandedWinRate:
    """sizes: rows of each prompt."""
    observed = statistics.from_deletions(float(rate[0]), rate[1:][sizes > 0], sizes[sizes > 0])
    low, high = (float(end) for end in np.percentile(simulated, [2.5, 97.5]))
    known = bool(np.isfinite([observed.value, low, high]).all())
    return BandedWinRate(observed, low, high, low - 1e-9 <= observed.value <= high + 1e-9 if known else None, n_latents)


def _own_size(c: Float[ndarray, "row"], group: Int[ndarray, "row"]) -> Float[ndarray, "row"]:
    """In units of each group's root mean square: beside a latent with a million times their KL others would be constant."""
    i = np.unique(group, return_inverse=True)[1]
    size = np.sqrt(np.bincount(i, c * c) / np.bincount(i))[i]
    return np.divide(c, size, out=np.zeros_like(c), where=size > 0)


def _above(cosine: ndarray, inner: ndarray, signed: bool) -> ndarray:
    """Whether the first of two correlations (or of equal multiples of them) is the larger, in size or signed."""
    if not signed:
        cosine, inner = np.abs(cosine), np.abs(inner)
    return cosine - inner > (_TIE - 1) * np.abs(inner)


def _wins(w: GroupSums, signed: bool) -> Float[ndarray, "deletion group"]:
    """1 where |r(KL, cos)| > |r(KL, inner)| (signed: r > r), 0 where not, nan where one of them is not defined."""
    cosine, inner = (w.correlation("kl", name) for name in ("cosine", "inner"))
    return np.where(np.isfinite(cosine) & np.isfinite(inner), _above(cosine, inner, signed), np.nan)


def _standardised(c: Float[ndarray, "entry"], group: Int[ndarray, "entry"]) -> sparse.csr_matrix:
    """[group, row], entries all rows once for each kind of group: times KL [row] it is r(KL, c) × the spread of KL."""
    centred = _centred(c, group)
    size = np.sqrt(np.bincount(group, centred * centred))[group]
    unit = np.divide(centred, size, out=np.zeros_like(c), where=size > 0)
    return sparse.csr_matrix((unit, (group, np.arange(len(c)) % (len(c) // 2))))


def _simulated(
    fit: _Fit, scored: list[sparse.csr_matrix], draws: int, seed: int, signed: bool
) -> Float[ndarray, "group draw"]:
    """The wins of tables of KLs drawn from the fit at the rows' own cosines, norms, prompts and tokens."""
    rng, n = np.random.default_rng(seed), len(fit.expected)
    size = np.bincount(fit.latent)
    first, size = (np.cumsum(size) - size)[fit.latent, None], size[fit.latent, None]
    found = []
    for some in np.array_split(np.arange(draws), draws * n // _AT_ONCE + 1):
        of_latent = first + (rng.random((n, len(some))) * size).astype(int)
        kl = fit.expected[:, None] + fit.sd[2] * fit.rest[of_latent]
        for label, sd in ((fit.prompt, fit.sd[0]), (fit.token, fit.sd[1])):
            kl += rng.normal(scale=sd, size=(label.max() + 1, len(some)))[label]
        cosine, inner = (s @ np.exp(kl) for s in scored)
        found.append(_above(cosine, inner, signed).astype(float))
    return np.hstack(found)

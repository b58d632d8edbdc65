import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diagnostics.statistics.jackknife import p_value
from diagnostics.win_rate.simpson import _paradox, simpson
from interventions.errors import ResultError
from tests.simulations import MANY, agrees, simulation

FLOOR = 1e-12
FIT = {"draws": 1, "scores": ()}  # where nothing else is asked for


def table(rng, latents=60, tokens=40, prompts=20, b_c=2.0, b_n=0.0, sd_c=0.5, sd_n=0.2, corr=0.0,
          variances=(0.3, 0.0, 0.7), pool=20, uneven=0.0, norm_of_prompt=0.0):  # fmt: skip
    """Rows with log KL = α_latent + b_c log|cos| + b_n log‖x‖ + effects of prompt, of token and of the row alone.

    `tokens` of each latent out of pool·tokens; `corr` of log|cos| with log‖x‖; `uneven`: SD of the log of latents' noise.
    """
    row, latent = latents * tokens, np.repeat(np.arange(latents), tokens)
    prompt = rng.permutation(np.arange(pool * tokens) % prompts)
    z = norm_of_prompt**0.5 * rng.normal(size=prompts)[prompt]
    z += (1 - norm_of_prompt) ** 0.5 * rng.normal(size=len(prompt))
    token = np.concatenate([rng.permutation(len(prompt))[:tokens] for _ in range(latents)])
    log_cosine = sd_c * (corr * z[token] + (1 - corr**2) ** 0.5 * rng.normal(size=row))
    log_norm = sd_n * z[token]
    noise = [rng.normal(size=prompts)[prompt[token]], rng.normal(size=len(prompt))[token], rng.normal(size=row)]
    noise[2] *= np.exp(uneven * rng.normal(size=latents) - uneven**2)[latent]
    y = rng.normal(size=latents)[latent] + b_c * log_cosine + b_n * log_norm
    y += sum(v**0.5 * e for v, e in zip(variances, noise, strict=True))
    cosine, norm = 0.1 * np.exp(log_cosine) * rng.choice([-1, 1], size=row), 50 * np.exp(log_norm)
    return pd.DataFrame(
        {
            "latent": 3 * latent,
            "target_prompt": 2 * prompt[token],
            "target_position": token,
            "edit": "zero",
            "kl": 0.01 * np.exp(y),
            "cosine": cosine,
            "inner": cosine * norm,
            "activation": np.where(cosine > 0.05, cosine * norm, 0.0),
            "norm": norm,
            "norm_quartile": np.searchsorted(np.quantile(50 * np.exp(sd_n * z), [0.25, 0.5, 0.75]), norm, side="right"),
            "latent_weight": 1.0 + latent % 3,
        }
    )


def labels(found):
    return {name: one.label for name, one in found.scores.items()}


def test_reversal_is_found():
    """The effect falls with the cosine among tokens of one norm, and norm drives both up."""
    found = simpson(table(np.random.default_rng(0), b_c=-1.0, b_n=4.0, sd_c=0.3, sd_n=0.3, corr=0.7), FLOOR)
    one = found.scores["cosine"]
    assert one.label == "reversal" and one.opposite
    assert one.b_pool.low > 0 > one.b_in.high
    # Among all tokens log‖x‖ goes up by corr·sd_n/sd_c for one of log|cos|.
    assert one.b_pool.value == pytest.approx(-1 + 4 * 0.7, abs=0.15) and -1.2 < one.b_in.value < -0.6
    # The inner product's slope at one norm is the cosine's; in the pool all three change together.
    assert labels(found)["inner"] == "reversal"


def test_an_effect_of_the_norm_itself_is_confounded():
    """True exponent 1: the effect rises with the norm while the cosine falls; given the inner product the norm has no effect."""
    found = simpson(table(np.random.default_rng(1), b_n=2.0, corr=-0.3), FLOOR)
    one = found.scores["cosine"]
    assert one.label == "confounded" and one.differs and not one.opposite
    assert one.difference.value == pytest.approx(2 * -0.3 * 0.2 / 0.5, abs=0.08)
    assert one.difference.value == pytest.approx(one.b_pool.value - one.b_in.value, abs=1e-12)
    assert labels(found)["inner"] == "none" and not found.falls
    # A truth a = 0 turns it round, though log‖x‖ and log|cos| are independent: the inner product contains the norm.
    found = simpson(table(np.random.default_rng(2)), FLOOR)
    assert labels(found)["inner"] == "confounded" and not found.scores["cosine"].differs
    assert found.scores["inner"].difference.value == pytest.approx(-2 * 0.2**2 / (0.2**2 + 0.5**2), abs=0.08)


def test_pure_cosine_effect_is_labelled_range_restriction():
    """The published pattern, though the effect depends on the cosine alone at every norm."""
    rows = table(np.random.default_rng(3), latents=150, tokens=60, prompts=40, sd_n=0.3, corr=-0.3)
    found = simpson(rows, FLOOR)
    quartiles = [q.observed.value for q in found.quartiles]
    assert found.overall.observed.value > 0.8 and 0.5 < np.mean(quartiles) < 0.7
    assert found.falls and found.fall.observed.value == pytest.approx(found.overall.observed.value - np.mean(quartiles))
    assert found.inside_band == (True,) * 4 and found.overall.inside and found.fall.inside
    assert labels(found)["cosine"] == "range restriction"
    assert abs(found.norm_slope.value) < 0.5 and found.cosine_slope.value == pytest.approx(2, abs=0.1)


def test_misfit_is_not_labelled_range_restriction():
    """Within each quartile the inner product's eighth power acts, between quartiles the norm does not."""
    rows = table(np.random.default_rng(3), latents=150, tokens=60, prompts=40, sd_n=0.3)
    log_norm = np.log(rows.norm)
    rows["kl"] *= np.exp(6 * (log_norm - log_norm.groupby(rows.norm_quartile).transform("mean")))
    found = simpson(rows, FLOOR)
    assert found.falls and found.inside_band == (False,) * 4
    assert labels(found)["cosine"] == "none"


def dense(rows, score, dummies):
    """The slope by least squares with a column for each latent and of `dummies`, rows weighted by their latent."""
    columns = [np.log(rows[score].abs()), *pd.get_dummies(rows.latent).to_numpy(float).T, *dummies[:, rows.index]]
    root = np.sqrt(rows.latent_weight.to_numpy())
    return np.linalg.lstsq(np.column_stack(columns) * root[:, None], np.log(rows.kl) * root, rcond=None)[0][0]


@pytest.mark.parametrize("score", ["cosine", "inner", "activation"])
def test_slopes_match_dense_least_squares(score):
    rows = table(np.random.default_rng(5), latents=6, tokens=50, prompts=12, b_n=1.0, corr=0.4, pool=3)
    one = simpson(rows, FLOOR, draws=1).scores[score]
    rows = rows[rows[score] != 0].reset_index(drop=True)
    log_norm = np.log(rows.norm.to_numpy())
    above = log_norm >= np.quantile(log_norm, np.arange(1, 10) / 10)[:, None]
    deciles = np.array([above.sum(axis=0) == d for d in range(1, 10)], dtype=float)
    assert one.n_rows == len(rows) == one.b_in.n_rows and one.b_in.n_prompts == 12
    both = np.array([[dense(some, score, d) for d in (deciles[:0], deciles)] for some in
                     (rows, *(rows[rows.target_prompt != g] for g in rows.target_prompt.unique()))])  # fmt: skip
    theta = np.column_stack([both, both[:, 0] - both[:, 1]])
    se = np.sqrt(11 / 12 * ((theta[1:] - theta[1:].mean(axis=0)) ** 2).sum(axis=0))
    for k, got in enumerate((one.b_pool, one.b_in, one.difference)):
        assert (got.value, got.se) == pytest.approx((theta[0, k], se[k]), rel=1e-8)  # float64, conditions of about 1e3
    assert se[2] < 0.9 * np.hypot(se[0], se[1])  # joint deletions: the two are not independent


def brute_win_rate(rows, min_tokens, absolute=True):
    total = won = 0.0
    for _, own in rows.groupby("latent"):
        if len(own) >= min_tokens:
            cosine, inner = (own[c].abs() if absolute else own[c] for c in ("cosine", "inner"))
            r_c, r_i = (abs(np.corrcoef(own.kl, c)[0, 1]) for c in (cosine, inner))
            total, won = total + own.latent_weight.iloc[0], won + own.latent_weight.iloc[0] * (r_c > r_i)
    return won / total if total else np.nan


@pytest.mark.parametrize("absolute", [True, False])
def test_win_rates_by_hand(absolute):
    rows = table(np.random.default_rng(6), latents=30, tokens=36, prompts=15)
    found = simpson(rows, FLOOR, absolute=absolute, **FIT)
    parts = [rows[rows.norm_quartile == q] for q in range(4)]
    values = [brute_win_rate(some, 10, absolute) for some in (rows, *parts)]
    got = [found.overall, *found.quartiles]
    assert [g.observed.value for g in got] == pytest.approx(values, rel=1e-12)
    assert [g.n_latents for g in got] == [30, *((p.groupby("latent").size() >= 10).sum() for p in parts)]
    assert [g.observed.n_rows for g in got] == [len(rows), *(len(p) for p in parts)]
    without = [
        [brute_win_rate(some[some.target_prompt != g], 1, absolute) for g in rows.target_prompt.unique()]
        for some in (rows, *(p[p.groupby("latent").kl.transform("size") >= 10] for p in parts))
    ]
    se = np.sqrt(14 / 15 * ((np.array(without) - np.mean(without, axis=1, keepdims=True)) ** 2).sum(axis=1))
    assert [g.observed.se for g in got] == pytest.approx(se, rel=1e-9)
    fall = np.array(without[0]) - np.mean(without[1:], axis=0)
    assert found.fall.observed.se == pytest.approx(np.sqrt(14 / 15 * ((fall - fall.mean()) ** 2).sum()), rel=1e-9)


def test_equal_scores_do_not_win():
    """Where all norms are equal, cosine and inner product are one score up to rounding."""
    rows = table(np.random.default_rng(7), latents=20)
    first = rows.norm_quartile == 0
    rows.loc[first, "norm"] = 31.7
    rows["inner"] = rows.cosine * rows.norm
    found = simpson(rows, FLOOR, draws=50, scores=())
    one = found.quartiles[0]
    assert (one.observed.value, one.low, one.high, one.inside) == (0, 0, 0, True)
    assert found.quartiles[1].observed.value > 0


def test_latents_with_tiny_kls_have_correlations_too():
    """A latent whose KLs are a million times smaller than another's has correlations too."""
    rows = table(np.random.default_rng(8), latents=20)
    plain = simpson(rows, 0.0, draws=20, scores=())
    rows["kl"] *= 10.0 ** -(rows.latent / 3 % 2 * 9)
    scaled = simpson(rows, 0.0, draws=20, scores=())
    assert scaled.overall.n_latents == plain.overall.n_latents == 20
    assert [q.observed.value for q in scaled.quartiles] == [q.observed.value for q in plain.quartiles]
    assert [q.low for q in scaled.quartiles] == pytest.approx([q.low for q in plain.quartiles])


def test_without_noise_the_band_is_the_observed_rate():
    found = simpson(
        table(np.random.default_rng(9), latents=30, tokens=50, b_n=0.8, variances=(0, 0, 0)), FLOOR, draws=20
    )
    for rate in (found.overall, *found.quartiles, found.fall):
        assert rate.low == pytest.approx(rate.high) and rate.low == pytest.approx(rate.observed.value)
        assert rate.inside
    assert max(found.sd_prompt, found.sd_token, found.sd_rest) < 1e-9


@simulation
def test_planted_variance_components_are_recovered():
    rng, found, n = np.random.default_rng(10), [], 12 * MANY
    for _ in range(n):
        one = simpson(table(rng, tokens=30, pool=10, variances=(0.3, 0.4, 0.5), norm_of_prompt=0.3), FLOOR, **FIT)
        found.append([one.sd_prompt**2, one.sd_token**2, one.sd_rest**2])
    se = np.std(found, axis=0, ddof=1) / n**0.5
    assert (se < 0.2 / n**0.5).all()
    assert (np.abs(np.mean(found, axis=0) - [0.3, 0.4, 0.5]) < 3.5 * se).all()
    # Each token in one row: its effect is part of the rest.
    rows = table(rng, latents=20, variances=(0.3, 0.4, 0.5))
    rows["target_position"] = np.arange(len(rows))
    one = simpson(rows, FLOOR, **FIT)
    assert one.sd_token == 0 and one.sd_rest**2 == pytest.approx(0.9, abs=0.15)


@pytest.mark.parametrize("variances", [(0.8, 0, 0), (0, 0.8, 0), (0, 0, 0.8)])
def test_each_kind_of_noise_makes_the_band_wider(variances):
    """All latents share their tokens: noise of tokens moves all wins together, noise of single rows averages out."""
    found = simpson(table(np.random.default_rng(21), latents=80, pool=1, variances=variances), FLOOR, scores=())
    width = found.overall.high - found.overall.low
    assert 0.1 < width < 0.3 if variances[2] else width > 0.4


@simulation
@pytest.mark.parametrize("b_n", [0.0, 2.0])
def test_band_covers_win_rates_of_the_fitted_truth(b_n):
    """Prompts and tokens have effects, and the noise of latents differs: with one noise for all, the band would be too narrow."""
    rng, inside, n = np.random.default_rng(11), [], 12 * MANY
    for _ in range(n):
        rows = table(rng, latents=50, tokens=56, b_n=b_n, variances=(0.3, 0.3, 0.4), pool=6, uneven=0.7)
        found = simpson(rows, FLOOR, scores=())
        inside.append([found.overall.inside, found.fall.inside, *found.inside_band])
    overall, fall, *quartiles = np.mean(inside, axis=0)
    assert agrees(np.mean(quartiles), 0.93, 0.98, 4 * n)
    assert agrees(overall, 0.93, 1.0, n) and agrees(fall, 0.93, 1.0, n)


@simulation
@pytest.mark.parametrize(("score", "truth"), [("cosine", {"corr": 0.5}), ("inner", {"corr": 0.2, "b_n": 2.0})])
def test_confounding_label_has_nominal_false_positive_rate(score, truth):
    """With few prompts."""
    rng, found, n = np.random.default_rng(12), [], 60 * MANY
    for _ in range(n):
        rows = table(rng, latents=12, tokens=40, pool=10, prompts=22, **truth)
        one = _paradox(rows, score, FLOOR, False)  # what `simpson` returns of the score, without the win rates
        assert one.differs == (p_value(one.difference, 0) < 0.05)
        found.append(one.differs)
    assert agrees(np.mean(found), 0.03, 0.06, n)


def test_rows_left_out_are_counted():
    rows = table(np.random.default_rng(13), latents=10)
    floor = 2.0**-20
    rows["kl"] = rows.kl.clip(lower=11 * floor)
    rows.loc[0, "kl"] = np.nan
    rows.loc[1:3, "kl"] = 10 * floor
    rows.loc[4:5, ["cosine", "inner", "activation"]] = 0.0
    rows.loc[6, "norm"] = 0.0
    others = rows.assign(edit="placebo_token", kl=1.0)
    found = simpson(pd.concat([others, rows]), floor, draws=5)
    for name in ("cosine", "inner"):
        one = found.scores[name]
        assert (one.n_not_finite, one.n_below_floor, one.n_score_0, one.n_rows) == (2, 3, 2, len(rows) - 7)
    active = found.scores["activation"]
    assert active.n_score_0 == (rows.activation[7:] == 0).sum() + 2
    assert active.n_rows == (rows.activation[7:] != 0).sum()
    assert found.n_rows == len(rows) - 7 == found.overall.observed.n_rows
    assert simpson(pd.concat([others, rows]), floor, edit="placebo_token", **FIT).n_rows == len(rows) - 3


def test_score_with_too_few_rows_has_a_reason_not_a_label():
    rows = table(np.random.default_rng(14), latents=12, prompts=12)
    found = simpson(rows.assign(activation=np.nan), FLOOR, draws=5)
    assert found.scores["activation"] is None and found.scores["cosine"] is not None
    assert (
        f"0 latents and 0 effective prompts in the 0 of {len(rows)} rows left (n_not_finite {len(rows)}"
        in found.reasons["activation"]
    )
    few = rows.activation.where(rows.target_prompt < 18, 0.0)
    assert "effective prompts" in simpson(rows.assign(activation=few), FLOOR, draws=5).reasons["activation"]
    alone = rows.activation.where(rows.latent == 0, 0.0)
    assert "1 latents" in simpson(rows.assign(activation=alone), FLOOR, draws=5).reasons["activation"]
    level = simpson(rows.assign(activation=2.0), FLOOR, draws=5)
    assert level.scores["activation"] is None and "does not vary" in level.reasons["activation"]
    # Nine prompts: win rates and their bands, but no interval and no label.
    nine = simpson(rows[rows.target_prompt < 18], FLOOR, draws=20)
    assert list(nine.scores.values()) == [None] * 3 and set(nine.reasons) == {"cosine", "inner", "activation"}
    assert not nine.falls and np.isnan(nine.overall.observed.low) and nine.overall.low < nine.overall.high
    text = json.loads(json.dumps(nine.as_dict(), allow_nan=False))
    assert text["overall"]["observed"]["low"] is text["scores"]["cosine"] is None


def test_quartile_without_latents_is_undefined():
    rows = table(np.random.default_rng(15), latents=30, tokens=48)
    rows = rows[(rows.norm_quartile != 3) | (rows.groupby(["latent", "norm_quartile"]).cumcount() < 9)]
    found = simpson(rows, FLOOR, draws=20, scores=("cosine",))
    assert found.inside_band[3] is None and found.quartiles[3].n_latents == 0
    assert np.isnan([found.quartiles[3].observed.value, found.quartiles[3].low]).all()
    rest = [q.observed.value for q in found.quartiles[:3]]
    assert found.fall.observed.value == pytest.approx(found.overall.observed.value - np.mean(rest))
    assert simpson(rows, FLOOR, draws=20, scores=(), min_tokens=9).quartiles[3].n_latents > 0
    none = simpson(rows, FLOOR, draws=20, scores=(), min_tokens=49)
    assert none.overall.inside is None and not none.falls and np.isnan(none.fall.observed.value)


@settings(max_examples=5)
@given(seed=st.integers(0, 10**6))
def test_labels_and_bands_are_invariant_to_order_sign_and_scale(seed):
    rng = np.random.default_rng(seed)
    rows = table(rng, latents=8, tokens=48, prompts=12)
    found = simpson(rows, FLOOR, draws=20)
    turned = rows.sample(frac=1, random_state=seed % 100)
    turned = turned.assign(
        cosine=-turned.cosine,
        inner=-7 * turned.inner,
        norm=7 * turned.norm,
        kl=3 * turned.kl,
        latent_weight=5 * turned.latent_weight,
    )
    again = simpson(turned, 3 * FLOOR, draws=20)
    for a, b in zip(
        [found.overall, *found.quartiles, found.fall], [again.overall, *again.quartiles, again.fall], strict=True
    ):
        assert (a.observed.value, a.observed.se, a.low, a.high) == pytest.approx(
            (b.observed.value, b.observed.se, b.low, b.high), abs=1e-9, nan_ok=True
        )
    for name in ("cosine", "inner"):
        a, b = found.scores[name], again.scores[name]
        assert (a.b_pool.value, a.b_in.value, a.difference.se) == pytest.approx(
            (b.b_pool.value, b.b_in.value, b.difference.se), abs=1e-9
        )
    other = simpson(rows, FLOOR, draws=20, seed=1, scores=())
    assert replace(found.overall, low=0, high=0, inside=None) == replace(other.overall, low=0, high=0, inside=None)
    assert [q.low for q in found.quartiles] != [q.low for q in other.quartiles]


def test_invalid_arguments_raise():
    rows = table(np.random.default_rng(18), latents=8, prompts=12)
    with pytest.raises(ResultError, match="no score 'cos'; known: cosine, inner, activation"):
        simpson(rows, FLOOR, scores=("cos",))
    with pytest.raises(ResultError, match="no column 'activation'"):
        simpson(rows.drop(columns="activation"), FLOOR)
    with pytest.raises(ResultError, match="no row of edit 'zro'; there are: zero"):
        simpson(rows, FLOOR, edit="zro")
    with pytest.raises(ResultError, match="floor of -1"):
        simpson(rows, -1.0)
    with pytest.raises(ResultError, match="0 draws"):
        simpson(rows, FLOOR, draws=0)
    with pytest.raises(ResultError, match=r"none of 320 rows can be fitted .*n_below_floor': 320"):
        simpson(rows, 1e9)
    with pytest.raises(ResultError, match="nothing to fit"):
        simpson(rows.assign(norm=2.0), FLOOR)
    with pytest.raises(ResultError, match="norm_quartile has the values"):
        simpson(rows.assign(norm_quartile=rows.norm_quartile + 1), FLOOR)
    with pytest.raises(ResultError, match="latent_weight"):
        simpson(rows.assign(latent_weight=0.0), FLOOR)

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from diagnostics import statistics
from diagnostics.statistics.prevalence import error_in_common, false_discovery, share_below
from diagnostics.statistics.share_errors import pulled, sign_covariance
from diagnostics.win_rate import rates as module
from diagnostics.win_rate import rows as edit_rows
from diagnostics.win_rate.adversarial import adversarial_groups
from diagnostics.win_rate.rates import win_rates
from interventions.errors import ResultError
from tests.simulations import MANY, agrees, simulation

ROUNDING = {"rel": 1e-8, "abs": 1e-10}  # sums of products of order 1, and what a subtraction of two of them leaves
NAMES = ("cos", "inner", "activation", "norm")


def drawn(rng, shape, n_prompts, cos_power, norm_power, noise=1.0, clustered=0.3, spread=0.3):
    """Prompts, cosines, norms and KLs [latent, token]: log KL = powers of |cos| and ‖x‖ + effects of prompts + noise."""
    prompt = rng.integers(0, n_prompts, shape)
    cosine = (rng.beta(1.5, 6, shape) + 0.01) * rng.choice([-1, 1], shape)
    norm = np.exp(spread * (0.5**0.5 * rng.normal(size=n_prompts)[prompt] + 0.5**0.5 * rng.normal(size=shape)))
    own = np.take_along_axis(rng.normal(size=(shape[0], n_prompts)), prompt, axis=1)
    error = clustered**0.5 * own + (1 - clustered) ** 0.5 * rng.normal(size=shape)
    powers = (np.broadcast_to(p, shape[:1])[:, None] for p in (cos_power, norm_power))
    return prompt, cosine, norm, np.exp(sum(p * np.log(x) for p, x in zip(powers, (np.abs(cosine), norm), strict=True)) + noise * error)  # fmt: skip


def table(seed, n_latents=12, n_tokens=40, n_prompts=24, cos_power=1.0, norm_power=0.0, placebo=(0.0, 0.0), **more):
    """Rows of the main edit and two placebos of the same tokens."""
    rng, shape = np.random.default_rng(seed), (n_latents, n_tokens)
    prompt, cosine, norm, kl = drawn(rng, shape, n_prompts, cos_power, norm_power, **more)
    latent = np.repeat(3 * np.arange(n_latents) + 5, n_tokens)
    rows = pd.DataFrame({"latent": latent, "target_prompt": 2 * prompt.ravel()})
    rows["target_position"] = np.tile(np.arange(n_tokens), n_latents)
    rows = rows.assign(edit="zero", kl=kl.ravel(), cosine=cosine.ravel(), norm=10 * norm.ravel())
    rows["inner"] = rows.cosine * rows.norm
    rows["activation"] = np.maximum(rows.inner - 0.5, 0)
    rows["norm_quartile"] = pd.qcut(rows.norm, 4, labels=False)
    rows["delta_norm"] = rows.inner.abs()
    rows["latent_weight"] = 1.0 + latent % 4
    rows["token_weight"] = 1.0 + rows.target_position % 3
    every = [rows]
    for name in ("placebo_token", "placebo_isotropic"):
        error = np.exp(rng.normal(size=len(rows)))
        dose = rows.cosine.abs() ** placebo[0] * rows.norm ** placebo[1]
        every.append(rows.assign(edit=name, kl=1e-5 * dose * error))
    return pd.concat(every, ignore_index=True)


def deletions(rows):
    return [rows, *(rows[rows.target_prompt != g] for g in np.unique(rows.target_prompt))]


def margin(rows, absolute=True, signed=False):
    cosine, inner = (rows[c].abs() if absolute else rows[c] for c in ("cosine", "inner"))
    a, b = rows.kl.corr(cosine), rows.kl.corr(inner)
    return a - b if signed else abs(a) - abs(b)


@pytest.mark.parametrize(("absolute", "signed"), [(True, False), (False, False), (False, True)])
def test_rates_match_plain_correlations(absolute, signed):
    rows = table(0, n_latents=9)
    got = win_rates(rows, absolute=absolute, signed=signed)
    assert (got.absolute, got.signed, got.edit, got.predictors) == (absolute, signed, "zero", ("cosine", "inner"))
    assert list(got.placebos) == list(got.differences) == ["placebo_token", "placebo_isotropic"]
    weight = rows.groupby("latent").latent_weight.first()
    for edit, rates in (("zero", got.main), *got.placebos.items()):
        assert rates.edit == edit
        for q, rate in ((None, rates.overall), *enumerate(rates.quartiles)):
            some = rows[(rows.edit == edit) & ((rows.norm_quartile == q) if q is not None else True)]
            some = some.groupby("latent").filter(lambda own: len(own) >= 10)
            wins = some.groupby("latent").apply(margin, absolute, signed, include_groups=False) > 0
            w = weight[wins.index]
            assert rate.estimate.value == pytest.approx((wins * w).sum() / w.sum(), rel=1e-12)
            assert (rate.n_latents, rate.n_wins, rate.n_few) == (len(wins), wins.sum(), 9 - len(wins))
            assert (rate.estimate.n_rows, rate.n_constant) == (len(some), 0)
            exact = stats.binomtest(int(wins.sum()), len(wins)).proportion_ci(method="exact")
            assert rate.clopper_pearson_iid == pytest.approx((exact.low, exact.high), rel=1e-9)
    for name, difference in got.differences.items():
        assert difference.placebo == name and difference.overall.n_latents == 9
        expected = got.main.overall.estimate.value - got.placebos[name].overall.estimate.value
        assert difference.overall.estimate.value == pytest.approx(expected, abs=1e-12)
        assert difference.overall.p == statistics.p_value(difference.overall.estimate, 0.0)


def test_latent_margins_match_a_plain_jackknife():
    rows = table(1, n_latents=5, n_prompts=24)
    rows.loc[(rows.latent == 8) & (rows.target_prompt > 16), "kl"] = np.nan  # 9 prompts
    got = win_rates(rows)
    main = rows[(rows.edit == "zero") & rows.kl.notna()]
    assert got.n_not_finite == rows.kl.isna().sum() > 0
    assert list(got.latents.latent) == [5, 8, 11, 14, 17] and list(got.latents.latent_weight) == [2, 1, 4, 3, 2]
    for line in got.latents.itertuples():
        own = main[main.latent == line.latent]
        n_prompts = own.target_prompt.nunique()
        assert (line.n, line.n_prompts) == (len(own), n_prompts)
        for name, column in zip(NAMES, ("cosine", "inner", "activation", "norm"), strict=True):
            assert getattr(line, f"r_{name}") == pytest.approx(own.kl.corr(own[column].abs()), **ROUNDING)
            expected = stats.spearmanr(own.kl, own[column].abs()).statistic
            assert getattr(line, f"spearman_{name}") == pytest.approx(expected, **ROUNDING)
        sizes = own.groupby("target_prompt").size()
        effective = sizes.sum() ** 2 / (sizes**2).sum()
        values = np.array([margin(rest) for rest in deletions(own)])
        se = np.sqrt(((values[1:] - values[1:].mean()) ** 2).sum() * (n_prompts - 1) / n_prompts)
        assert line.margin == pytest.approx(values[0], **ROUNDING) and line.win == (values[0] > 0)
        p = 2 * stats.t.sf(abs(values[0]) / se, effective - 1)
        few = effective < 10
        assert few == (line.latent == 8)
        assert (line.margin_se, line.p) == pytest.approx((np.nan, np.nan) if few else (se, p), **ROUNDING, nan_ok=True)
    assert got.latents.q.to_numpy() == pytest.approx(false_discovery(got.latents.p.to_numpy()), nan_ok=True)
    assert (got.n_without_error, got.prevalence.n) == (1, 4)


def test_prevalence_includes_the_error_that_latents_share():
    rows = table(2, n_latents=12)
    got, main = win_rates(rows), rows[rows.edit == "zero"]
    values = np.array([rest.groupby("latent").apply(margin, include_groups=False) for rest in deletions(main)])
    se, w = got.latents.margin_se.to_numpy(), got.latents.latent_weight.to_numpy()
    common = error_in_common(-values, se, weights=w)
    expected = share_below(-values[0], se, 0.0, weights=w, shared_error=common)
    assert (got.prevalence.share, got.prevalence.low, got.prevalence.high) == pytest.approx(
        (expected.share, expected.low, expected.high), abs=1e-5
    )


def test_mean_correlations_are_jackknifed_with_new_ranks():
    rows = table(3, n_latents=4)
    rows["kl"] = rows.kl.where(rows.edit != "zero", rows.kl.round(2))  # ties
    got, main = win_rates(rows).mean_correlations, rows[rows.edit == "zero"]
    weight, ids = main.groupby("latent").latent_weight.first().to_numpy(), main.target_prompt.to_numpy()
    for kind in ("pearson", "spearman"):
        for name, column in zip(NAMES, ("cosine", "inner", "activation", "norm"), strict=True):

            def mean(keep, kind=kind, column=column):
                each = [own.kl.corr(own[column].abs(), method=kind) for _, own in main[keep].groupby("latent")]
                return np.average(each, weights=weight)

            expected = statistics.jackknife(mean, len(main), ids)
            for field in ("value", "low", "high", "se", "n_rows", "n_prompts"):
                assert getattr(got[kind][name], field) == pytest.approx(getattr(expected, field), **ROUNDING)


def test_swapped_predictors_swap_the_wins():
    rows = table(6, norm_power=0.5)
    one, other = win_rates(rows), win_rates(rows, predictors=("inner", "cosine"))
    for a, b in ((one.main, other.main), *zip(one.placebos.values(), other.placebos.values(), strict=True)):
        for x, y in zip((a.overall, *a.quartiles), (b.overall, *b.quartiles), strict=True):
            assert y.n_wins == x.n_latents - x.n_wins
            assert y.estimate.value == pytest.approx(1 - x.estimate.value, abs=1e-12)
            assert (y.estimate.low, y.estimate.high) == pytest.approx((1 - x.estimate.high, 1 - x.estimate.low), rel=1e-6)  # fmt: skip
    assert other.latents.margin.to_numpy() == pytest.approx(-one.latents.margin.to_numpy(), **ROUNDING)
    assert other.prevalence.share == pytest.approx(1 - one.prevalence.share, abs=1e-5)
    shuffled = win_rates(rows.sample(frac=1, random_state=0))
    assert shuffled.main.overall.estimate.se == pytest.approx(one.main.overall.estimate.se, rel=1e-6)
    assert shuffled.latents.to_numpy(float) == pytest.approx(one.latents.to_numpy(float), **ROUNDING)


def test_token_weights_act_as_repetitions():
    rows = table(7, n_latents=5)
    rows.loc[rows.latent == 8, "kl"] = rows.kl.round(1)  # ties
    got = win_rates(rows, token_weighted=True)
    repeated = rows.loc[rows.index.repeat(rows.token_weight.astype(int))].reset_index(drop=True)
    repeated["target_position"] = np.arange(len(repeated))
    plain = win_rates(repeated)
    columns = [f"{kind}_{name}" for kind in ("r", "spearman") for name in NAMES] + ["margin", "margin_se", "p"]
    assert got.latents[columns].to_numpy() == pytest.approx(plain.latents[columns].to_numpy(), **ROUNDING)
    assert got.main.overall.estimate.se == pytest.approx(plain.main.overall.estimate.se, rel=1e-6)
    assert (got.token_weighted, plain.token_weighted) == (True, False)
    assert list(got.latents.n) == [40] * 5
    assert got.latents.r_cos[0] != pytest.approx(win_rates(rows).latents.r_cos[0], rel=1e-3)


@pytest.mark.parametrize(("norm_power", "near"), [(0.0, 1.0), (1.0, 0.0)])
def test_many_tokens_recover_the_true_rates(norm_power, near):
    got = win_rates(table(8, n_latents=20, n_tokens=400, norm_power=norm_power, noise=0.5, spread=0.5))
    assert got.main.overall.estimate.value == pytest.approx(near, abs=0.051)
    assert got.prevalence.share == pytest.approx(near, abs=0.05)
    means = got.mean_correlations["spearman"]
    first, second = ("cos", "inner") if near else ("inner", "cos")
    assert means[first].low > means[second].high


def test_placebo_as_main_edit_gives_the_placebo_rates():
    rows = table(10, placebo=(1.0, 1.0))
    other = rows[rows.edit == "placebo_token"]
    same = pd.concat([other.assign(edit="zero"), rows[rows.edit != "zero"]])
    got = win_rates(same)
    found, expected = got.main, got.placebos["placebo_token"]
    for one, other in zip((found.overall, *found.quartiles), (expected.overall, *expected.quartiles), strict=True):
        numbers = [list(vars(x.estimate).values()) for x in (one, other)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-9, nan_ok=True)
        assert dataclasses.replace(one, estimate=other.estimate) == other
    zero = got.differences["placebo_token"].overall
    assert zero.estimate.value == pytest.approx(0, abs=1e-12) and zero.n_latents == 12
    assert zero.estimate.se < 1e-4  # the rounding of a ρ of 1
    direct = win_rates(rows, edit="placebo_token")
    assert direct.main.overall.estimate == got.main.overall.estimate and list(direct.placebos) == ["placebo_isotropic"]
    assert got.differences["placebo_isotropic"].overall.estimate.value == pytest.approx(
        direct.differences["placebo_isotropic"].overall.estimate.value, abs=1e-12
    )
    plain = win_rates(table(10, placebo=(1.0, 1.0), n_tokens=120)).differences["placebo_token"].overall
    assert plain.p < 0.05 and plain.p == pytest.approx(statistics.p_value(plain.estimate, 0.0))


def test_sign_covariance_matches_scipy_for_normal_margins():
    rng = np.random.default_rng(11)
    here = rng.random((20, 4)) < 0.8
    steps = np.where(here, rng.normal(size=(20, 4)) + rng.normal(size=(20, 1)), 0.0)
    margins = np.vstack([[0.3, -4.0, 7.0, 0.0], np.array([0.3, -4.0, 7.0, 0.0]) + steps])
    got = sign_covariance(margins, here.astype(int), np.arange(4))
    count = here.sum(axis=0)
    centred = np.where(here, margins[1:] - (np.where(here, margins[1:], 0).sum(axis=0) / count), 0)
    centred *= np.sqrt((count - 1) / count)
    covariance = centred.T @ centred
    se = np.sqrt(np.diag(covariance))
    assert se == pytest.approx([np.sqrt((c - 1) ** 2 / c) * margins[1:, i][here[:, i]].std(ddof=1) for i, c in enumerate(count)])  # fmt: skip
    z, rho = margins[0] / se, covariance / np.outer(se, se)
    for i in range(4):
        assert got[i, i] == pytest.approx(stats.norm.cdf(z[i]) * stats.norm.sf(z[i]), rel=1e-9)
        for j in range(i):
            both = stats.multivariate_normal.cdf(z[[i, j]], cov=[[1, rho[i, j]], [rho[i, j], 1]])
            product = stats.norm.cdf(z[i]) * stats.norm.cdf(z[j])
            assert got[i, j] == got[j, i] == pytest.approx(both - product, abs=1e-7)
    margins[3, 1] = np.nan  # a margin that a deletion leaves undefined: a fair coin of its own
    here[2, 1] = True
    got = sign_covariance(margins, here.astype(int), np.arange(4))
    assert got[1] == pytest.approx([0, 0.25, 0, 0], abs=1e-12)


def test_margins_are_shrunk_by_the_variance_of_their_errors():
    z = np.random.default_rng(12).normal(1, 3, 50)
    found = pulled(z)
    assert (found.mean(), found.var(ddof=1)) == pytest.approx((z.mean(), z.var(ddof=1) - 1))
    assert (np.argsort(found) == np.argsort(z)).all()
    assert pulled(0.5 * z / z.std()) == pytest.approx(0.5 * (z / z.std()).mean())
    assert (pulled(z[:1]) == z[:1]).all() and len(pulled(z[:0])) == 0


def replications(n_prompts, number, n_latents=20, n_tokens=30, cos_power=0.0, norm_power=0.0):
    """Rates of main edit and placebo and their difference, KLs of both from one distribution unless powers are given."""
    rng, shape = np.random.default_rng(n_prompts), (n_latents, n_tokens)
    rates, differences = [], []
    latent, edit = np.tile(np.repeat(np.arange(n_latents), n_tokens), 2), np.repeat([0, 1], n_latents * n_tokens)
    for _ in range(number):
        prompt, cosine, norm, kl = (x.ravel() for x in drawn(rng, shape, n_prompts, cos_power, norm_power))
        own = rng.normal(size=(n_latents, n_prompts))[latent[edit == 0], prompt]
        other = np.exp(0.3**0.5 * own + 0.7**0.5 * rng.normal(size=len(kl)))
        columns = {
            "kl": np.r_[kl, other],
            "cos": np.tile(np.abs(cosine), 2),
            "inner": np.tile(np.abs(cosine * norm), 2),
        }
        some = edit_rows.EditRows(pd.DataFrame(), ["zero", "placebo_token"], edit, np.arange(n_latents), latent,
                            np.ones(n_latents), np.tile(prompt, 2), 0)  # fmt: skip
        one = np.zeros(len(latent), dtype=int)
        cells = module._cells(columns, one, some, one + 1.0, False, 10)
        (main, _), (difference,) = module._rates(cells, 0, some)
        rates.append((main.estimate.value, main.estimate.low, main.estimate.high, main.estimate.se))
        differences.append(difference.p)
    return np.array(rates).T, np.array(differences)


@simulation
@pytest.mark.parametrize("n_prompts", [20, 40])
def test_win_rate_tests_have_nominal_size_and_coverage(n_prompts):
    """Log-normal KLs with .3 of their logarithm's variance between prompts."""
    n = 60 * MANY
    (value, low, high, se), p = replications(n_prompts, n)
    assert agrees((p < 0.05).mean(), 0.03, 0.06, n)
    assert agrees(((low <= value.mean()) & (value.mean() <= high)).mean(), 0.94, 0.99, n)
    assert np.sqrt((se**2).mean()) == pytest.approx(value.std(), rel=0.05 + 2 / n**0.5)
    if n_prompts == 20:  # a rate far from a half
        (value, low, high, _), p = replications(20, n, n_tokens=60, cos_power=2.0)
        assert 0.7 < value.mean() < 0.95 and (p < 0.05).mean() > 0.3
        assert agrees(((low <= value.mean()) & (value.mean() <= high)).mean(), 0.94, 1.0, n)


def test_excluded_latents_are_counted():
    rows = table(13, n_latents=6)
    main = rows.edit == "zero"
    rows = rows[~(main & (rows.latent == 5) & (rows.target_position >= 9))]
    rows.loc[rows.latent == 8, "kl"] = 1e-3  # one KL, whatever the edit
    rows.loc[rows.latent == 11, "norm"] = 7.0
    rows["inner"] = rows.cosine * rows.norm
    got = win_rates(rows)
    overall, placebo = got.main.overall, got.placebos["placebo_token"].overall
    assert (overall.n_latents, overall.n_few, overall.n_constant) == (3, 1, 2)
    assert (placebo.n_latents, placebo.n_few, placebo.n_constant) == (4, 0, 2)
    assert list(got.latents.latent) == [14, 17, 20] and got.differences["placebo_token"].overall.n_latents == 3
    for rate in got.main.quartiles:
        assert rate.n_latents + rate.n_few + rate.n_constant == 6
    nobody = win_rates(rows, min_tokens=1000)
    assert nobody.main.overall.n_few == 6 and len(nobody.latents) == 0 and nobody.prevalence.n == 0
    assert np.isnan([nobody.main.overall.estimate.value, nobody.differences["placebo_token"].overall.p]).all()
    assert json.loads(json.dumps(nobody.as_dict(), allow_nan=False))["main"]["overall"]["clopper_pearson_iid"] == [None, None]  # fmt: skip
    few = win_rates(table(14, n_latents=6, n_prompts=9))
    assert np.isnan([few.main.overall.estimate.low, few.differences["placebo_token"].overall.p]).all()
    assert 0 <= few.main.overall.estimate.value <= 1 and few.n_without_error == 6


@pytest.mark.parametrize("compute", [win_rates, adversarial_groups])
def test_invalid_rows_raise(compute):
    rows = table(16, n_latents=3)
    with pytest.raises(ResultError, match=r"no column \['norm'\]"):
        compute(rows.drop(columns="norm"))
    with pytest.raises(ResultError, match="no row of the edit 'half'; known: "):
        compute(rows, edit="half")
    with pytest.raises(ResultError, match="two rows of one edit and token"):
        compute(pd.concat([rows, rows]))
    with pytest.raises(ResultError, match="no row of the edit 'zero' has finite"):
        compute(rows.assign(kl=rows.kl.where(rows.edit != "zero")))
    with pytest.raises(ResultError, match="a latent_weight is not above 0"):
        compute(rows.assign(latent_weight=0.0))
    if compute is win_rates:
        with pytest.raises(ResultError, match="expected two columns"):
            win_rates(rows, predictors=("cosine",))
        with pytest.raises(ResultError, match="expected 0, 1, 2, 3"):
            win_rates(rows.assign(norm_quartile=1 + rows.norm_quartile))


def split(rows):
    """The rows of the two groups."""
    main = rows[rows.edit == "zero"]
    cosine, norm = rows.cosine.abs(), rows.norm
    high = cosine > rows.latent.map(main.assign(c=main.cosine.abs()).groupby("latent").c.median())
    long = norm > rows.latent.map(main.groupby("latent").norm.median())
    return rows[high & ~long], rows[~high & long]


def test_adversarial_groups_by_plain_jackknife():
    rows = table(17, n_latents=8, n_tokens=60, placebo=(1.0, 1.0))
    got, (first, second) = adversarial_groups(rows), split(rows)
    main, weight = rows[rows.edit == "zero"], rows.groupby("latent").latent_weight.first()
    count = pd.concat([first, second]).query("edit == 'zero'").groupby("latent").size()
    assert got.n_rows == ((first.edit == "zero").sum(), (second.edit == "zero").sum()) and got.n_latents == 8

    def ratio(edit, column="kl"):
        def at(dropped):
            means = []
            for group in (first, second):
                own = group[(group.edit == edit) & (group.target_prompt != dropped)]
                w = own.latent.map(weight / count)
                means.append((w * own[column]).sum() / w.sum())
            return means[0] / means[1]

        return np.array([at(-1), *(at(g) for g in np.unique(rows.target_prompt))])

    def same(estimate, values):
        inside = pd.concat([first, second]).query("edit == 'zero'").groupby("target_prompt").size()
        expected = statistics.from_deletions(values[0], values[1:], inside.to_numpy(), transform="log")
        for field in ("value", "low", "high", "se", "n_rows", "n_prompts", "n_effective"):
            assert getattr(estimate, field) == pytest.approx(getattr(expected, field), **ROUNDING)

    same(got.kl_ratio, ratio("zero"))
    same(got.dose_ratio, ratio("zero", "delta_norm"))
    for name in ("placebo_token", "placebo_isotropic"):
        same(got.placebo_kl_ratios[name], ratio(name))
        same(got.over_placebos[name], ratio("zero") / ratio(name))
        assert got.over_placebos_p[name] == statistics.p_value(got.over_placebos[name], 1.0, "log")
    means = [group[group.edit == "zero"].groupby("latent").kl.mean() for group in (first, second)]
    wins = means[0] > means[1]
    assert got.share.value == pytest.approx((wins * weight).sum() / weight.sum()) and got.n_larger == wins.sum()
    assert 0 < got.share.se < 0.3 and len(main) == 480


@pytest.mark.filterwarnings("ignore:an interval from")
def test_adversarial_groups_need_tokens_in_both_groups():
    rows = table(20, n_latents=4)
    rows = rows[~((rows.latent == 5) & (rows.target_position >= 9))]
    rows.loc[rows.latent == 8, "norm"] = 1.0  # nothing above the median
    got = adversarial_groups(rows)
    assert (got.n_latents, got.n_left_out) == (2, 2)
    none = adversarial_groups(rows, min_tokens=1000)
    assert none.n_latents == 0 and np.isnan([none.share.value, none.kl_ratio.value]).all()
    assert np.isnan(none.over_placebos_p["placebo_token"])

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from diagnostics.projections import norm_exponent
from diagnostics.projections.norm_exponent import interventional, observational
from diagnostics.statistics.poisson_regression import poisson_slopes
from diagnostics.statistics.prevalence import share_below
from diagnostics.statistics.within_groups import GroupSums, ratio_from_deletions
from interventions.errors import ResultError
from tests.simulations import MANY, agrees, simulation


def regressors(rng, n_latents, n_tokens, n_prompts):
    """log ‖x‖, in part the prompt's, and log |cos|, the smaller the longer x is (correlation −.4)."""
    n = n_latents * n_tokens
    prompt = rng.integers(0, n_prompts, n)
    z = np.sqrt(0.3) * rng.normal(size=n_prompts)[prompt] + np.sqrt(0.7) * rng.normal(size=n)
    norm = 3 + 0.25 * z
    cosine = np.minimum(-2.3 + 0.6 * (-0.4 * z + np.sqrt(0.84) * rng.normal(size=n)), -0.01)
    return np.repeat(np.arange(n_latents), n_tokens), prompt, norm, cosine


def table(rng, beta_cosine, beta_norm, *, latents=12, tokens=60, prompts=40, noise=1.0):
    """`zero` rows whose log KL has the given slopes (one for all or one a latent), intercepts of the latents, and noise
    of which .3 is the prompt's."""
    latent, prompt, norm, cosine = regressors(rng, latents, tokens, prompts)
    z = np.sqrt(0.3) * rng.normal(size=prompts)[prompt] + np.sqrt(0.7) * rng.normal(size=len(latent))
    slope_c, slope_n = (np.broadcast_to(b, latents)[latent] for b in (beta_cosine, beta_norm))
    log_kl = rng.normal(size=latents)[latent] + slope_c * cosine + slope_n * (norm - 3) + noise * z
    return pd.DataFrame(
        {
            "latent": 7 * latent,
            "target_prompt": prompt,
            "target_position": np.arange(len(latent)),
            "edit": "zero",
            "kl": np.exp(log_kl),
            "cosine": np.exp(cosine) * rng.choice([-1, 1], len(latent)),
            "norm": np.exp(norm),
            "clean_entropy": rng.gamma(2, size=len(latent)),
            "latent_weight": rng.choice([1.0, 3.0, 9.0], latents)[latent],
        }
    )


def holds(interval, truth):
    inside = interval.low <= truth <= interval.high
    return {"bounded": inside, "exclusive": not interval.low < truth < interval.high, "everything": True}[interval.kind]


def same(a, b, **tolerance):
    assert (a.kind, a.n_prompts) == (b.kind, b.n_prompts)
    assert (a.value, a.low, a.high) == pytest.approx((b.value, b.low, b.high), **tolerance)


def agrees_with(found, truth, weakest):
    """Whether a is covered, found without bias, and alone accepted of the two hypotheses that are not true."""
    rejected = np.mean([(got.p_cosine < 0.05, got.p_inner < 0.05) for got in found], axis=0)
    for share_rejected, null in zip(rejected, (0.0, 1.0), strict=True):
        size = agrees(share_rejected, 0.03, 0.06, len(found))
        assert size if truth == null else share_rejected > weakest
    a = [got.a.value for got in found]
    assert np.median(a) == pytest.approx(
        truth, abs=5 * np.std(a) / len(a) ** 0.5
    )  # 4 standard errors of a normal's median
    return [holds(got.a, truth) for got in found]


@simulation
@pytest.mark.parametrize("prompts", [20, 40])
def test_planted_exponents_are_covered(prompts):
    rng, covered, poisson, n = np.random.default_rng(prompts), [], [], 8 * MANY
    for truth in (0.0, 0.5, 1.0):
        found = [observational(table(rng, 2.0, 2 * truth, prompts=prompts), 0.0, covariates=False) for _ in range(n)]
        assert all(got.identified for got in found)
        covered += agrees_with(found, truth, 0.6)
        poisson += [holds(got.poisson, truth) for got in found]
    assert agrees(np.mean(covered), 0.94, 0.96, 3 * n)
    assert agrees(np.mean(poisson), 0.94, 0.97, 3 * n)


@simulation
def test_null_slopes_keep_nominal_size_and_coverage(monkeypatch):
    """β_c = β_n = 0: any a is covered at the nominal rate."""
    # Not asked for here, and most of the time.
    nothing = share_below(np.zeros(0), np.zeros(0), 0.0)
    monkeypatch.setattr(norm_exponent, "poisson_slopes", lambda *_: np.full((21, 2), np.nan))
    monkeypatch.setattr(norm_exponent, "_half", lambda *_: (nothing, 0, 0))
    rng, n = np.random.default_rng(120), 60 * MANY
    found = [observational(table(rng, 0.0, 0.0, prompts=20), 0.0, covariates=False) for _ in range(n)]
    for truth in (0.0, 0.5, 1.0):
        assert agrees(np.mean([holds(got.a, truth) for got in found]), 0.94, 0.96, n)
    for p in ([got.p_cosine for got in found], [got.p_inner for got in found]):
        assert agrees(np.mean(np.array(p) < 0.05), 0.04, 0.06, n)
    assert agrees(np.mean([got.identified for got in found]), 0.04, 0.07, n)


def test_standard_errors_do_not_depend_on_the_planted_slopes():
    """So coverage at one truth is coverage at all of them."""
    rows = table(np.random.default_rng(0), 0.0, 0.0)
    moved = rows.assign(kl=rows.kl * np.abs(rows.cosine) ** 2 * rows.norm)
    plain, got = observational(rows, 0.0), observational(moved, 0.0)
    assert got.beta_cosine.value == pytest.approx(plain.beta_cosine.value + 2)
    assert got.beta_norm.value == pytest.approx(plain.beta_norm.value + 1)
    assert (got.beta_cosine.se, got.beta_norm.se) == pytest.approx((plain.beta_cosine.se, plain.beta_norm.se))
    turned = observational(rows.assign(kl=5 * rows.kl, cosine=-rows.cosine, norm=rows.norm / 100), 0.0)
    same(turned.a, plain.a)
    same(turned.poisson, plain.poisson, rel=1e-6)


def dense(rows, columns):
    """Least squares with an indicator of each latent, rows weighted by their latent."""
    latents = np.unique(rows.latent)
    design = np.column_stack([*columns(rows), *(rows.latent == i for i in latents)])
    root = np.sqrt(rows.latent_weight.to_numpy())
    return np.linalg.lstsq(design * root[:, None], np.log(rows.kl.to_numpy()) * root, rcond=None)[0]


def test_fits_match_least_squares_with_latent_indicators():
    rows = table(np.random.default_rng(1), 2.0, 1.0, latents=5, tokens=40, prompts=20)
    scores = lambda r: (np.log(r.norm), np.log(np.abs(r.cosine)))  # noqa: E731
    more = lambda r: (*scores(r), r.clean_entropy, np.log1p(r.target_position))  # noqa: E731
    got = observational(rows, 0.0)
    without = [rows[rows.target_prompt != g] for g in range(20)]
    theta = np.array([dense(some, scores)[:2] for some in (rows, *without)])
    assert (got.beta_norm.value, got.beta_cosine.value) == pytest.approx(tuple(theta[0]))
    errors = np.sqrt(19 / 20 * ((theta[1:] - theta[1:].mean(axis=0)) ** 2).sum(axis=0))
    assert (got.beta_norm.se, got.beta_cosine.se) == pytest.approx(tuple(errors))
    sizes = rows.groupby("target_prompt").size().to_numpy()
    df = sizes.sum() ** 2 / (sizes**2).sum() - 1
    same(got.a, ratio_from_deletions(theta[:, 0], theta[:, 1], sizes))
    assert got.p_cosine == pytest.approx(2 * stats.t.sf(abs(theta[0, 0]) / errors[0], df))
    difference = theta[:, 0] - theta[:, 1]
    error = np.sqrt(19 / 20 * ((difference[1:] - difference[1:].mean()) ** 2).sum())
    assert got.p_inner == pytest.approx(2 * stats.t.sf(abs(difference[0]) / error, df))
    adjusted = np.array([dense(some, more)[:2] for some in (rows, *without)])
    assert got.with_covariates is not None
    same(got.with_covariates, ratio_from_deletions(adjusted[:, 0], adjusted[:, 1], sizes))
    assert observational(rows, 0.0, covariates=False).with_covariates is None


def test_a_covariate_that_does_not_vary_is_left_out():
    """For example positions in a context of one token."""
    rows = table(np.random.default_rng(2), 2.0, 1.0).assign(target_position=0)
    rows["target_prompt"] = np.tile(np.arange(60), 12)
    rows["clean_entropy"] = 0.1 + rows.latent / 7  # rounding within a latent
    got = observational(rows, 0.0)
    assert got.with_covariates == got.a and got.identified


def poisson(rows, weight):
    """Newton's method on all coefficients, the latents' intercepts among them."""
    y = np.maximum(rows.kl.to_numpy(), 0)
    latents = [i for i in np.unique(rows.latent) if y[rows.latent == i].any()]
    x = np.column_stack([np.log(rows.norm) - 3, np.log(np.abs(rows.cosine)), *(rows.latent == i for i in latents)])
    keep = np.isin(rows.latent, latents)
    x, y, w = x[keep].astype(float), y[keep], weight[rows.latent[keep]].to_numpy()
    b = np.r_[0, 0, np.full(len(latents), np.log(y.mean()))]
    for _ in range(100):
        m = w * np.exp(x @ b)
        b = b + np.linalg.solve(x.T @ (m[:, None] * x), x.T @ (w * y - m))
    assert np.abs(x.T @ (w * y - w * np.exp(x @ b))).max() < 1e-9 * (w * y).sum()
    return b[:2]


def test_poisson_matches_a_full_fit_and_its_deletions():
    rows = table(np.random.default_rng(3), 2.0, 1.0, latents=6, tokens=25, prompts=16)
    rows.loc[rows.latent == 7, "target_prompt"] = 3  # a latent that leaves with its prompt
    rows.loc[rows.latent == 14, "kl"] = 0.0  # one without any effect
    rows.loc[rows.index[::9], "kl"] = -1e-9  # rounding
    weight = rows.groupby("latent").latent_weight.first()
    x = np.column_stack([np.log(rows.norm), np.log(np.abs(rows.cosine))])
    got = poisson_slopes(
        np.maximum(rows.kl.to_numpy(), 0), x, rows.latent.to_numpy(), rows.target_prompt.to_numpy(), weight
    )
    wanted = np.array([poisson(rows[rows.target_prompt != g], weight) for g in (-1, *range(16))])
    assert got == pytest.approx(wanted, rel=1e-7)
    # Rows below the floor enter, and the logarithm's fit drops them.
    floor = float(rows.kl.median()) / 10
    result = observational(rows, floor, covariates=False)
    same(
        result.poisson,
        ratio_from_deletions(wanted[:, 0], wanted[:, 1], rows.groupby("target_prompt").size().to_numpy()),
        rel=1e-6,
    )
    assert (result.poisson.n_rows, result.n_rows) == (150, (rows.kl > 10 * floor).sum())


def test_poisson_slopes_that_are_not_determined_are_nan():
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(60, 2)), rng.gamma(1, size=60)
    group, prompt, weight = np.repeat([0, 1], 30), np.tile(np.arange(15), 4), pd.Series([1.0, 1.0])
    ask = lambda y, x: poisson_slopes(y, x, group, prompt, weight)  # noqa: E731
    assert np.isfinite(ask(y, x)).all() and ask(y, x).shape == (16, 2)
    assert np.isnan(ask(0 * y, x)).all()
    assert np.isnan(ask(y, np.column_stack([x[:, 0], 0.1 + 0.2 * group]))).all()
    assert np.isnan(ask(y, np.column_stack([x[:, 0], 3 * x[:, 0] + group]))).all()
    steep = np.where(x[:, 0] == np.repeat([x[:30, 0].max(), x[30:, 0].max()], 30), y, 0)
    assert np.isnan(ask(steep, x[:, :1])[0]).all()  # all of it at the largest x: no finite maximum
    only = np.where(prompt == 3, y, 0)  # without prompt 3 there is nothing left
    assert (np.isnan(ask(only, x[:, :1])[:, 0]) == (np.arange(16) == 4)).all()


@simulation
def test_share_of_cosine_like_latents_is_recovered():
    """θ = β_n − β_c/2 ~ N(.5, 1), so Φ(−.5) = .31 of the latents."""
    rng, found, n = np.random.default_rng(5), [], 6 * MANY
    for _ in range(n):
        rows = table(rng, 2.0, 1.5 + rng.normal(size=80), latents=80, tokens=80, noise=0.7)
        found.append(observational(rows, 0.0, covariates=False).share_below_half)
    truth = stats.norm.cdf(-0.5)
    assert np.median([got.share for got in found]) == pytest.approx(truth, abs=0.06)
    assert agrees(np.mean([got.low <= truth <= got.high for got in found]), 0.93, 0.97, n)
    assert all(got.n == 80 and 35 < got.n_effective < 70 for got in found)


def test_reversed_and_errorless_latents_are_counted():
    rng = np.random.default_rng(7)
    rows = table(rng, np.repeat([2.0, -2.0], [15, 5]), 1.0, latents=20, tokens=80, noise=0.3)
    few = rows.latent.isin([0, 7])
    rows.loc[few, "target_prompt"] = rows.target_prompt[few] % 9
    got = observational(rows, 0.0)
    assert (got.n_latents, got.n_without_error, got.n_reversed, got.share_below_half.n) == (20, 2, 5, 18)


def test_rows_below_the_floor_and_unusable_rows_are_counted():
    rows = table(np.random.default_rng(8), 2.0, 1.0)
    rows.loc[rows.index[:4], "cosine"] = [0.0, np.nan, 0.3, 0.3]
    rows.loc[rows.index[2:4], "kl"] = [np.nan, -1e-3]
    floor = float(np.nanquantile(rows.kl, 0.25)) / 10
    got = observational(rows, floor)
    usable = rows.iloc[3:]
    below = (usable.kl <= 10 * floor).sum()
    assert got.n_unusable == 3 and got.n_below_floor == below > 150
    assert got.n_rows == len(rows) - 3 - below
    assert got.share_below_floor == pytest.approx(below / (len(rows) - 3))
    kept = usable[usable.kl > 10 * floor]
    same(observational(kept, 0.0).a, got.a)
    assert got.a.value == pytest.approx(0.5, abs=0.35) and got.beta_cosine.value < 1.9  # both slopes are flattened


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("encoder", [False, True])
def test_each_score_reads_its_own_columns(centred, encoder):
    rows = table(np.random.default_rng(9), 2.0, 1.0)
    wanted = observational(rows, 0.0)
    cosine = "cosine" + "_encoder" * encoder + "_centred" * centred
    norm = "norm_centred" if centred else "norm"
    other = rows.rename(columns={"cosine": cosine, "norm": norm})
    assert observational(other, 0.0, centred=centred, encoder=encoder) == wanted
    if encoder:
        with pytest.raises(ResultError, match="no encoder; give encoder=False"):
            observational(other.assign(**{cosine: np.nan}), 0.0, centred=centred, encoder=True)


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), a=st.sampled_from([0.0, 0.5, 1.0]))
def test_scores_have_equal_partial_correlations_given_norm(seed, a):
    """log|inner| = log|cos| + log‖x‖: partial correlations given log‖x‖ are equal, whatever the truth is."""
    rows = table(np.random.default_rng(seed), 2.0, 2 * a, latents=3, tokens=30, prompts=10)
    log = {"kl": np.log(rows.kl), "cosine": np.log(np.abs(rows.cosine)), "norm": np.log(rows.norm)}
    log["inner"] = log["cosine"] + log["norm"]
    within = GroupSums.of(log, rows.latent, rows.target_prompt)

    def partial(score):
        at = [within.names.index(name) for name in ("kl", score, "norm")]
        inverse = np.linalg.inv(within.products[0][:, at][:, :, at])
        return -inverse[:, 0, 1] / np.sqrt(inverse[:, 0, 0] * inverse[:, 1, 1])

    assert partial("inner") == pytest.approx(partial("cosine"), abs=1e-9)
    assert np.abs(within.correlation("kl", "inner") - within.correlation("kl", "cosine"))[0].max() > 1e-3
    # What differs is the norm's slope, by just the score's: the same exponent in another parametrisation.
    by_cosine, by_inner = within.slopes("kl", ["cosine", "norm"]), within.slopes("kl", ["inner", "norm"])
    assert by_inner[:, 0] == pytest.approx(by_cosine[:, 0])
    assert by_inner[:, 1] == pytest.approx(by_cosine[:, 1] - by_cosine[:, 0])


STEPS = (("zero", 1.0, 1.0), ("half", 1.0, 0.5), ("scaled", 0.9, 1.0), ("scaled", 1.1, 1.0))


def scaled(effect, latent, prompt, weight=None):
    """The four rows of each token: effect(s, λ) [token]."""
    token = {"latent": latent, "target_prompt": prompt, "target_position": np.arange(len(latent))}
    token["latent_weight"] = np.ones(len(latent)) if weight is None else weight[latent]
    parts = [{**token, "edit": e, "scale": s, "removed": r, "kl": effect(s, r)} for e, s, r in STEPS]
    return pd.concat([pd.DataFrame(part) for part in parts], ignore_index=True)


def tokens(rng, latents=10, n=40, prompts=20):
    latent = np.repeat(np.arange(latents), n)
    return latent, rng.integers(0, prompts, len(latent)), np.exp(rng.normal(size=len(latent)))


def test_inner_product_has_exponent_1_and_cosine_0():
    latent, prompt, c = tokens(np.random.default_rng(10))
    power = 1.5 + 0.5 * (latent % 3)  # whatever the power
    inner = interventional(scaled(lambda s, r: c * (s * r) ** power, latent, prompt), 0.0)
    assert (inner.a.value, inner.a.low, inner.a.high) == pytest.approx((1, 1, 1))
    assert inner.dose_slope.value == pytest.approx(power.mean()) == inner.scale_slope.value
    assert inner.p_cosine < 1e-10
    cosine = interventional(scaled(lambda s, r: c * r**power, latent, prompt), 0.0)
    assert (cosine.a.value, cosine.a.low, cosine.a.high, cosine.scale_slope.value) == (0, 0, 0, 0)
    assert cosine.p_inner < 1e-10 and np.isnan(cosine.p_cosine)
    # A function of s·λ that is no power: the chords lie at different places.
    saturating = interventional(scaled(lambda s, r: c * (s * r) ** 2 / (1 + (s * r) ** 2), latent, prompt), 0.0)
    assert saturating.a.value == pytest.approx(0.76, abs=0.005)


def planted(rng, prompts, truth, latents=10, n=40):
    """Dose slope 2, scale slope 2·truth, both with effects of prompts and tokens; and noise of each run."""
    latent, prompt, c = tokens(rng, latents, n, prompts)
    of = lambda sd: sd * (np.sqrt(0.3) * rng.normal(size=prompts)[prompt] + np.sqrt(0.7) * rng.normal(size=len(c)))  # noqa: E731
    scale, dose = 2 * np.broadcast_to(truth, latents)[latent] + of(1.5), 2 + of(0.5)
    weight = rng.choice([1.0, 3.0, 9.0], latents)
    return scaled(lambda s, r: c * s**scale * r**dose * np.exp(0.05 * rng.normal(size=len(c))), latent, prompt, weight)


@simulation
@pytest.mark.parametrize("prompts", [20, 40])
def test_planted_interventional_exponents_are_covered(prompts):
    rng, covered, n = np.random.default_rng(200 + prompts), [], 8 * MANY
    for truth in (0.0, 0.5, 1.0):
        covered += agrees_with([interventional(planted(rng, prompts, truth), 0.0) for _ in range(n)], truth, 0.9)
    assert agrees(np.mean(covered), 0.94, 0.97, 3 * n)


def beside(rows, effect, name="placebo_token", reference="zero"):
    """The rows, and of each token the placebo's four: effect(s, λ) [token]."""
    token = rows[rows.edit == "zero"]
    whole = name if reference == "zero" else f"zero_{name}"
    edits = {"zero": whole, "half": f"half_{name}", "scaled": f"scaled_{name}"}
    return pd.concat([rows, *(token.assign(edit=edits[e], scale=s, removed=r, kl=effect(s, r)) for e, s, r in STEPS)])


def both_planted(rng, prompts, a, a_placebo, n=40):
    """`planted` with placebos, half of whose variation is their latent's."""
    latent, prompt, c = tokens(rng, 10, n, prompts)
    of = lambda: np.sqrt(0.3) * rng.normal(size=prompts)[prompt] + np.sqrt(0.7) * rng.normal(size=len(c))  # noqa: E731
    common, weight, effects = (of(), of()), rng.choice([1.0, 3.0, 9.0], 10), []
    for truth in (a, a_placebo):
        scale, dose = (np.sqrt(0.5) * x + np.sqrt(0.5) * of() for x in common)
        effects.append(lambda s, r, scale=2 * truth + 1.5 * scale, dose=2 + 0.5 * dose: (
            c * s**scale * r**dose * np.exp(0.05 * rng.normal(size=len(c)))))  # fmt: skip
    return beside(scaled(effects[0], latent, prompt, weight), effects[1])


def test_isotropic_effects_have_the_placebos_exponent():
    rng = np.random.default_rng(16)
    latent, prompt, c = tokens(rng)
    effect = lambda s, r: c * s**-1.0 * r**2 * np.exp(0.2 * rng.normal(size=len(c)))  # noqa: E731
    for reference in ("zero", "mean"):
        rows = beside(scaled(effect, latent, prompt), effect, reference=reference)
        if reference == "mean":  # then placebo_token is that of another edit
            rows = pd.concat([rows, rows[rows.edit == "zero"].assign(edit="placebo_token", kl=1e9)])
        got = interventional(rows, 0.0, reference)
        (found,) = got.placebos.values()
        same(found.latent, got.a)
        assert [got.a.value, found.placebo.value] == pytest.approx([-0.5, -0.5], abs=0.1)
        assert found.difference.low < 0 < found.difference.high and found.difference.high < 0.2


@simulation
@pytest.mark.parametrize("prompts", [20, 40])
def test_planted_placebo_differences_are_covered(prompts):
    rng, covered, n = np.random.default_rng(300 + prompts), [], 8 * MANY
    for a, a_placebo in ((-0.4, -0.4), (0.0, 0.5), (1.0, 0.0)):
        found = [interventional(both_planted(rng, prompts, a, a_placebo), 0.0) for _ in range(n)]
        got = [each.placebos["placebo_token"].difference for each in found]
        covered += [each.low <= a - a_placebo <= each.high for each in got]
    assert agrees(np.mean(covered), 0.94, 0.97, 3 * n)


def test_the_difference_by_hand():
    rows = both_planted(np.random.default_rng(17), 20, 0.2, 0.5)
    got = interventional(rows.sample(frac=1, random_state=0), 0.0).placebos["placebo_token"]
    k = {(e, s): part.kl.to_numpy() for (e, s), part in rows.groupby(["edit", "scale"])}
    first = rows[rows.edit == "zero"]
    w, prompt = first.latent_weight.to_numpy(), first.target_prompt.to_numpy()

    def a(keep, end="", whole="zero"):
        scale = np.log(k["scaled" + end, 1.1] / k["scaled" + end, 0.9]) / np.log(1.1 / 0.9)
        dose = np.log2(k[whole, 1.0] / k["half" + end, 1.0])
        return np.average(scale[keep], weights=w[keep]) / np.average(dose[keep], weights=w[keep])

    keeps = [np.ones(len(w), dtype=bool), *(prompt != g for g in range(20))]
    placebo = [a(keep, "_placebo_token", "placebo_token") for keep in keeps]
    theta = np.array([a(keep) for keep in keeps]) - placebo
    effective = 1 / (np.bincount(prompt) ** 2 / len(prompt) ** 2).sum()
    half = stats.t.ppf(0.975, effective - 1) * np.sqrt(19 / 20 * ((theta[1:] - theta[1:].mean()) ** 2).sum())
    wanted = (theta[0], theta[0] - half, theta[0] + half)
    assert (got.difference.value, got.difference.low, got.difference.high) == pytest.approx(wanted)
    assert (got.placebo.value, got.n_rows) == (pytest.approx(placebo[0]), 400)


def test_unusable_or_unidentified_placebos_are_counted():
    rows = both_planted(np.random.default_rng(18), 20, 0.2, 0.5).reset_index(drop=True)
    half = rows.index[rows.edit == "half_placebo_token"]
    rows.loc[half[:3], "kl"] = [np.nan, 1e-9, 1e-9]
    got = interventional(rows, 1e-9)
    found = got.placebos["placebo_token"]
    assert (found.n_unusable, found.n_below_floor, found.n_rows) == (1, 2, 397) and got.n_rows == 400
    assert found.latent.n_rows == found.placebo.n_rows == found.difference.n_rows == 397
    rows.loc[half, "kl"] = rows.loc[rows.edit == "placebo_token", "kl"].to_numpy()[::-1]  # no slope on the dose
    found = interventional(rows, 0.0).placebos["placebo_token"]
    assert found.placebo.kind != "bounded" and np.isnan([found.difference.low, found.difference.high]).all()


def test_interventional_by_hand():
    rows = planted(np.random.default_rng(11), 20, 0.5, latents=12)
    got = interventional(rows.sample(frac=1, random_state=0), 0.0)
    k = {(e, s): part.kl.to_numpy() for (e, s), part in rows.groupby(["edit", "scale"])}
    first = rows[rows.edit == "zero"]
    slopes = {
        "scale": np.log(k["scaled", 1.1] / k["scaled", 0.9]) / np.log(1.1 / 0.9),
        "dose": np.log2(k["zero", 1.0] / k["half", 1.0]),
    }
    w, prompt = first.latent_weight.to_numpy(), first.target_prompt.to_numpy()
    mean = {name: [np.average(v[prompt != g], weights=w[prompt != g]) for g in (-1, *range(20))]
            for name, v in slopes.items()}  # fmt: skip
    sizes = first.groupby("target_prompt").size().to_numpy()
    same(got.a, ratio_from_deletions(np.array(mean["scale"]), np.array(mean["dose"]), sizes))
    assert (got.scale_slope.value, got.dose_slope.value) == pytest.approx((mean["scale"][0], mean["dose"][0]))
    contrast = pd.Series(slopes["scale"] - slopes["dose"] / 2).groupby(first.latent.to_numpy()).mean()
    counted = np.average(contrast < 0, weights=first.groupby("latent").latent_weight.first())
    assert got.share_below_half.counted == pytest.approx(counted) and 0 < counted < 1
    assert (got.n_rows, got.n_latents, got.share_below_half.n, got.n_reversed) == (480, 12, 12, 0)


def test_incomplete_and_floor_tokens_are_counted():
    rows = planted(np.random.default_rng(13), 20, 0.5)
    got = interventional(rows, 0.0)
    extra = rows[rows.edit == "zero"].assign(edit="placebo_token", kl=np.nan)
    alone = rows[rows.edit == "zero"][:3].assign(target_position=[1000, 1001, 1002])  # never asked about
    asked = alone.assign(target_position=[1003, 1004, 1005])
    more = interventional(pd.concat([rows, extra, alone, asked, asked.assign(edit="half", removed=0.5)]), 0.0)
    assert (more.n_unusable, more.n_rows) == (3, got.n_rows) and more.a == got.a
    rows.loc[rows.index[5], "kl"] = np.nan
    floor = float(rows.kl.quantile(0.2)) / 10
    got = interventional(rows, floor)
    lowest = rows.groupby("target_position").kl.agg(lambda k: k.min(skipna=False))
    below = int((lowest <= 10 * floor).sum())
    assert (got.n_unusable, got.n_below_floor, got.n_rows) == (1, below, 399 - below) and below > 80
    assert got.share_below_floor == pytest.approx(below / 399)
    kept = rows[rows.target_position.map(lowest > 10 * floor)]
    same(interventional(kept, 0.0).a, got.a)


@pytest.mark.parametrize("ask", [observational, interventional])
def test_exponents_as_text_and_json(ask):
    rng = np.random.default_rng(14)
    rows = table(rng, 2.0, 1.0) if ask is observational else planted(rng, 20, 0.5)
    got = ask(rows, 0.0)
    assert str(got).startswith(f"a {got.a.value:.3g} [") and len(str(got)) < 110 and "\n" not in str(got)
    held = json.loads(json.dumps(got.as_dict(), allow_nan=False))
    assert held["a"]["value"] == got.a.value and held["identified"] is True
    nothing = ask(rows, 1e9)
    assert (nothing.n_rows, nothing.n_latents, nothing.share_below_floor) == (0, 0, 1) and not nothing.identified
    held = json.loads(json.dumps(nothing.as_dict(), allow_nan=False))
    assert held["p_cosine"] is held["p_inner"] is held["a"]["value"] is None
    assert "not identified" in str(nothing)
    assert np.isnan(ask(rows[:0], 0.0).share_below_floor)
    few = ask(rows[rows.target_prompt < 9], 0.0)
    assert np.isfinite(few.a.value) and few.a.kind == "none" and np.isnan([few.p_cosine, few.p_inner]).all()
    assert ask(rows[rows.target_prompt < 12], 0.0).a.n_prompts == 12  # without a warning


def test_invalid_arguments_raise():
    rng = np.random.default_rng(15)
    rows, four = table(rng, 2.0, 1.0), planted(rng, 20, 0.5)
    for floor in (-1.0, np.nan, np.inf):
        with pytest.raises(ResultError, match="noise floor of"):
            observational(rows, floor)
    with pytest.raises(ResultError, match="2 of 722 rows repeat"):
        observational(pd.concat([rows, rows[:2]]), 0.0)
    with pytest.raises(ResultError, match="5 of 1605 rows repeat"):
        interventional(pd.concat([four, four[-5:]]), 0.0)
    with pytest.raises(ResultError, match=r"edits \['half', 'scaled', 'zero'\]; expected those of one"):
        observational(four.assign(target_position=np.arange(len(four))), 0.0)
    for weight in (0.0, np.nan, -1.0):
        with pytest.raises(ResultError, match="latent_weight is not above 0, or a latent has two"):
            observational(rows.assign(latent_weight=weight), 0.0)
    with pytest.raises(ResultError, match="or a latent has two"):
        interventional(four.assign(latent_weight=rng.uniform(size=len(four))), 0.0)
    with pytest.raises(ResultError, match="drop such rows"):
        observational(rows.assign(clean_entropy=np.nan), 0.0)

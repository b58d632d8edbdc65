import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from scipy import stats

from diagnostics.statistics.prevalence import error_in_common, false_discovery, share_below
from interventions.errors import ResultError
from tests.simulations import MANY, agrees, simulation

N_COVERAGE = 40 * MANY
WRONG = (ResultError, TypeCheckError)  # the second where types are checked at run time


def units(rng, n, mu, tau, noise):
    """Estimates of n true values, and their standard errors: between noise/2 and 3·noise/2."""
    se = noise * rng.uniform(0.5, 1.5, n)
    return mu + tau * rng.normal(size=n) + se * rng.normal(size=n), se


def loglik(x, se, mu, tau, power=1.0):
    return (power * stats.norm.logpdf(x, mu, np.sqrt(se**2 + tau**2))).sum()


def test_equal_errors_give_the_closed_form():
    """tau² is the variance of the estimates less the errors'."""
    x = np.random.default_rng(0).normal(1, 2, 50)
    got = share_below(x, np.full(50, 0.7), 0.4)
    tau = math.sqrt(x.var() - 0.49)
    assert (got.mu, got.tau) == pytest.approx((x.mean(), tau), rel=1e-6)  # the square root of the likelihood's rounding
    assert got.share == pytest.approx(stats.norm.cdf((0.4 - x.mean()) / tau), rel=1e-6)
    assert (got.counted, got.n) == ((x < 0.4).mean(), 50)


def test_fit_maximises_the_likelihood():
    x, se = units(np.random.default_rng(1), 40, 0.3, 1.0, 0.8)
    got = share_below(x, se, 0.0)
    best = loglik(x, se, got.mu, got.tau)
    for mu, tau in ((1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3)):
        there = loglik(x, se, got.mu + mu, got.tau + tau)
        assert best - 1e-4 < there < best


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 3.0, 9.0)])
@pytest.mark.parametrize(("threshold", "times"), [(-0.5, 1), (0.3, 1), (2.0, 1), (-0.5, 50)])
def test_interval_ends_are_profile_likelihood_bounds(threshold, times, weights):
    """Among all (mu, tau) that give the share at an end, the best is t²/2 below the maximum."""
    rng = np.random.default_rng(2)
    x, se = (np.tile(v, times) for v in units(rng, 40, 0.3, 1.0, 0.8))
    w = rng.choice(weights, len(x))
    got, power = share_below(x, se, threshold, level=0.9, weights=w), w * w.sum() / (w**2).sum()
    assert power.sum() == pytest.approx(got.n_effective)
    best, drop = loglik(x, se, got.mu, got.tau, power), stats.t.ppf(0.95, got.n_effective - 1) ** 2 / 2
    assert 0 < got.low < got.share < got.high < 1
    for end in (got.low, got.high):
        taus = got.tau * np.geomspace(0.2, 5, 2000) ** (1 / times)
        there = max(loglik(x, se, threshold - stats.norm.ppf(end) * tau, tau, power) for tau in taus)
        assert best - there == pytest.approx(drop, abs=1e-3)


def test_without_spread_the_share_is_zero_or_one():
    x, se = np.linspace(-1, 1, 30), np.full(30, 1.0)
    at, below, above = (share_below(x, se, c) for c in (0.0, 0.8, -0.8))
    assert at.tau == below.tau == above.tau == 0
    assert (at.low, at.high) == (0, 1)
    assert np.isnan(share_below(np.zeros(30), se, 0.0).share)
    assert (below.share, below.high) == (1, 1) and 0.5 < below.low < 1
    assert (above.share, above.low) == (0, 0) and above.high == pytest.approx(1 - below.low, rel=1e-6)
    assert share_below(x, se, 0.05).low == 0  # close enough to the mean for either side
    assert str(below).startswith("1 [0.") and str(below).endswith(", 1] (counted: 0.9)")


def simulated(n, mu, tau, noise, threshold):
    """The true share, the mean count, the median share of the fit, and whether so many intervals hold the truth."""
    rng, counted, share, hits = np.random.default_rng(3), [], [], 0
    truth = stats.norm.cdf((threshold - mu) / tau) if tau else float(mu < threshold)
    for _ in range(N_COVERAGE):
        got = share_below(*units(rng, n, mu, tau, noise), threshold)
        counted.append(got.counted)
        share.append(got.share)
        hits += got.low <= truth <= got.high
    return truth, np.mean(counted), np.median(share), agrees(hits / N_COVERAGE, 0.94, 1.0, N_COVERAGE)


@simulation
def test_counting_is_biased_by_noise_and_the_fit_is_not():
    truth, counted, share, covers = simulated(100, 1.0, 0.5, 1.0, 0.5)
    assert truth == pytest.approx(0.159, abs=1e-3) and counted > 0.3
    assert abs(share - truth) < 0.04 and covers
    truth, counted, share, covers = simulated(30, -1.0, 1.0, 0.7, 0.0)
    assert truth - counted > 0.03
    assert abs(share - truth) < 0.04 and covers
    truth, counted, share, covers = simulated(60, 1.0, 0.0, 1.0, 0.0)  # all units alike, on one side
    assert truth == 0 and counted > 0.1
    assert share < 1e-6 and covers


@simulation
def test_non_normal_values_bias_the_share_and_are_detected():
    """A limit: of two equal groups at −1 and 1 half of the units lie below −½, of a normal distribution 31 %."""
    rng, found, normal, n = np.random.default_rng(9), [], [], 30 * MANY
    for _ in range(n):
        z, se = rng.normal(size=200), rng.uniform(0.25, 0.75, 200)
        found.append(share_below(rng.choice([-1.0, 1.0], 200) + se * z, se, -0.5))
        normal.append(share_below(rng.normal(size=200) + se * z, se, -0.5).normal_p)
    assert np.mean([got.high < 0.45 for got in found]) > 0.95
    got = share_below(z, se, 0.0)
    assert got.normal_p == pytest.approx(stats.normaltest((z - got.mu) / np.hypot(got.tau, se)).pvalue, rel=1e-9)
    assert np.mean([got.normal_p < 0.05 for got in found]) > 0.9
    assert agrees(np.mean(np.array(normal) < 0.05), 0.03, 0.07, n)
    assert np.isnan(share_below(z[:19], se[:19], 0.0).normal_p)


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), tau=st.sampled_from([0.0, 0.5, 2.0]), scale=st.floats(0.01, 100))
def test_share_is_invariant_to_scale_order_and_sign(seed, tau, scale):
    rng = np.random.default_rng(seed)
    x, se = units(rng, 25, 0.3, tau, 1.0)
    order, got = rng.permutation(25), share_below(x, se, 0.0)
    assert got.low <= got.share <= got.high
    moved = share_below(scale * x[order] + 5, scale * se[order], 5.0)
    turned = share_below(-x, se, 0.0)
    # An optimum is found to the square root of the likelihood's rounding.
    assert (moved.share, moved.low, moved.high) == pytest.approx((got.share, got.low, got.high), abs=1e-5)
    assert (1 - turned.share, 1 - turned.high, 1 - turned.low) == pytest.approx(
        (got.share, got.low, got.high), abs=1e-5
    )
    assert (moved.mu, moved.tau) == pytest.approx((scale * got.mu + 5, scale * got.tau), rel=1e-5, abs=1e-5 * scale)


def test_units_with_large_errors_change_nothing():
    x, se = units(np.random.default_rng(5), 30, 0.0, 1.0, 0.5)
    got = share_below(x, se, 0.5)
    noise = 1e4 * np.random.default_rng(6).normal(size=1000)
    more = share_below(np.r_[x, noise], np.r_[se, np.full(1000, 1e4)], 0.5)
    assert more.share == pytest.approx(got.share, abs=1e-4) and more.counted == pytest.approx(0.5, abs=0.05)


def test_few_units():
    x, se = units(np.random.default_rng(7), 9, 0.0, 1.0, 0.1)
    got = share_below(x, se, 0.0)
    assert np.isnan([got.low, got.high]).all() and 0 < got.share < 1 and got.n == 9
    assert "[" not in str(got)
    assert np.isfinite(share_below(np.r_[x, 0.0], np.r_[se, 0.1], 0.0).high)
    nothing = share_below(x[:0], se[:0], 0.0)
    assert np.isnan([nothing.share, nothing.low, nothing.mu, nothing.tau, nothing.counted]).all() and nothing.n == 0
    assert json.loads(json.dumps(nothing.as_dict(), allow_nan=False))["share"] is None
    assert share_below(x[:1], se[:1], x[0] + 1).share == 1
    assert share_below(np.zeros(20), np.ones(20), 1.0).share == 1


def test_invalid_arguments_of_share_below_raise():
    x, se = np.zeros(20), np.ones(20)
    with pytest.raises(WRONG):
        share_below(x, se[:19], 0.0)
    with pytest.raises(ResultError, match=r"3 of 20 units have no usable estimate .* above 0; drop"):
        share_below(np.r_[np.nan, x[1:]], np.r_[1.0, 0.0, -1.0, se[3:]], 0.0)
    with pytest.raises(ResultError, match="threshold of nan"):
        share_below(x, se, math.nan)
    with pytest.raises(ResultError, match="level 95"):
        share_below(x, se, 0.0, level=95.0)
    for weights in (np.r_[0.0, se[1:]], -se, np.full(20, np.nan), se * np.inf):
        with pytest.raises(ResultError, match=r"weights \[20\] for 20 units; expected a finite one above 0"):
            share_below(x, se, 0.0, weights=weights)
    with pytest.raises(WRONG):
        share_below(x, se, 0.0, weights=se[:19])
    with pytest.raises(ResultError, match="a shared error of -1"):
        share_below(x, se, 0.0, shared_error=-1.0)
    with pytest.raises(ResultError, match=r"deletions \[2, 20\]; expected finite numbers"):
        error_in_common(np.full((2, 20), np.nan), se)


def test_equal_weights_change_nothing():
    x, se = units(np.random.default_rng(10), 40, 0.3, 1.0, 0.8)
    got = share_below(x, se, 0.0)
    assert got == share_below(x, se, 0.0, weights=np.full(40, 0.3)) == share_below(x, se, 0.0, shared_error=0.0)
    assert got.n_effective == got.n == 40


def test_weights_act_as_repetitions_except_in_the_interval():
    """The fit is that of repeated units; the interval is that of (Σw)²/Σw² units, as no more were seen."""
    rng = np.random.default_rng(11)
    x, se = units(rng, 40, 0.3, 1.0, 0.8)
    w = rng.integers(1, 5, 40)
    got = share_below(x, se, 0.0, weights=10.0 * w)
    often = share_below(np.repeat(x, w), np.repeat(se, w), 0.0)
    assert (got.mu, got.tau, got.share) == pytest.approx((often.mu, often.tau, often.share), rel=1e-5)
    assert got.counted == pytest.approx(often.counted) and got.counted != (x < 0).mean()
    assert (got.n, got.n_effective) == (40, pytest.approx(w.sum() ** 2 / (w**2).sum()))
    narrower = np.sqrt(got.n_effective / often.n)
    assert (often.high - often.low) == pytest.approx(narrower * (got.high - got.low), rel=0.1)


@simulation
@pytest.mark.parametrize("means", [(0.0, 0.0, 0.0), (-0.5, 0.0, 0.5)])
def test_weights_undo_equal_sampling_from_unequal_bins(means):
    """Units in equal numbers from bins that stand for different numbers of them; bins that differ raise the coverage."""
    rng, weights, found = np.random.default_rng(13), np.array([1.0, 3.0, 9.0]), []
    truth, of = np.average(stats.norm.cdf(-0.5 - np.array(means)), weights=weights), np.arange(60) % 3
    for _ in range(N_COVERAGE):
        x, se = units(rng, 60, np.array(means)[of], 1.0, 0.5)
        found.append((share_below(x, se, -0.5, weights=weights[of]), share_below(x, se, -0.5)))
    assert np.median([got.share for got, _ in found]) == pytest.approx(truth, abs=0.04)
    assert agrees(np.mean([got.low <= truth <= got.high for got, _ in found]), 0.94, 1.0, N_COVERAGE)
    if any(means):
        assert np.median([unweighted.share for _, unweighted in found]) > truth + 0.07


def test_few_effective_units_have_no_interval():
    x, se = units(np.random.default_rng(15), 30, 0.0, 1.0, 0.1)
    got = share_below(x, se, 0.0, weights=np.r_[np.full(5, 100.0), np.full(25, 1.0)])
    assert got.n == 30 and got.n_effective < 6 and np.isnan([got.low, got.high]).all() and 0 < got.share < 1


def on_prompts(rng, n, n_prompts, common):
    """Estimates that are means over the same prompts, on all of them and without each; true values N(.5, 1)."""
    effect = common * rng.normal(size=(n_prompts, 1)) + rng.uniform(0.5, 1.5, n) * rng.normal(size=(n_prompts, n))
    values = rng.normal(0.5, 1, n) + effect
    mean = values.mean(axis=0)
    without = (n_prompts * mean - values) / (n_prompts - 1)
    return np.vstack([mean, without]), values.std(axis=0, ddof=1) / math.sqrt(n_prompts)


def test_the_shared_error_by_hand():
    rng = np.random.default_rng(16)
    deletions, se = on_prompts(rng, 12, 30, 2.0)
    w = rng.choice([1.0, 4.0], 12)
    covariance = 29 / 30 * (c := deletions[1:] - deletions[1:].mean(axis=0)).T @ c
    assert np.diag(covariance) == pytest.approx(se**2)
    share = w / (se**2 + share_below(deletions[0], se, 0.0, weights=w).tau ** 2)
    share /= share.sum()
    wanted = share @ (covariance - np.diag(np.diag(covariance))) @ share
    assert error_in_common(deletions, se, weights=w) == pytest.approx(math.sqrt(wanted))
    assert wanted == pytest.approx(4 / 30, rel=0.6)
    assert error_in_common(deletions[:, :1], se[:1]) == 0 and error_in_common(deletions[:10], se) == 0
    opposite = np.column_stack([deletions[:, 0], -deletions[:, 0]])
    assert error_in_common(opposite, se[[0, 0]]) == 0


def test_shared_error_widens_as_a_common_shift_does():
    """At an end, the best over (tau, a move c of all units) of Σ log N(x; mu + c, own² + tau²) − c²/2s² has dropped."""
    x, se = units(np.random.default_rng(17), 40, 0.3, 1.0, 0.8)
    got, s = share_below(x, se, -0.5, shared_error=0.2), 0.2
    own = np.sqrt(np.maximum(se**2 - s**2, se**2 / 4))
    drop, tau = stats.t.ppf(0.975, 39) ** 2 / 2, got.tau * np.geomspace(0.3, 3, 800)[:, None, None]
    move = np.linspace(-1, 1, 401)[:, None]
    for end in (got.low, got.high):
        v = own**2 + tau**2
        off = x - (-0.5 - stats.norm.ppf(end) * tau) - move
        there = (-(np.log(2 * np.pi * v) + off**2 / v).sum(axis=2) / 2 - move[:, 0] ** 2 / 2 / s**2).max()
        assert loglik(x, own, got.mu, got.tau) - there == pytest.approx(drop, abs=1e-3)
    plain = share_below(x, se, -0.5)
    assert got.high - got.low > plain.high - plain.low


@simulation
def test_shared_error_restores_coverage_on_shared_prompts():
    """Half of the error's variance is shared."""
    rng, truth, hits = np.random.default_rng(18), stats.norm.cdf(-0.5), np.zeros(2)
    for _ in range(N_COVERAGE):
        deletions, se = on_prompts(rng, 60, 25, 1.0)
        for i, s in enumerate((0.0, error_in_common(deletions, se))):
            got = share_below(deletions[0], se, 0.0, shared_error=s)
            hits[i] += (got.low <= truth <= got.high) / N_COVERAGE
    assert hits[0] < 0.85 and agrees(hits[1], 0.92, 0.98, N_COVERAGE)


def test_false_discovery_of_benjamini_and_hochberg_1995():
    """The 15 p-values of Benjamini and Hochberg 1995, section 3.2: four discoveries at 5 %, Bonferroni has three."""
    text = ".0001 .0004 .0019 .0095 .0201 .0278 .0298 .0344 .0459 .3240 .4262 .5719 .6528 .7590 1.000"
    q = false_discovery(np.array(text.split(), dtype=float))
    assert (q <= 0.05).sum() == 4
    assert q[:4] == pytest.approx([0.0015, 0.003, 0.0095, 0.0095 * 15 / 4], rel=1e-12)
    # p·15/rank of the fifth to the eighth is .0603, .0695, .0639, .0645: the later and smaller ones count.
    assert q[4:9] == pytest.approx([0.0201 * 3, 0.0298 * 15 / 7, 0.0298 * 15 / 7, 0.0645, 0.0765], rel=1e-12)
    assert false_discovery(np.array([0.05, 0.01, 0.04, 0.02, 0.03])) == pytest.approx(0.05)


@given(seed=st.integers(0, 10**6), n=st.integers(1, 30), method=st.sampled_from(["bh", "by"]))
def test_q_values_keep_the_order_and_are_at_least_p(seed, n, method):
    rng = np.random.default_rng(seed)
    p = rng.random(n) ** 3
    q = false_discovery(p, method)
    assert (q >= p).all() and (q <= 1).all()
    assert (np.diff(q[np.argsort(p)]) >= 0).all()
    order = rng.permutation(n)
    assert (false_discovery(p[order], method) == q[order]).all()
    scattered = np.full(2 * n, np.nan)
    where = rng.permutation(2 * n)[:n]
    scattered[where] = p
    again = false_discovery(scattered, method)
    assert (again[where] == q).all() and np.isnan(np.delete(again, where)).all()
    harmonic = (1 / np.arange(1, n + 1)).sum()
    assert false_discovery(p, "by") == pytest.approx(np.minimum(1, false_discovery(p) * harmonic))


def test_invalid_arguments_of_false_discovery_raise():
    assert np.isnan(false_discovery(np.full(3, np.nan))).all() and false_discovery(np.zeros(0)).shape == (0,)
    with pytest.raises(ResultError, match=r"2 of 3 p-values lie outside \[0, 1\]"):
        false_discovery(np.array([-3.0, 0.5, 1.5]))
    with pytest.raises(WRONG):
        false_discovery(np.array([0.1]), "bonferroni")  # type: ignore[arg-type]
    with pytest.raises(WRONG):
        false_discovery(np.ones((2, 2)))

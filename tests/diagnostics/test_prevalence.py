import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from scipy import stats

from diagnostics.prevalence import false_discovery, share_below
from interventions.errors import ResultError

WRONG = (ResultError, TypeCheckError)  # the second where types are checked at run time


def units(rng, n, mu, tau, noise):
    """Estimates of n true values, and their standard errors: between noise/2 and 3·noise/2."""
    se = noise * rng.uniform(0.5, 1.5, n)
    return mu + tau * rng.normal(size=n) + se * rng.normal(size=n), se


def loglik(x, se, mu, tau):
    return stats.norm.logpdf(x, mu, np.sqrt(se**2 + tau**2)).sum()


def test_equal_errors_give_the_closed_form():
    """tau² is the variance of the estimates less the errors'."""
    x = np.random.default_rng(0).normal(1, 2, 50)
    got = share_below(x, np.full(50, 0.7), 0.4)
    tau = math.sqrt(x.var() - 0.49)
    assert (got.mu, got.tau) == pytest.approx((x.mean(), tau), rel=1e-6)  # the square root of the likelihood's rounding
    assert got.share == pytest.approx(stats.norm.cdf((0.4 - x.mean()) / tau), rel=1e-6)
    assert (got.counted, got.n) == ((x < 0.4).mean(), 50)


def test_the_fit_is_where_the_likelihood_is_flat():
    x, se = units(np.random.default_rng(1), 40, 0.3, 1.0, 0.8)
    got = share_below(x, se, 0.0)
    best = loglik(x, se, got.mu, got.tau)
    for mu, tau in ((1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3)):
        there = loglik(x, se, got.mu + mu, got.tau + tau)
        assert best - 1e-4 < there < best


@pytest.mark.parametrize(("threshold", "times"), [(-0.5, 1), (0.3, 1), (2.0, 1), (-0.5, 50)])
def test_the_interval_ends_where_the_likelihood_has_dropped_enough(threshold, times):
    """Among all (mu, tau) that give the share at an end, the best is t²/2 below the maximum."""
    x, se = (np.tile(v, times) for v in units(np.random.default_rng(2), 40, 0.3, 1.0, 0.8))
    got = share_below(x, se, threshold, level=0.9)
    drop = stats.t.ppf(0.95, 40 * times - 1) ** 2 / 2
    best = loglik(x, se, got.mu, got.tau)
    assert 0 < got.low < got.share < got.high < 1
    for end in (got.low, got.high):
        taus = got.tau * np.geomspace(0.2, 5, 3000) ** (1 / times)
        there = max(loglik(x, se, threshold - stats.norm.ppf(end) * tau, tau) for tau in taus)
        assert best - there == pytest.approx(drop, abs=1e-4)


def test_errors_that_explain_all_of_the_spread_leave_the_side_of_the_threshold():
    x, se = np.linspace(-1, 1, 30), np.full(30, 1.0)
    at, below, above = (share_below(x, se, c) for c in (0.0, 0.8, -0.8))
    assert at.tau == below.tau == above.tau == 0
    assert (at.low, at.high) == (0, 1)
    assert np.isnan(share_below(np.zeros(30), se, 0.0).share)
    assert (below.share, below.high) == (1, 1) and 0.5 < below.low < 1
    assert (above.share, above.low) == (0, 0) and above.high == pytest.approx(1 - below.low, rel=1e-6)
    assert share_below(x, se, 0.05).low == 0  # close enough to the mean for either side
    assert str(below).startswith("1 [0.") and str(below).endswith(", 1] (counted: 0.9)")


def simulated(n, mu, tau, noise, threshold, replications=300):
    """The mean count, the median share of the fit, and how often the interval holds the truth."""
    rng, counted, share, hits = np.random.default_rng(3), 0.0, [], 0
    truth = stats.norm.cdf((threshold - mu) / tau) if tau else float(mu < threshold)
    for _ in range(replications):
        got = share_below(*units(rng, n, mu, tau, noise), threshold)
        counted += got.counted / replications
        share.append(got.share)
        hits += got.low <= truth <= got.high
    return truth, counted, float(np.median(share)), hits / replications


def test_counting_is_biased_by_noise_and_the_fit_is_not():
    """300 replications: ± .013 of a coverage of .95."""
    truth, counted, share, covered = simulated(100, 1.0, 0.5, 1.0, 0.5)
    assert truth == pytest.approx(0.159, abs=1e-3) and counted > 0.3
    assert abs(share - truth) < 0.02 and 0.93 <= covered <= 0.99
    truth, counted, share, covered = simulated(30, -1.0, 1.0, 0.7, 0.0)
    assert truth - counted > 0.03
    assert abs(share - truth) < 0.02 and 0.93 <= covered <= 0.99


def test_units_that_are_all_alike_are_all_on_one_side():
    truth, counted, share, covered = simulated(60, 1.0, 0.0, 1.0, 0.0)
    assert truth == 0 and counted > 0.1
    assert share < 1e-6 and covered >= 0.95


def test_true_values_that_are_not_normal_bias_the_share_and_are_found_out():
    """A limit: two equal groups at −1 and 1 have half of the units below −½, the normal curve .31."""
    rng, found, normal = np.random.default_rng(9), [], []
    for _ in range(50):
        z, se = rng.normal(size=200), rng.uniform(0.25, 0.75, 200)
        found.append(share_below(rng.choice([-1.0, 1.0], 200) + se * z, se, -0.5))
        normal.append(share_below(rng.normal(size=200) + se * z, se, -0.5).normal_p)
    assert max(got.high for got in found) < 0.45
    got = share_below(z, se, 0.0)
    assert got.normal_p == pytest.approx(stats.normaltest((z - got.mu) / np.hypot(got.tau, se)).pvalue, rel=1e-9)
    assert np.mean([got.normal_p < 0.05 for got in found]) > 0.9
    assert np.mean(np.array(normal) < 0.05) < 0.2  # 5 % and three of its standard errors
    assert stats.kstest(normal, "uniform").pvalue > 0.01
    assert np.isnan(share_below(z[:19], se[:19], 0.0).normal_p)


@given(seed=st.integers(0, 10**6), tau=st.sampled_from([0.0, 0.5, 2.0]), scale=st.floats(0.01, 100))
def test_units_order_and_sides_do_not_matter(seed, tau, scale):
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


def test_more_of_the_same_units_narrow_the_interval():
    x, se = units(np.random.default_rng(4), 30, 0.0, 1.0, 0.5)
    one, many = share_below(x, se, 0.5), share_below(np.tile(x, 100), np.tile(se, 100), 0.5)
    assert many.share == pytest.approx(one.share, abs=1e-6)
    assert (many.high - many.low) == pytest.approx((one.high - one.low) / 10, rel=0.2)


def test_errors_of_different_size_are_weighed():
    """A thousand units that say nothing change nothing."""
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


def test_misuse_of_share_below_is_refused():
    x, se = np.zeros(20), np.ones(20)
    with pytest.raises(WRONG):
        share_below(x, se[:19], 0.0)
    with pytest.raises(ResultError, match=r"3 of 20 units have no usable estimate .* above 0; drop"):
        share_below(np.r_[np.nan, x[1:]], np.r_[1.0, 0.0, -1.0, se[3:]], 0.0)
    with pytest.raises(ResultError, match="threshold of nan"):
        share_below(x, se, math.nan)
    with pytest.raises(ResultError, match="level 95"):
        share_below(x, se, 0.0, level=95.0)


def test_false_discovery_of_the_textbook():
    """The 15 p-values of Benjamini and Hochberg 1995, section 3.2: four discoveries at 5 %, Bonferroni has three."""
    text = ".0001 .0004 .0019 .0095 .0201 .0278 .0298 .0344 .0459 .3240 .4262 .5719 .6528 .7590 1.000"
    q = false_discovery(np.array(text.split(), dtype=float))
    assert (q <= 0.05).sum() == 4
    assert q[:4] == pytest.approx([0.0015, 0.003, 0.0095, 0.0095 * 15 / 4], rel=1e-12)
    # p·15/rank of the fifth to the eighth is .0603, .0695, .0639, .0645: the later and smaller ones count.
    assert q[4:9] == pytest.approx([0.0201 * 3, 0.0298 * 15 / 7, 0.0298 * 15 / 7, 0.0645, 0.0765], rel=1e-12)
    assert false_discovery(np.array([0.05, 0.01, 0.04, 0.02, 0.03])) == pytest.approx(0.05)


@given(seed=st.integers(0, 10**6), n=st.integers(1, 30), method=st.sampled_from(["bh", "by"]))
def test_false_discovery_keeps_the_order_and_never_helps(seed, n, method):
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


def test_false_discoveries_are_rare_among_discoveries():
    """80 true nulls of 100: of the tests listed at q ≤ .05 4 % are false, at p ≤ .05 a sixth."""
    rng, listed, naive = np.random.default_rng(8), [], []
    for _ in range(300):
        z = rng.normal(size=100) + 3.5 * (np.arange(100) < 20)
        p = 2 * stats.norm.sf(np.abs(z))
        listed.append(np.mean(np.flatnonzero(false_discovery(p) <= 0.05) >= 20))
        naive.append(np.mean(np.flatnonzero(p <= 0.05) >= 20))
    assert 0.03 < np.mean(listed) < 0.05 < 0.12 < np.mean(naive)


def test_misuse_of_false_discovery_is_refused():
    assert np.isnan(false_discovery(np.full(3, np.nan))).all() and false_discovery(np.zeros(0)).shape == (0,)
    with pytest.raises(ResultError, match=r"2 of 3 p-values lie outside \[0, 1\]"):
        false_discovery(np.array([-3.0, 0.5, 1.5]))
    with pytest.raises(WRONG):
        false_discovery(np.array([0.1]), "bonferroni")  # type: ignore[arg-type]
    with pytest.raises(WRONG):
        false_discovery(np.ones((2, 2)))

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from diagnostics.win_rate.rates import meng_rosenthal_rubin, steiger
from interventions.errors import ResultError

BOTH = pytest.mark.parametrize("compare", [steiger, meng_rosenthal_rubin])


def test_examples_of_steiger():
    """Steiger 1980, case A, printed as −.8913 from a covariance rounded to .0042; the rest as cocor's tests have it."""
    z, p = steiger(0.4, 0.5, 0.1, 103)
    assert z == pytest.approx(-0.8887185, abs=5e-8) and z == pytest.approx(-0.8913, abs=3e-3)
    assert p == pytest.approx(0.374, abs=5e-4)
    z, p = steiger(0.3, 0.4, 0.5, 100)  # Silver, Hittner & May 2006
    assert (z, p) == (pytest.approx(-1.0718, abs=5e-5), pytest.approx(0.2838, abs=5e-5))


def test_examples_of_meng_rosenthal_and_rubin():
    """Their own: Z = 1.68, one-sided p = .047; and Silver, Hittner & May 2006."""
    z, p = meng_rosenthal_rubin(0.63, -0.03, -0.19, 15)
    assert (z, p / 2) == (pytest.approx(1.68, abs=5e-3), pytest.approx(0.047, abs=5e-4))
    z, p = meng_rosenthal_rubin(0.3, 0.4, 0.5, 100)
    assert (z, p) == (pytest.approx(-1.0707, abs=5e-5), pytest.approx(0.2843, abs=5e-5))


def test_the_table_of_may_and_hittner():
    """May & Hittner 1997, n = 50, correlations .0 to .8 of the two predictors; they print 2.24 where it is 2.245."""
    between = np.arange(9) / 10
    table = ((0.5, 0.2, "1.62 1.70 1.80 1.91 2.06 2.24 2.50 2.87 3.50"),
             (0.7, 0.4, "2.03 2.10 2.20 2.32 2.47 2.66 2.94 3.35 4.05"))  # fmt: skip
    for r1, r2, printed in table:
        z, p = meng_rosenthal_rubin(np.full(9, r1), np.full(9, r2), between, np.full(9, 50))
        assert z == pytest.approx(np.array(printed.split(), dtype=float), abs=5.1e-3)
        assert (np.diff(p) < 0).all()


def test_f_is_at_most_one():
    """m = .0982, and f would be 1.08: h = 1."""
    z, _ = meng_rosenthal_rubin(0.31, -0.3168, -0.95, 53)
    expected = (np.arctanh(0.31) + np.arctanh(0.3168)) * np.sqrt(50 / (2 * 1.95))
    assert z == pytest.approx(expected, rel=1e-12)


correlation = st.floats(-0.95, 0.95)


@BOTH
@given(r1=correlation, r2=correlation, r12=correlation, n=st.integers(4, 1000))
def test_the_order_of_the_two_gives_the_sign(compare, r1, r2, r12, n):
    assume(1 - r1**2 - r2**2 - r12**2 + 2 * r1 * r2 * r12 > 1e-6)
    (z, p), (other, same) = compare(r1, r2, r12, n), compare(r2, r1, r12, n)
    assert (z, p) == (pytest.approx(-other, rel=1e-9, abs=1e-12), pytest.approx(same, rel=1e-9))
    assert np.sign(z) == np.sign(r1 - r2)
    turned, _ = compare(-r1, -r2, r12, n)
    assert turned == pytest.approx(-z, rel=1e-9, abs=1e-12)
    (z,), (p,) = compare(np.array([r1]), r2, np.array([r12]), n)
    assert (z, p) == compare(r1, r2, r12, n)


def rejections(compare, n_prompts, tokens, shared, replications=2000):
    """Of equal correlations .3 with two predictors that correlate .8, a share of all variances between prompts."""
    rng = np.random.default_rng(0)
    mix = np.linalg.cholesky(np.array([[1, 0.3, 0.3], [0.3, 1, 0.8], [0.3, 0.8, 1]])).T
    prompts = np.repeat(rng.normal(size=(replications, n_prompts, 3)), tokens, axis=1)
    x = (np.sqrt(shared) * prompts + np.sqrt(1 - shared) * rng.normal(size=prompts.shape)) @ mix
    x -= x.mean(axis=1, keepdims=True)
    c = np.einsum("rni,rnj->rij", x, x)
    unit = np.sqrt(np.einsum("rii->ri", c))
    c /= unit[:, :, None] * unit[:, None, :]
    _, p = compare(c[:, 0, 1], c[:, 0, 2], c[:, 1, 2], n_prompts * tokens)
    return (p < 0.05).mean()


@BOTH
def test_the_size_is_right_for_independent_rows_and_not_for_prompts(compare):
    """2,000 replications: ± .01."""
    assert rejections(compare, 100, 1, 0.0) == pytest.approx(0.05, abs=0.015)
    assert rejections(compare, 40, 5, 0.3) > 0.07
    assert rejections(compare, 20, 10, 0.3) > 0.11


@BOTH
def test_unknown_stays_unknown(compare):
    z, p = compare(np.array([0.3, np.nan, 0.3, 0.3]), 0.2, np.array([0.5, 0.5, np.nan, 0.5]), np.full(4, 30.0))
    assert (np.isnan(z) == [False, True, True, False]).all() and (np.isnan(p) == np.isnan(z)).all()
    assert compare(0.2, 0.2, 0.5, 4) == (0, 1)


@BOTH
def test_misuse_is_refused(compare):
    with pytest.raises(ResultError, match="1 of 2 samples have fewer than 4 rows"):
        compare(0.3, 0.2, 0.5, np.array([3, 4]))
    for r in ((1.0, 0.2, 0.2), (0.2, -1.0, 0.2), (0.2, 0.2, 1.5)):
        with pytest.raises(ResultError, match=r"1 of 1 triples have a correlation outside \(−1, 1\)"):
            compare(*r, 30)
    with pytest.raises(ResultError, match="no three variables can have together"):
        compare(0.9, -0.9, 0.9, 30)

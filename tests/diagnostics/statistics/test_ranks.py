"""Weights are repetitions: of ranks, and of the correlation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from diagnostics.statistics.ranks import mid_ranks, weighted_spearman
from interventions.errors import ResultError

ROWS = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3), st.integers(1, 5)), min_size=3, max_size=12)


def columns(rows):
    x, y, w = np.array(rows, dtype=float).T
    return x, y, w


@given(ROWS)
def test_mid_ranks_match_scipy_on_repeated_rows(rows):
    x, _, w = columns(rows)
    many = w.astype(int)
    np.testing.assert_allclose(np.repeat(mid_ranks(x, w), many), stats.rankdata(np.repeat(x, many)))


@given(ROWS)
def test_weighted_spearman_matches_scipy_on_repeated_rows(rows):
    x, y, w = columns(rows)
    many = w.astype(int)
    if min(np.ptp(x), np.ptp(y)) == 0:
        assert np.isnan(weighted_spearman(x, y, w))
        return
    expected = stats.spearmanr(np.repeat(x, many), np.repeat(y, many)).statistic
    assert weighted_spearman(x, y, w) == pytest.approx(expected)
    assert weighted_spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert weighted_spearman(np.exp(x), -y, w) == pytest.approx(-expected)


def test_weights_undo_an_unequal_draw():
    """Half of the population has correlation 1, half −1; the sample has all of one half and a tenth of the other."""
    x = np.arange(400.0)
    y = np.where(x < 200, x, 600 - x)
    drawn = np.r_[np.arange(0, 200), np.arange(200, 400, 10)]
    weight = np.r_[np.ones(200), np.full(20, 10.0)]
    truth = stats.spearmanr(x, y).statistic
    assert weighted_spearman(x[drawn], y[drawn], weight) == pytest.approx(truth, abs=0.02)
    assert abs(stats.spearmanr(x[drawn], y[drawn]).statistic - truth) > 0.1


@pytest.mark.parametrize("weight", [np.array([1.0, 2, 0]), np.array([1.0, 2]), np.array([1.0, np.nan, 1])])
def test_invalid_weights_raise(weight):
    with pytest.raises(ResultError, match="weights above 0"):
        weighted_spearman(np.arange(3.0), np.arange(3.0), weight)

"""Differences of independent estimates against scipy's Welch test."""

import numpy as np
import pytest
from scipy import stats

from diagnostics.statistics import mean
from diagnostics.statistics.independent import difference_of_independent


@pytest.mark.parametrize(("n", "scale"), [(20, 1.0), (35, 6.0)])
def test_difference_of_means_matches_welch(n, scale):
    """With one row per prompt the delete-one error of a mean is s/√n."""
    rng = np.random.default_rng(n)
    x, y = rng.normal(size=40), 1 + scale * rng.normal(size=n)
    found = difference_of_independent(mean(x, np.arange(40)), mean(y, np.arange(n)))
    expected = stats.ttest_ind(y, x, equal_var=False)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()))
    assert (found.value, found.df) == pytest.approx((y.mean() - x.mean(), expected.df))
    assert (found.n_rows, found.n_prompts) == (40 + n, 40 + n)


def test_missing_and_exact_intervals_propagate():
    few, many = mean(np.arange(5.0), np.arange(5)), mean(np.arange(30.0), np.arange(30))
    found = difference_of_independent(few, many)
    assert found.value == 12.5 and np.isnan([found.low, found.high, found.se, found.df]).all()
    same = mean(np.ones(30), np.arange(30))
    assert (difference_of_independent(same, same).low, difference_of_independent(same, same).high) == (0, 0)

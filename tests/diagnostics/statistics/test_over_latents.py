"""Means over latents: weights, undefined latents, and coverage of the mean of a whole dictionary."""

import numpy as np
import pytest
from scipy import stats

from diagnostics.statistics.over_latents import mean_over_latents, share_of_latents


def test_value_is_the_weighted_mean_of_defined_latents():
    value = np.array([0.2, np.nan, 0.8, 0.5] * 4)
    weight = np.array([1.0, 5.0, 3.0, 2.0] * 4)
    without = np.tile(value, (12, 1))
    found = mean_over_latents(value, without, weight, np.zeros(16, dtype=int))
    assert found.value == pytest.approx((0.2 + 2.4 + 1.0) / 6) and found.n_rows == 12
    assert np.isnan(mean_over_latents(value[:8], without[:, :8], weight[:8], np.zeros(8, dtype=int)).low)  # 6 latents
    whole = mean_over_latents(value, without, np.ones(16), np.zeros(16, dtype=int))
    assert whole.se == pytest.approx(0, abs=1e-9)  # every latent is there, and no prompt matters


def test_intervals_cover_the_mean_of_the_dictionary():
    """Strata of other means and sizes; values move with prompts that all latents share and with prompts of their own."""
    rng, hits, n = np.random.default_rng(0), 0, 300
    for _ in range(n):
        stratum = np.repeat([0, 1, 2], [300, 100, 40])
        truth = np.array([0.2, 0.5, 0.9])[stratum] + 0.15 * rng.normal(size=len(stratum))
        drawn = np.concatenate([rng.choice(np.flatnonzero(stratum == s), 10, replace=False) for s in range(3)])
        weight = np.array([30.0, 10.0, 4.0])[stratum[drawn]]
        by_prompt = truth[drawn] + 0.5 * rng.normal(size=(40, 1)) + 0.5 * rng.normal(size=(40, 30))
        total = by_prompt.sum(0)
        found = mean_over_latents(total / 40, (total - by_prompt) / 39, weight, stratum[drawn])
        hits += found.low <= truth.mean() <= found.high
    assert 0.92 <= hits / n <= 0.99, hits / n


def test_shares_match_exact_binomial_and_cover():
    none = share_of_latents(np.zeros(20, dtype=bool), np.ones(20), 12)
    assert none.value == none.low == 0 and none.high == pytest.approx(1 - 0.025 ** (1 / 20))
    some = share_of_latents(np.arange(20) < 5, np.ones(20), 12)
    known = stats.binomtest(5, 20).proportion_ci()
    assert (some.low, some.high) == pytest.approx((known.low, known.high), rel=1e-6)
    rng, hits = np.random.default_rng(1), 0
    weight = np.repeat([30.0, 10.0, 4.0], 10)
    chance = np.repeat([0.1, 0.3, 0.6], 10)
    for _ in range(400):
        found = share_of_latents(rng.random(30) < chance, weight, 12)
        hits += found.low <= np.average(chance, weights=weight) <= found.high
    assert hits / 400 >= 0.94, hits / 400

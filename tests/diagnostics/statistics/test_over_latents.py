"""Means over latents: weights, undefined latents, and coverage of the mean of a whole dictionary."""

import numpy as np
import pytest

from diagnostics.statistics.over_latents import mean_over_latents


def test_value_is_the_weighted_mean_of_what_is_defined():
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

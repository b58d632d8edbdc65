"""Which latents and tokens are drawn: equal numbers from strata, weights that add up to what there is, by hash alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.sampling.latents import (
    COSINE_BANDS,
    FREQUENCY_BINS,
    MIN_ACTIVE,
    draw_active,
    draw_latents,
    draw_tokens,
    frequency_bins,
    from_strata,
    shares,
)
from diagnostics.sampling.tokens import hash_keys
from interventions import ResultError

sizes = st.lists(st.integers(0, 30), min_size=1, max_size=8)


def keys(n: int, label: str = "test") -> np.ndarray:
    return hash_keys(0, label, np.arange(n))


@given(sizes, st.integers(0, 200))
def test_shares_are_equal_up_to_stratum_size(size, n):
    size = np.array(size)
    taken = shares(size, n)
    assert taken.sum() == min(n, size.sum()) and (taken <= size).all()
    if (short := taken < size).any():  # whoever has some left has given as much as anyone, but for a remainder of one
        assert taken[short].min() >= taken.max() - 1


@given(sizes, st.integers(1, 100))
def test_weights_sum_to_the_size_of_each_sampled_stratum(size, n):
    stratum = np.repeat(np.arange(len(size)) - 1, size)  # the first is not to be drawn
    drawn = from_strata(stratum, keys(len(stratum)), n)
    assert (stratum[drawn.index] >= 0).all() and (np.diff(drawn.index) > 0).all()
    for name in set(stratum[drawn.index].tolist()):
        assert np.isclose(drawn.weight[stratum[drawn.index] == name].sum(), (stratum == name).sum())


def test_the_remainder_goes_to_random_strata():
    firsts = [from_strata(np.arange(100) % 5, keys(100, f"draw {i}"), 2).index % 5 for i in range(40)]
    assert np.bincount(np.concatenate(firsts), minlength=5).min() > 4
    drawn = draw_tokens(np.repeat(np.arange(4), 500), np.random.default_rng(1).normal(size=2000), keys(2000), 12)
    assert len(drawn.index) == 12 and len(set(drawn.index // 500)) > 2


def test_draws_are_nested_and_invariant_to_order():
    stratum, key = np.arange(300) % 4, keys(300)
    few, many = (from_strata(stratum, key, n) for n in (40, 80))
    assert set(few.index) <= set(many.index) and len(many.index) == 80
    order = np.random.default_rng(0).permutation(300)
    other = from_strata(stratum[order], key[order], 40)
    assert sorted(order[other.index]) == few.index.tolist()


def test_bins_are_equally_wide_in_log_frequency():
    frequency = np.array([0.0, 1e-4, 9e-4, 1.1e-3, 0.5, 0.1, 1e-4 * 5000**0.5])
    bins, edges = frequency_bins(frequency)
    assert np.allclose(np.diff(np.log(edges)), np.log(5000) / FREQUENCY_BINS)
    assert bins.tolist() == [-1, 0, 1, 1, 4, 4, 2]
    assert frequency_bins(np.zeros(3))[0].tolist() == [-1, -1, -1]


def test_rare_and_common_bins_give_equal_numbers_of_latents():
    frequency = np.r_[np.zeros(7), np.full(1000, 1e-4), np.full(20, 0.5)]
    drawn, said = draw_latents(frequency, 10_000, 20, "stratified", 0, "sae")
    assert (drawn.index >= 1007).sum() == 10 and (drawn.index < 7).sum() == 0
    assert np.isclose(drawn.weight.sum(), 1020) and drawn.weight.min() == 2
    assert said["never fire"] == 7 and said["drawn of each"] == [10, 0, 0, 0, 10] and said["bin sizes"][-1] == 20
    assert draw_latents(frequency, 10_000, 20, "stratified", 0, "other")[0].index.tolist() != drawn.index.tolist()


def test_published_sampling_takes_the_most_frequent_latents():
    frequency = np.array([0.5, 0.0, MIN_ACTIVE / 1000, (MIN_ACTIVE - 1) / 1000, 0.2, 0.5])
    drawn, said = draw_latents(frequency, 1000, 3, "active", 0, "sae")
    assert drawn.index.tolist() == [0, 4, 5] and (drawn.weight == 1).all()
    assert draw_latents(frequency, 1000, 9, "active", 0, "sae")[0].index.tolist() == [0, 2, 4, 5]
    assert said[f"on fewer than {MIN_ACTIVE} tokens"] == 1
    with pytest.raises(ResultError, match="no latent to ask about"):
        draw_latents(np.zeros(4), 1000, 3, "active", 0, "sae")
    with pytest.raises(ResultError, match="'never fire': 4"):
        draw_latents(np.zeros(4), 1000, 3, "stratified", 0, "sae")


def test_tokens_are_balanced_over_norms_and_cosines():
    rng = np.random.default_rng(0)
    cosine, quartile = rng.normal(size=8000), np.repeat(np.arange(4), 2000)
    drawn = draw_tokens(quartile, cosine, keys(8000), 200)
    band = np.searchsorted(np.quantile(np.abs(cosine), COSINE_BANDS[1:-1]), np.abs(cosine[drawn.index]), side="right")
    counts = np.bincount(quartile[drawn.index] * 5 + band, minlength=20)
    assert (counts == 10).all() and np.isclose(drawn.weight.sum(), 8000)
    assert 0.3 < (cosine[drawn.index] < 0).mean() < 0.7
    share = drawn.weight[band == 4].sum() / 8000
    assert np.isclose(share, 1 - COSINE_BANDS[-2], atol=1e-3)


def test_draw_active_draws_active_tokens_only():
    active = np.arange(100) % 9 == 0
    drawn = draw_active(active, keys(100), 5)
    assert len(drawn.index) == 5 and active[drawn.index].all() and np.allclose(drawn.weight, active.sum() / 5)
    assert len(draw_active(active, keys(100), 50).index) == active.sum()
    assert len(draw_active(active & False, keys(100), 50).index) == 0

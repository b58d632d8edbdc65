"""Shapley values and interactions against all orders in numpy, the axioms, and games whose values are known."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from diagnostics.coalitions.design import Orders, interaction_indices, members, shapley_values


def games(n: int = 4):
    return arrays(float, 2**n, elements=st.floats(-5, 5, width=32)).map(lambda v: v - v[0])


def by_orders(v: np.ndarray) -> np.ndarray:
    """Mean gain of each member over all orders in which they join."""
    n = len(v).bit_length() - 1
    gain, every = np.zeros(n), list(permutations(range(n)))
    for order in every:
        have = 0
        for i in order:
            gain[i] += v[have | 1 << i] - v[have]
            have |= 1 << i
    return gain / len(every)


def by_merging(v: np.ndarray, i: int, j: int) -> float:
    """The recursive definition: what i and j get as one member, less what each gets where the other is never there."""
    n = len(v).bit_length() - 1
    rest = [k for k in range(n) if k not in (i, j)]

    def value(groups: list[int]) -> float:
        """Shapley value of the last of some groups of members (bit masks)."""
        sub = np.array([v[sum(g for k, g in enumerate(groups) if s >> k & 1)] for s in range(2 ** len(groups))])
        return by_orders(sub)[-1]

    others = [1 << k for k in rest]
    return value([*others, 1 << i | 1 << j]) - value([*others, 1 << i]) - value([*others, 1 << j])


@settings(max_examples=40, deadline=None)
@given(games())
def test_indices_match_averages_over_all_orders(v):
    phi, index = shapley_values(v), interaction_indices(v)
    assert phi == pytest.approx(by_orders(v), abs=1e-9)
    assert phi.sum() == pytest.approx(v[-1], abs=1e-9)  # efficiency
    assert index[2, 1] == index[1, 2] == pytest.approx(by_merging(v, 1, 2), abs=1e-9)
    assert (np.diag(index) == 0).all()


@settings(max_examples=40, deadline=None)
@given(games(), st.floats(-3, 3))
def test_dummy_member_gets_its_own_value_and_no_interaction(v, added):
    inside = members(5)
    wide = np.tile(v, 2) + added * inside[:, 4]
    assert shapley_values(wide) == pytest.approx(np.r_[shapley_values(v), added], abs=1e-9)
    index = interaction_indices(wide)
    assert index[4] == pytest.approx(np.zeros(5), abs=1e-9)
    assert index[:4, :4] == pytest.approx(interaction_indices(v), abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(games())
def test_symmetric_members_get_equal_values(v):
    bits = np.arange(16)
    turned = bits & ~3 | (bits & 1) << 1 | (bits & 2) >> 1
    even = (v + v[turned]) / 2
    phi, index = shapley_values(even), interaction_indices(even)
    assert phi[0] == pytest.approx(phi[1], abs=1e-9) and index[0, 2] == pytest.approx(index[1, 2], abs=1e-9)


def test_planted_games():
    n, rng = 6, np.random.default_rng(0)
    inside, single, pair = members(n), rng.normal(size=n), np.triu(rng.normal(size=(n, n)), 1)
    additive = inside @ single
    assert shapley_values(additive) == pytest.approx(single) and np.abs(interaction_indices(additive)).max() < 1e-12
    pairwise = additive + np.einsum("si,ij,sj->s", inside, pair, inside)
    both = pair + pair.T
    assert shapley_values(pairwise) == pytest.approx(single + both.sum(1) / 2)
    assert interaction_indices(pairwise) == pytest.approx(both)
    three = inside[:, :3].all(axis=1).astype(float)  # worth 1 with all of three members
    assert shapley_values(three) == pytest.approx([1 / 3] * 3 + [0] * 3)
    assert interaction_indices(three)[:4, :4] == pytest.approx(
        np.array([[0, 0.5, 0.5, 0], [0.5, 0, 0.5, 0], [0.5, 0.5, 0, 0], [0] * 4])
    )


def test_sampled_orders_are_unbiased_with_nominal_coverage():
    n, inside, weight = 5, members(5), 2 ** np.arange(5)
    v = np.random.default_rng(1).normal(size=32)
    v[0] = 0
    truth, hits, draws = shapley_values(v), [], []
    for seed in range(200):
        orders = Orders.drawn(n, 24, seed, "test")
        phi, se = orders.estimates(v[orders.coalition @ weight])
        assert phi.sum() == pytest.approx(v[-1])
        assert (inside[orders.coalition @ weight] == orders.coalition).all()
        hits.append(np.abs(phi - truth) <= orders.t * se)
        draws.append(phi)
    assert np.mean(hits) == pytest.approx(0.95, abs=0.04)
    assert np.abs(np.mean(draws, 0) - truth).max() < 4 * np.std(draws) / np.sqrt(200)

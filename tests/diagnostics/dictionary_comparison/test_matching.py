"""A permuted, noised and sign-flipped copy of a dictionary is matched with it; rotated activations match nothing."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from diagnostics.dictionary_comparison import activity as dictionary_activity
from diagnostics.dictionary_comparison.activity import Activity, correlations, cosines
from diagnostics.dictionary_comparison.matching import matched, one_to_one
from interventions import ResultError
from tests.diagnostics.dictionary_comparison.test_activity import drawn

D_SAE = 40


def copy_of(a: Activity, order: np.ndarray, noise: float = 0.1, flipped: tuple[int, ...] = ()) -> Activity:
    """The latents of `a` in another order, noised; some with the signs of z and d flipped."""
    rng = np.random.default_rng(9)
    sign = np.where(np.isin(order, flipped), -1.0, 1.0)
    z = a.z.toarray()[:, order]
    z = z * (1 + noise * rng.normal(size=z.shape)) * sign
    rows = a.rows[torch.from_numpy(order)] + noise * torch.from_numpy(rng.normal(size=a.rows.shape)) / 4
    return Activity.of(sparse.csr_matrix(z), rows * torch.from_numpy(sign)[:, None])


@pytest.mark.parametrize("at_once", [1, 2**23])
@pytest.mark.parametrize("flipped", [(), (3, 11)])
def test_a_permuted_and_noised_copy_is_matched(monkeypatch, at_once, flipped):
    monkeypatch.setattr(dictionary_activity, "BLOCK", at_once)
    a, order = drawn(800, D_SAE), np.random.default_rng(1).permutation(D_SAE)
    b = copy_of(a, order, flipped=flipped)
    found = matched(a, b)
    np.testing.assert_array_equal(order[found.a.match], np.arange(D_SAE))
    np.testing.assert_array_equal(found.b.match, order)
    np.testing.assert_array_equal(found.a.partner, found.a.match)
    assert found.method == "hungarian"
    assert found.a.agrees.all() and found.b.agrees.all() and found.a.stable.all()
    assert (np.sign(found.b.cosine) == np.where(np.isin(order, flipped), -1, 1)).all()
    row = np.arange(D_SAE)
    np.testing.assert_allclose(found.a.correlation, correlations(a, b)[row, found.a.match], atol=1e-12)
    np.testing.assert_allclose(found.a.cosine, cosines(a, b)[row, found.a.match], atol=1e-12)
    size = np.abs(cosines(a, b)) if flipped else cosines(a, b)
    np.testing.assert_allclose(found.a.mcs, size.max(1), atol=1e-12)
    np.testing.assert_allclose(found.b.mcs, size.max(0), atol=1e-12)
    chance = matched(a, b.rotated(400))
    assert (chance.a.match < 0).all() and not chance.b.agrees.any()
    assert chance.a.stable.all()  # which needs no activations


def test_planted_classes_are_found():
    """Latents of both, one split in two (the second half agrees with a latent that is matched), and latents of one side."""
    a = drawn(2000, D_SAE, d_model=32)
    b = copy_of(a, np.arange(D_SAE), noise=0.02)
    z, rows = b.z.toarray(), b.rows.clone()
    z[:, 10:20] = drawn(2000, 10, 5).z.toarray()  # decoder rows as before, other activations
    rows[20:30] = drawn(2000, 10, 6, d_model=32).rows  # activations as before, other rows
    z[:, 30], rows[30] = z[:, 0] * (1 + 0.3 * np.random.default_rng(2).random(2000)), rows[0]
    z[:, 31] = 0
    found = matched(a, Activity.of(sparse.csr_matrix(z), rows), min_active=5)
    kinds = {name: set(np.flatnonzero(own)) for name, own in found.b.classes(z.any(0)).items()}
    assert kinds == {"matched": {*range(10), *range(32, 40)}, "shared": {30}, "unique": set(range(10, 30))}
    assert found.a.match[0] == 0 and found.a.match[30] == found.a.match[31] == -1
    assert found.b.stable[10:20].all() and not found.b.stable[20:30].any()


def test_latents_that_write_opposite_directions_do_not_match():
    a = drawn(300, 4)
    found = matched(a, Activity.of(a.z, torch.cat([-a.rows[:1], a.rows[1:]])))
    np.testing.assert_array_equal(found.a.match, [-1, 1, 2, 3])
    assert not found.a.agrees[0] and found.a.partner[0] != 0


def test_rare_latents_are_not_matched():
    z = np.zeros((100, 3))
    z[4, 0], z[:9, 1], z[20:40, 2] = 1, np.arange(9) + 1, np.arange(20) + 1
    a = Activity.of(sparse.csr_matrix(z), torch.eye(3))
    np.testing.assert_array_equal(matched(a, a, min_active=10).a.match, [-1, -1, 2])
    np.testing.assert_array_equal(matched(a, a, min_active=1).a.match, [0, 1, 2])
    assert np.isnan(matched(a, a).a.correlation[0]) and matched(a, a).a.partner[0] == -1


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(1, 9)), max_size=9))
def test_hungarian_is_optimal_and_greedy_at_least_half(entries):
    best_of = {(i, j): float(w) for i, j, w in entries}
    i, j = (np.array([pair[side] for pair in best_of], dtype=int) for side in (0, 1))
    weight = np.array(list(best_of.values()))
    values = []
    for limit in (8192, 1):
        row, column, method = one_to_one(i, j, weight, (5, 4), limit)
        assert len(set(row)) == len(row) == len(set(column)) and (np.diff(row) > 0).all()
        values.append(sum(best_of[pair] for pair in zip(row, column, strict=True)))
        large = any((np.bincount(x) > 1).any() for x in (i, j) if len(x))
        assert method.startswith("hungarian") and ("greedy" in method) == (large and limit == 1)
    every = (
        sum(w for w in (best_of.get(pair, 0.0) for pair in zip(rows, range(4), strict=True)))
        for rows in itertools.permutations(range(5), 4)
    )
    assert values[0] == max(every)
    assert values[1] >= values[0] / 2


def test_thresholds_out_of_range_raise():
    a = drawn(30, 4)
    with pytest.raises(ResultError, match=r"thresholds 0 \(correlation\)"):
        matched(a, a, correlation=0)

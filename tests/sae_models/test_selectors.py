"""Selectors against a plain sort: at inference, and over a training batch in chunks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_models.errors import SAEError
from sae_models.gates import Gate, JumpReLU
from sae_models.selectors import AbsTopK, BatchTopK, ReLU, Scored, TopK
from tests.sae_models.built import D_SAE, AbsBatchTopK, drawn


def chunks(s, size=None):
    """Scores some rows at a time; each was formed of a product 100 larger."""
    step = size or len(s)
    return lambda: (Scored(i, s[i : i + step] + 100, s[i : i + step]) for i in range(0, len(s), step))


def dense(found, d_sae=D_SAE):
    """What an entry holds, where it stands; 0 elsewhere."""
    whole = torch.zeros(found.n_rows, d_sae, dtype=found.score.dtype)
    whole[found.row, found.latent] = found.score
    return whole


def assert_in_order(found, s):
    """Sorted by row, no entry twice, and each with its own score and product."""
    assert found.n_rows == len(s)
    assert (found.row.diff() >= 0).all()
    assert len(set(zip(found.row.tolist(), found.latent.tolist(), strict=True))) == len(found.row)
    assert torch.equal(found.score, s[found.row, found.latent])
    assert torch.equal(found.product, found.score + 100)


def among_the_strongest(s, k):
    """s where it is positive and among the k largest of its row, 0 elsewhere."""
    rank = (-s).argsort(dim=-1).argsort(dim=-1)
    return torch.where((rank < k) & (s > 0), s, 0)


# Token by token


def test_relu_keeps_positive_scores():
    s = drawn(7, D_SAE)
    assert torch.equal(ReLU()(s), torch.where(s > 0, s, 0))
    found = ReLU().support(chunks(s, 3))
    assert_in_order(found, s)
    assert torch.equal(dense(found), torch.where(s > 0, s, 0))


@given(st.integers(1, D_SAE + 5), st.integers(0, 1000), st.floats(-3, 2), st.integers(1, 4))
def test_topk_keeps_the_k_largest_positive_scores_of_each_token(k, seed, shift, times):
    s = drawn(7, D_SAE, seed=seed) + shift
    selector = TopK(k)
    assert torch.equal(selector(s), among_the_strongest(s, k))
    assert torch.equal(selector(s[:, None]), among_the_strongest(s, k)[:, None])
    assert torch.equal(torch.cat([selector(row) for row in s.split(1)]), selector(s))  # one token at a time
    found = selector.support(chunks(s), times)
    assert_in_order(found, s)
    assert torch.equal(dense(found), among_the_strongest(s, times * k))


def test_jumprelu_needs_scores_above_each_latents_threshold():
    threshold = torch.tensor([0.5, 0.0, -1.0, 2.0])
    s = torch.tensor([[0.5, 0.0, -0.5, 1.9], [0.6, 0.1, 0.7, 2.1]])
    expected = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.6, 0.1, 0.7, 2.1]])
    assert torch.equal(JumpReLU(threshold)(s), expected)


def test_gate_selects_with_one_bias_and_measures_with_another():
    gate, r = torch.tensor([0.0, 1.0, -1.0, 1.0]), torch.tensor([0.0, 0.5, 0.0, 0.0])
    bias = torch.tensor([1.0, 0.0, 0.0, -5.0])
    p = torch.tensor([0.5, -0.5, 0.9, 2.0])
    # open: +1; open, but the magnitude is negative; shut; open, but the magnitude is negative
    assert Gate(gate, r, bias)(p).tolist() == [1.5, 0.0, 0.0, 0.0]
    torch.testing.assert_close(
        Gate(gate, r, bias)(torch.full((4,), 6.0)), torch.tensor([7.0, 6 * math.exp(0.5), 6.0, 1.0])
    )


# Over a batch


@settings(max_examples=40)
@given(
    st.integers(1, 12),
    st.sampled_from([0.3, 1, 2.5, 5, 60]),
    st.integers(0, 1000),
    st.floats(-3, 2),
    st.floats(-4, 4),
    st.integers(1, 4),
)
def test_batchtopk_does_not_depend_on_earlier_batches(rows, k, seed, shift, before, times):
    """Earlier batches only tell it where to look first: too high, too low or right must give the same result."""
    s = drawn(rows, D_SAE, seed=seed) + shift
    expected = among_the_strongest(s.flatten(), round(times * k * rows)).view(s.shape)
    selector = BatchTopK(k)
    for earlier in (None, 10.0**before, None):
        if earlier is not None:
            selector.support(chunks(earlier * drawn(rows, D_SAE, seed=seed + 1)))
        found = selector.support(chunks(s), times)
        assert_in_order(found, s)
        assert torch.equal(dense(found), expected)


def test_batchtopk_with_ties_keeps_its_number_of_latents():
    s = torch.tensor([[1.0, 2.0, 1.0, 1.0], [3.0, 1.0, 1.0, -1.0]])
    selector = BatchTopK(2)
    for _ in range(2):
        assert sorted(selector.support(chunks(s)).score.tolist()) == [1.0, 1.0, 2.0, 3.0]


def test_batch_without_positive_scores_has_no_entries():
    s = -drawn(4, D_SAE).abs()
    for selector in (ReLU(), TopK(3), BatchTopK(3)):
        found = selector.support(chunks(s, 2))
        assert len(found.row) == len(found.score) == 0 and found.n_rows == 4
        assert len(selector.support(chunks(-s)).row) > 0  # and it is none the worse for it


@pytest.mark.parametrize(
    "make", [ReLU, lambda: TopK(4), lambda: BatchTopK(4), lambda: AbsTopK(4), lambda: AbsBatchTopK(4)]
)
@pytest.mark.parametrize("size", [1, 3, 10])
def test_chunk_size_does_not_matter(make, size):
    s = drawn(11, D_SAE)
    for one, other in zip(make().support(chunks(s)), make().support(chunks(s, size)), strict=True):
        assert one == other if isinstance(one, int) else torch.equal(one, other)


def test_batchtopk_without_a_threshold_raises_at_inference():
    with pytest.raises(SAEError, match=r"no threshold yet; train it past threshold_from, or set selector\.threshold"):
        BatchTopK(3)(drawn(2, D_SAE))


def test_batchtopk_at_inference_needs_scores_above_the_threshold():
    s = torch.tensor([[0.5, 0.4, 0.6, -0.7]])
    assert torch.equal(BatchTopK(3, 0.5)(s), torch.tensor([[0.0, 0.0, 0.6, 0.0]]))
    s = drawn(50, D_SAE)
    selector = BatchTopK(3, 1.0)
    assert torch.equal(selector(s), torch.cat([selector(row) for row in s.split(1)]))  # each token by itself
    assert torch.equal(selector(s), torch.where(s > 1, s, 0))


# Latents of either sign


@pytest.mark.parametrize("size", [None, 3])
def test_signed_selectors_pick_by_size_and_keep_the_sign(size):
    s = drawn(9, D_SAE) - 0.2
    by_size = among_the_strongest(s.abs(), 4) * s.sign()
    assert (by_size < 0).any() and (by_size > 0).any()
    assert torch.equal(AbsTopK(4)(s), by_size)
    found = AbsTopK(4).support(chunks(s, size))
    assert_in_order(found, s)
    assert torch.equal(dense(found), by_size)
    strongest = (among_the_strongest(s.abs().flatten(), 36) * s.flatten().sign()).view(s.shape)
    selector = AbsBatchTopK(4)
    for _ in range(2):
        found = selector.support(chunks(s, size))
        assert_in_order(found, s)
        assert torch.equal(dense(found), strongest)
    selector.threshold.fill_(1.0)
    assert torch.equal(selector(s), torch.where(s.abs() > 1, s, 0))


# Edge cases


@pytest.mark.parametrize("make", [lambda: TopK(0), lambda: TopK(-1), lambda: BatchTopK(0), lambda: BatchTopK(-2.0)])
def test_k_must_be_positive(make):
    with pytest.raises(SAEError, match="k = "):
        make()

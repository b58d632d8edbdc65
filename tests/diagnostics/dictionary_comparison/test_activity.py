"""Correlations from sparse products against numpy on dense tables; planted duplicates are found."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import sparse

from diagnostics.dictionary_comparison import activity as module
from diagnostics.dictionary_comparison.activity import (
    Activity,
    correlations,
    near_duplicates,
    pair_correlations,
    random_rows,
    usable,
)
from interventions import ResultError


def drawn(n: int, d_sae: int, seed: int = 0, signed: bool = False, d_model: int = 16) -> Activity:
    """About a tenth of the latents active on each token."""
    rng = np.random.default_rng(seed)
    z = np.where(rng.random((n, d_sae)) < 0.1, rng.gamma(2, size=(n, d_sae)), 0)
    z = z * rng.choice([-1, 1], z.shape) if signed else z
    return Activity.of(sparse.csr_matrix(z), torch.from_numpy(rng.normal(size=(d_sae, d_model))))


@pytest.mark.parametrize("signed", [False, True])
def test_correlations_match_numpy(signed):
    a, b = drawn(300, 20, 0, signed), drawn(300, 31, 1, signed)
    assert a.signed == signed
    dense = np.corrcoef(a.z.toarray().T, b.z.toarray().T)[:20, 20:]
    np.testing.assert_allclose(correlations(a, b), dense, atol=1e-12)
    np.testing.assert_allclose(correlations(a, b, slice(5, 9)), dense[5:9], atol=1e-12)
    i, j = np.array([0, 7, 19]), np.array([30, 7, 2])
    np.testing.assert_allclose(pair_correlations(a, b, i, j), dense[i, j], atol=1e-12)


@given(
    arrays.arrays(float, (12, 4), elements=st.sampled_from([0.0, 0.0, 1.0, 2.5, -3.0])),
    st.floats(0.1, 10),
    st.floats(0.1, 10),
)
def test_correlations_ignore_scale_and_follow_sign(z, c, e):
    a = Activity.of(sparse.csr_matrix(z), torch.eye(4))
    scaled = Activity.of(sparse.csr_matrix(z * [c, -e, c * e, 1]), torch.eye(4))
    r = correlations(a, a)
    np.testing.assert_allclose(correlations(a, scaled), r * [1, -1, 1, 1], atol=1e-9)
    assert (np.abs(r) <= 1).all()
    np.testing.assert_allclose(np.diag(r)[a.sd > 0], 1, atol=1e-9)


def test_a_constant_latent_has_correlation_0_and_is_not_usable():
    z = np.zeros((30, 4))
    z[:, 0], z[:5, 1], z[7, 2] = 0.1, [1, 2, 3, 4, 5], 1  # always, five times, once; the last never
    a = Activity.of(sparse.csr_matrix(z), torch.eye(4))
    assert a.sd[0] == a.sd[3] == 0
    assert (correlations(a, a)[[0, 3]] == 0).all()
    np.testing.assert_array_equal(usable(a, 5), [False, True, False, False])
    np.testing.assert_array_equal(usable(a, 1), [False, True, True, False])


def test_rotated_activations_keep_correlations_among_themselves():
    a = drawn(200, 12)
    turned = a.rotated(80)
    np.testing.assert_array_equal(turned.z.toarray(), np.roll(a.z.toarray(), 80, axis=0))
    np.testing.assert_allclose(correlations(turned, turned), correlations(a, a), atol=1e-12)
    assert np.diag(correlations(a, turned)).max() < 0.5


@pytest.mark.parametrize("at_once", [1, 2**23])
@pytest.mark.parametrize("signed", [False, True])
def test_planted_duplicates_are_found(monkeypatch, at_once, signed):
    monkeypatch.setattr(module, "BLOCK", at_once)
    a = drawn(100, 10, 3, signed, d_model=64)
    rows = a.rows.clone()
    rows[8] = 3 * rows[2] + 0.02
    rows[5] = -rows[1]  # the same latent only where latents have either sign
    i, j, cos = near_duplicates(Activity.of(a.z, rows))
    expected = [(1, 5), (2, 8)] if signed else [(2, 8)]
    assert list(zip(i, j, strict=True)) == expected
    unit = torch.nn.functional.normalize(rows, dim=1).numpy()
    np.testing.assert_allclose(cos, [unit[x] @ unit[y] for x, y in expected], atol=1e-9)


def test_random_rows_have_the_requested_covariance():
    like = torch.randn(4000, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([8.0, 1, 1, 1, 1, 1])
    flat, shaped = (random_rows(like, torch.Generator().manual_seed(1), kind) for kind in (True, False))
    for rows in (flat, shaped):
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(4000))
    spread = like / like.norm(dim=1, keepdim=True)
    torch.testing.assert_close(shaped.var(0), spread.var(0), atol=0.03, rtol=0)
    assert flat.var(0).max() < 0.2 < 0.5 < shaped.var(0).max()


def test_shapes_that_disagree_raise():
    a = drawn(30, 4)
    with pytest.raises(ResultError, match=r"for 5 decoder rows; expected \[token, 5\]"):
        Activity.of(a.z, torch.eye(5))
    with pytest.raises(ResultError, match="on 30 and on 20 tokens"):
        correlations(a, drawn(20, 4))

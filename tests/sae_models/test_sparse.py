"""Decoding and products at single entries: gradients against finite differences and against dense autograd."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_models.selectors import Support
from sae_models.sparse import decoded, products, weighted_sums
from tests.sae_models.built import close, drawn

ROWS, LATENTS, WIDTH = 5, 7, 3
SUPPORTS = {
    "ordinary": ([0, 0, 1, 2, 2, 2, 3, 4, 4], [6, 1, 0, 2, 1, 5, 3, 4, 0]),
    "empty rows, first and last": ([1, 1, 3], [6, 0, 1]),
    "one entry": ([2], [6]),
    "none": ([], []),
}


def support(row, latent):
    row, latent = torch.tensor(row, dtype=torch.long), torch.tensor(latent, dtype=torch.long)
    nothing = torch.zeros(len(row), dtype=torch.float64)
    return Support(row, latent, nothing, nothing, ROWS)


@pytest.fixture(params=SUPPORTS)
def given_support(request):
    return support(*SUPPORTS[request.param])


def leaf(*shape, seed):
    return drawn(*shape, seed=seed).requires_grad_()


def products_of(u, rows, given):
    """As a training step has them: formed before, without gradients."""
    formed = (u.detach()[given.row] * rows.detach()[given.latent]).sum(-1)
    return products(u, rows, given._replace(product=formed))


def test_products_have_the_gradients_of_the_dense_product(given_support):
    u, rows = leaf(ROWS, WIDTH, seed=1), leaf(LATENTS, WIDTH, seed=2)
    if len(given_support.row):
        assert torch.autograd.gradcheck(lambda u, w: products_of(u, w, given_support), (u, rows))
    found = products_of(u, rows, given_support)
    dense = (u @ rows.T)[given_support.row, given_support.latent]
    for one, other in zip(*(torch.autograd.grad(y.square().sum(), (u, rows)) for y in (found, dense)), strict=True):
        close(one, other)


@given(st.data())
@settings(max_examples=25)
def test_sparse_decoding_matches_the_dense_product(data):
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=ROWS * LATENTS, max_size=ROWS * LATENTS)))
    row, latent = mask.view(ROWS, LATENTS).nonzero(as_tuple=True)
    order = torch.tensor(data.draw(st.permutations(range(len(row)))), dtype=torch.long)
    order = order[row[order].argsort(stable=True)]  # sorted by row, latents in any order
    chosen = support(row[order].tolist(), latent[order].tolist())
    activation, W, back = leaf(len(row), seed=1), leaf(LATENTS, WIDTH, seed=2), drawn(ROWS, WIDTH, seed=3)
    z = torch.zeros(ROWS, LATENTS, dtype=torch.float64).index_put((chosen.row, chosen.latent), activation)
    found, dense = decoded(activation, W, chosen), z @ W
    close(found, dense)
    for one, other in zip(
        *(torch.autograd.grad((y * back).sum(), (activation, W)) for y in (found, dense)), strict=True
    ):
        close(one, other)


def test_products_are_not_recomputed():
    """The step uses the products that the selector saw."""
    given = support([0, 2], [1, 3])._replace(product=torch.tensor([5.0, -7.0], dtype=torch.float64))
    u, rows = leaf(ROWS, WIDTH, seed=1), leaf(LATENTS, WIDTH, seed=2)
    found = products(u, rows, given)
    assert torch.equal(found, given.product)
    found[0].backward()
    assert torch.equal(u.grad[0], rows[1]) and torch.equal(rows.grad[1], u[0])
    assert not u.grad[1:].any()


def test_weighted_sums_of_rows_equal_written_out_sums():
    of, weight = drawn(LATENTS, WIDTH, seed=1), torch.tensor([1.0, 2.0, -3.0, 0.5], dtype=torch.float64)
    item, bag = torch.tensor([4, 4, 0, 6]), torch.tensor([1, 1, 1, 3])
    found = weighted_sums(weight, of, item, bag, 5)
    expected = torch.zeros(5, WIDTH, dtype=torch.float64)
    expected[1], expected[3] = 3 * of[4] - 3 * of[0], 0.5 * of[6]
    close(found, expected)

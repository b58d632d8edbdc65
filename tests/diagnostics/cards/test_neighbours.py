"""Neighbours: a permuted copy is found, and correlations match numpy."""

import numpy as np
import pytest
import torch
from scipy import sparse

from diagnostics.cards.neighbours import correlations
from tests.cards import D_SAE, activations, cards, permuted, sae, usable


def test_permuted_copy_has_cosine_and_correlation_1():
    order = torch.randperm(D_SAE, generator=torch.Generator().manual_seed(0))
    card = cards([7], others={"copy": permuted(sae(), order)})[0]
    copies = [n for n in card.neighbours if n.sae == "copy"]
    assert copies[0].latent == order.tolist().index(7) and copies[0].nearest == "direction"
    assert (copies[0].cosine, copies[0].correlation) == pytest.approx((1, 1), abs=1e-5)
    assert copies[0].frequency == pytest.approx(card.frequency.value)
    own = [n for n in card.neighbours if n.sae == "sae"]
    assert 7 not in [n.latent for n in own]
    d = torch.nn.functional.normalize(sae().W_dec, dim=1)
    cosine = (d @ d[7]).numpy()
    cosine[7] = -2
    assert [n.latent for n in own[:3]] == np.argsort(-cosine)[:3].tolist()
    z = sae().encode(activations())[torch.from_numpy(usable())].numpy()
    z[:, 5] = np.arange(len(z))  # the dead one
    r = np.corrcoef(z.T)[7]
    r[[5, 7]] = 0
    assert int(np.abs(r).argmax()) in [n.latent for n in own]
    assert [n.correlation for n in own] == pytest.approx([r[n.latent] for n in own], abs=1e-5)


def test_signed_latents_have_opposite_directions_as_neighbours():
    own = sae(signed=True)
    other = sae(signed=True, seed=4)
    other.W_dec[9] = -own.W_dec[7]
    found = [n for n in cards([7], sae=own, others={"b": other})[0].neighbours if n.sae == "b"]
    assert found[0].latent == 9 and found[0].cosine == pytest.approx(-1, abs=1e-5)


def test_correlations_of_sparse_columns_match_numpy():
    generator = np.random.default_rng(0)
    dense = generator.normal(size=(50, 6)) * (generator.random((50, 6)) < 0.3)
    dense[:, 4], dense[:, 5] = 0, 2  # constant
    z = dense[:, 0] + 0.5 * dense[:, 1]
    found = correlations(z, sparse.csc_matrix(dense))
    assert found[:4] == pytest.approx([np.corrcoef(z, column)[0, 1] for column in dense[:, :4].T])
    assert np.isnan(found[4:]).all() and np.isnan(correlations(0 * z, sparse.csc_matrix(dense))).all()

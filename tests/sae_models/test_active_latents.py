"""Sparse latents are the dense ones, of either sign, however many tokens are encoded at once."""

import numpy as np
import pytest
import torch

from sae_models import active_latents as module
from sae_models.active_latents import active_latents
from sae_models.errors import BelongingError
from sae_models.selectors import AbsTopK
from tests.sae_models.built import K, inputs, random_sae


@pytest.mark.parametrize("at_once", [1, 7, 1000])
@pytest.mark.parametrize("signed", [False, True])
def test_matrix_equals_encode(monkeypatch, at_once, signed):
    sae, x = random_sae("standard").float(), inputs().float()
    if signed:
        sae.selector = AbsTopK(K)
    monkeypatch.setattr(module, "CHUNK", at_once * sae.d_sae)
    found, z = active_latents(sae, x), sae.encode(x).detach()
    np.testing.assert_allclose(found.matrix().toarray(), z, rtol=1e-5, atol=1e-6)
    assert len(found) == int((z != 0).sum())
    assert (found.z < 0).any() == signed
    np.testing.assert_array_equal(np.diff(found.start), (z != 0).sum(1))
    np.testing.assert_allclose(found.frequency(), (z != 0).float().mean(0), atol=1e-7)
    order = found.token * found.d_sae + found.latent
    assert (np.diff(order) > 0).all()


def test_no_tokens_give_an_empty_table():
    found = active_latents(random_sae("cosine").float(), torch.zeros(0, 12))
    assert len(found) == 0 and found.matrix().shape == (0, found.d_sae)


def test_activations_of_another_width_are_refused():
    with pytest.raises(BelongingError, match="width 5"):
        active_latents(random_sae("standard").float(), torch.zeros(3, 5))

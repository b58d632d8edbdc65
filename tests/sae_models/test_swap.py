"""The other score: the same at the norm where they meet, of the other exponent everywhere."""

import math

import pytest
import torch

from sae_models.architectures import build, named
from sae_models.errors import SAEError
from sae_models.gates import Gate
from sae_models.sae import SAE
from sae_models.scores import Cosine, Inner
from sae_models.swap import swap_score

D_MODEL, D_SAE = 12, 30


def sample(norm: float = 3.0, rows: int = 41) -> torch.Tensor:
    x = torch.randn(rows, D_MODEL, generator=torch.Generator().manual_seed(1))
    return norm * x / x.norm(dim=1, keepdim=True)


def trained(name: str) -> SAE:
    """An SAE whose parameters are all at some value, and whose b_dec is 0, so that ‖x_c‖ = ‖x‖."""
    sae = build(named(name), D_SAE, 4, sample(), torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        sae.b_dec.zero_()
    if hasattr(sae.selector, "threshold"):
        sae.selector.threshold.fill_(0.1)
    return sae


NAMES = ["standard", "standard:topk", "tied", "aligned", "cosine", "cosine-group4", "cosine-feature", "bypass"]


@pytest.mark.parametrize("name", [*NAMES, "bypass-free-encoder"])
def test_swapped_score_agrees_at_the_median_norm(name):
    sae = trained(name)
    swapped = swap_score(sae, sample(3.0))
    x = sample(3.0, 17)
    torch.testing.assert_close(swapped(x), sae(x), atol=2e-5, rtol=2e-5)
    assert swapped.metadata["score_swapped_at_norm"] == pytest.approx(3.0, rel=1e-5)


@pytest.mark.parametrize("name", ["standard", "tied", "aligned"])
def test_swapped_inner_product_ignores_the_norm(name):
    swapped = swap_score(trained(name), sample())
    assert isinstance(swapped.score, Cosine)
    x_c = sample(1.0)
    torch.testing.assert_close(swapped.score(x_c, swapped.W_dec), swapped.score(7 * x_c, swapped.W_dec))


@pytest.mark.parametrize("name", ["cosine", "cosine-group4", "cosine-feature", "cosine-pure", "bypass"])
def test_swapped_cosine_is_proportional_to_the_norm(name):
    swapped = swap_score(trained(name), sample())
    x_c, bias = sample(1.0), swapped.score.b_enc
    one, seven = (swapped.score(f * x_c, swapped.W_dec) - bias for f in (1, 7))
    torch.testing.assert_close(7 * one, seven, atol=1e-4, rtol=1e-4)


def test_swap_uses_the_median_and_keeps_the_original():
    sae = trained("standard")
    before = {key: value.clone() for key, value in sae.state_dict().items()}
    swapped = swap_score(sae, torch.cat([sample(2.0, 5), sample(5.0, 9), sample(1000.0, 3)]))
    assert swapped.metadata["score_swapped_at_norm"] == pytest.approx(5.0, rel=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in sae.state_dict().items())
    assert isinstance(sae.score, Inner) and "score_swapped_at_norm" not in sae.metadata
    assert math.isfinite(float(swapped(sample()).sum()))


def test_swap_of_a_gated_sae_raises():
    sae = trained("standard")
    zeros = torch.zeros(D_SAE)
    sae.selector = Gate(zeros, zeros, zeros)
    with pytest.raises(SAEError, match="gated"):
        swap_score(sae, sample())

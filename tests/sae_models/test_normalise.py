"""What an SAE does to its input first, and the way back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_models.errors import SAEError
from sae_models.normalise import CENTRED, normalisation
from tests.sae_models.built import D_MODEL, NORMALISATIONS, close, drawn, inputs


@pytest.mark.parametrize("shape", [(D_MODEL,), (7, D_MODEL), (2, 3, D_MODEL)], ids=str)
@pytest.mark.parametrize("kind", ["constant_norm", "factor"])
def test_constant_norm_and_factor_are_undone_exactly(kind, shape):
    x = drawn(*shape) + 1
    u, scale, shift = normalisation(**NORMALISATIONS[kind])(x)
    assert scale.shape == (*shape[:-1], 1) and shift is None
    close(scale * u, x)
    assert not torch.allclose(u, x)


@pytest.mark.parametrize("shape", [(D_MODEL,), (7, D_MODEL), (2, 3, D_MODEL)], ids=str)
def test_layer_norm_has_mean_0_and_nearly_std_1(shape):
    """The way back multiplies by std alone, so x − mean returns smaller by std/(std + 1e-5)."""
    x = 3 * drawn(*shape) + 2
    u, scale, shift = normalisation("layer_norm")(x)
    mean, std = x.mean(-1, keepdim=True), x.std(-1, unbiased=True, keepdim=True)
    close(u.mean(-1), torch.zeros(shape[:-1], dtype=x.dtype))
    close(u.std(-1, keepdim=True), std / (std + 1e-5))
    close(scale * u + shift, mean + (x - mean) * std / (std + 1e-5))
    assert (scale * u + shift - x).abs().max() > 1e-6  # which is not nothing


@pytest.mark.parametrize("shape", [(D_MODEL,), (7, D_MODEL), (2, 3, D_MODEL)], ids=str)
@pytest.mark.parametrize("kind", ["none", "constant_norm", "layer_norm"])
def test_centred_kinds_remove_the_mean_first_and_add_it_back(kind, shape):
    x = 3 * drawn(*shape) + 2
    mean = x.mean(-1, keepdim=True)
    u, scale, shift = normalisation(CENTRED.get(kind, kind))(x)
    expected = normalisation(kind)(x - mean)
    close(u, expected.u)
    close(torch.ones(()) if scale is None else scale, torch.ones(()) if expected.scale is None else expected.scale)
    close(shift, mean)  # layer_norm: of what has no mean it adds none, so that here too the mean is what is added


@settings(max_examples=30)
@given(st.floats(0.1, 100), st.floats(-50, 50), st.integers(0, 100))
def test_invariance_to_scale_and_shift(factor, shift, seed):
    x = drawn(4, D_MODEL, seed=seed) + 0.1
    moved = normalisation("layer_norm")(factor * x + shift).u
    eps = 1e-5 * (1 + 1 / (factor * float(x.std(-1).min())))  # what the 1e-5 beside std can still tell apart
    torch.testing.assert_close(moved, normalisation("layer_norm")(x).u, rtol=2 * eps, atol=2 * eps)
    u, scale, _ = normalisation("constant_norm")(factor * x)
    close(u, normalisation("constant_norm")(x).u)
    close(u.norm(dim=-1), torch.full((4,), D_MODEL**0.5, dtype=x.dtype))
    close(scale, factor * normalisation("constant_norm")(x).scale)


def test_factor_is_one_number_for_all_inputs():
    x = inputs()
    u, scale, _ = normalisation("factor", factor=0.25)(x)
    assert torch.equal(u, x / 4) and torch.equal(scale, torch.full((len(x), 1), 4.0))
    assert not normalisation("factor", factor=0.25).state_dict()  # it is a setting, not a weight


@pytest.mark.parametrize("kind", NORMALISATIONS)
def test_settings_rebuild_the_normalisation(kind):
    one = normalisation(**NORMALISATIONS[kind])
    again = normalisation(**one.settings())
    assert again.kind == kind == one.settings()["kind"]
    assert torch.equal(again(inputs()).u, one(inputs()).u)
    if kind == "none":
        x = inputs()
        u, scale, shift = normalisation()(x)
        assert u is x and scale is None and shift is None


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan")])
def test_invalid_normalisations_raise(factor):
    with pytest.raises(SAEError, match="no input normalisation 'batch_norm'; known: none, layer_norm, constant_norm,"):
        normalisation("batch_norm")
    with pytest.raises(SAEError, match=f"inputs scaled by {factor}; expected a positive number"):
        normalisation("factor", factor=factor)

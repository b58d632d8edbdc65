"""Names of SAEs, and how each starts."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from sae_models.architectures import NAMES, Architecture, build, geometric_median, named
from sae_models.errors import SAEError
from sae_models.normalise import normalisation
from sae_models.scores import Cosine
from tests.sae_models.built import ALL, D_MODEL, D_SAE, SELECTORS, K, close, drawn, generator, inputs

PARTS = {  # score, scale, groups, unit_encoder, unit_decoder, restore_norm
    "standard": ("inner", "delta", 4, True, True, False),
    "cosine": ("cosine", "delta", 4, True, True, False),
    "cosine-delta": ("cosine", "delta", 4, True, True, False),
    "cosine-global": ("cosine", "global", 4, True, True, False),
    "cosine-feature": ("cosine", "feature", 4, True, True, False),
    "cosine-pure": ("cosine", "pure", 4, True, True, False),
    "cosine-group7": ("cosine", "group", 7, True, True, False),
    "bypass": ("direction", "delta", 4, True, True, True),
    "bypass-free-encoder": ("direction", "delta", 4, False, True, True),
    "bypass-free-decoder": ("direction", "delta", 4, True, False, True),
    "bypass-free-both": ("direction", "delta", 4, False, False, True),
    "bypass-no-restore": ("direction", "delta", 4, True, True, False),
    "bypass-free-encoder-no-restore": ("direction", "delta", 4, False, True, False),
    "bypass-free-decoder-no-restore": ("direction", "delta", 4, True, False, False),
    "bypass-free-both-no-restore": ("direction", "delta", 4, False, False, False),
    "aligned": ("aligned", "delta", 4, True, False, False),
    "tied": ("tied", "delta", 4, True, True, False),
}

ONLY_SELECTORS = {
    **{name: name for name in ("abstopk", "jumprelu", "gated")},
    **{"signed-gated": "signed_gated", "signed-gated-tied": "signed_gated_tied"},
}


@pytest.mark.parametrize("name", PARTS)
def test_names_give_the_expected_architectures(name):
    assert {n.replace("7", "<G>") for n in PARTS} | ONLY_SELECTORS.keys() == set(NAMES)
    score, scale, groups, unit_encoder, unit_decoder, restore_norm = PARTS[name]
    expected = Architecture(score, "batchtopk", scale, groups, unit_encoder, unit_decoder, restore_norm, "none")
    assert named(name) == expected
    for selector in SELECTORS:
        if score == "inner" or "gated" not in selector:
            assert named(f"{name}:{selector}") == replace(expected, selector=selector)


@pytest.mark.parametrize("name", ONLY_SELECTORS)
def test_selector_names_are_standard_saes_with_that_selector(name):
    assert named(name) == replace(named("standard"), selector=ONLY_SELECTORS[name])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "stadnard",
            "no SAE 'stadnard'; known: standard, .*cosine-group<G>, .*each with a selector behind it: :topk, ",
        ),
        ("", "no SAE ''"),
        ("cosine-group", "no SAE 'cosine-group'"),
        ("cosine-groupx", "no SAE"),
        ("cosine-group-4", "no SAE"),
        ("cosine-group4x", "no SAE"),
        ("cosine-group0", "0 groups of latents; expected at least 1"),
        ("standard:jumpy", "no selector 'jumpy'; known: topk, batchtopk"),
        ("standard:topk:relu", "no selector 'topk:relu'"),
        ("Standard", "no SAE"),
    ],
)
def test_unknown_names_raise(name, message):
    with pytest.raises(SAEError, match=message):
        named(name)


@pytest.mark.parametrize("what", ["score", "selector", "scale"])
def test_unknown_parts_raise(what):
    with pytest.raises(SAEError, match=f"no {what} 'x'; known: "):
        Architecture(**{what: "x"})


# Initial weights


@pytest.mark.parametrize("kind", ["none", "layer_norm"])
@pytest.mark.parametrize("name", ALL)
def test_initial_weights(name, kind):
    x = inputs()
    sae = build(replace(named(name), normalise=kind), D_SAE, K, x, generator(), model_name="m", hook_name="h")
    u = normalisation(kind)(x).u
    assert (sae.d_sae, sae.d_model, sae.model_name, sae.hook_name) == (D_SAE, D_MODEL, "m", "h")
    assert sae.normalise.kind == kind and sae.restore_norm == named(name).restore_norm and sae.subtract_b_dec
    close(sae.W_dec.norm(dim=1), torch.ones(D_SAE, dtype=x.dtype))
    close(sae.encoder_rows(), sae.W_dec)
    close(sae.alignment(), torch.ones(D_SAE, dtype=x.dtype))
    close(sae.b_dec, geometric_median(u))
    assert not torch.allclose(sae.b_dec, u.mean(0), atol=1e-3)
    assert sae.score.b_enc is None or not sae.score.b_enc.any()
    same, other = (build(named(name), D_SAE, K, x, generator(seed)) for seed in (0, 1))
    assert torch.equal(same.W_dec, sae.W_dec) and not torch.allclose(other.W_dec, sae.W_dec, atol=0.1)
    if named(name).score != "tied":
        assert sae.score.W_enc.data_ptr() != sae.W_dec.data_ptr()  # a copy, not the same weight
    if isinstance(sae.score, Cosine):
        size = float((u - sae.b_dec.detach()).norm(dim=1).mean())
        root = D_MODEL**0.5
        start = math.log(root if root / 2 <= size <= 2 * root else size)
        close(sae.score.scale_b, torch.full_like(sae.score.scale_b, start))
        assert not sae.score.exponents().any()
        assert sae.score.fixed == (name == "cosine-pure")


@pytest.mark.parametrize(
    ("name", "a", "b", "delta"),
    [
        ("cosine", 1, D_SAE, True),
        ("cosine-global", 1, 1, False),
        ("cosine-group3", 3, 3, False),
        ("cosine-feature", D_SAE, D_SAE, False),
        ("cosine-pure", 1, 1, False),
    ],
)
def test_number_of_scales_and_exponents(name, a, b, delta):
    score = build(named(name), D_SAE, K, inputs(), generator()).score
    assert (len(score.scale_a), len(score.scale_b), score.scale_delta is not None) == (a, b, delta)


@pytest.mark.parametrize(
    ("given", "made"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.float16, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("name", ["cosine", "aligned", "bypass"])
def test_weights_are_float32_or_wider(name, given, made):
    sae = build(named(name), D_SAE, K, inputs().to(given), generator())
    assert {parameter.dtype for parameter in sae.parameters()} == {made}


@pytest.mark.parametrize(
    ("name", "d_sae", "k", "sample", "message"),
    [
        ("standard", 40, 5, torch.empty(0, 12), "cannot start from a sample of 0 activations"),
        ("standard", 40, 5, torch.full((3, 12), torch.nan), "a sample of 3 activations, some of them not finite"),
        ("standard", 40, 5, torch.full((3, 12), torch.inf), "not finite; give finite ones"),
        ("standard", 40, 41, torch.ones(3, 12), "40 latents for k = 41 active ones a token; expected k from above 0"),
        ("standard", 40, 0, torch.ones(3, 12), "40 latents for k = 0"),
        ("cosine-group41", 40, 5, torch.ones(3, 12), "40 latents in 41 groups; expected at least as many latents"),
        ("standard:topk", 40, 2.5, torch.ones(3, 12), "k = 2.5 for TopK; expected a whole number"),
    ],
)
def test_invalid_starts_raise(name, d_sae, k, sample, message):
    with pytest.raises(SAEError, match=message):
        build(named(name), d_sae, k, sample, generator())


def test_batchtopk_accepts_a_fractional_k():
    assert build(named("standard"), D_SAE, 2.5, inputs(), generator()).selector.k == 2.5
    assert build(named("standard:topk"), D_SAE, 2.0, inputs(), generator()).selector.k == 2


# The geometric median


def total_distance(point, sample):
    return float((sample - torch.as_tensor(point)).norm(dim=1).sum())


@pytest.mark.parametrize(("d_model", "seed"), [(1, 0), (3, 1), (12, 2)])
def test_geometric_median_minimises_the_sum_of_distances(d_model, seed):
    """The iteration stops at steps of 1e-6 of the median's norm, where the sum of distances is already flat."""
    sample = drawn(41, d_model, seed=seed) * torch.linspace(0.1, 5, 41)[:, None] + 2
    sample[:5] += 50
    found = geometric_median(sample)
    best = minimize(
        total_distance, sample.median(0).values.numpy(), args=(sample,), method="Powell", options={"xtol": 1e-9}
    )
    assert total_distance(found, sample) <= best.fun * (1 + 1e-6)
    assert total_distance(sample.mean(0), sample) > best.fun * 1.01  # five far points do not carry it off
    np.testing.assert_allclose(found, best.x, atol=5e-3)


@given(st.floats(0.1, 100), st.integers(0, 100))
@settings(max_examples=25)
def test_geometric_median_follows_scale_and_shift(factor, seed):
    sample, shift = drawn(20, 3, seed=seed) + 3, drawn(3, seed=seed + 1)
    close(geometric_median(factor * sample), factor * geometric_median(sample), rtol=1e-4)
    close(geometric_median(sample + shift), geometric_median(sample) + shift, rtol=1e-4, atol=1e-4)

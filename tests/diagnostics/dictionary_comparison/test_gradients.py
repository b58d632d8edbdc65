"""Norms of gradients against finite differences of `encode` and against autograd through the whole SAE."""

import numpy as np
import pytest
import torch

from diagnostics.dictionary_comparison import gradients as module
from diagnostics.dictionary_comparison.gradients import entry_gradients, quartile_ratio
from interventions import ResultError
from sae_models.active_latents import active_latents
from sae_models.gates import Gate
from sae_models.live import as_sae
from sae_models.sae import SAE
from sae_models.scores import Cosine, Inner
from sae_models.selectors import AbsTopK
from tests.sae_models.built import D_MODEL, D_SAE, drawn, inputs, random_sae

X = inputs(12)
KINDS = [
    ("standard", "topk", "none"),
    ("standard", "relu", "layer_norm"),  # the scale that latents carry depends on x
    ("cosine", "batchtopk", "none"),  # so does the score's
    ("cosine-group3", "topk", "constant_norm"),
    ("bypass", "topk", "none"),  # a latent depends on the others, through the restored norm
    ("bypass-free-both", "topk", "factor"),
    ("aligned", "topk", "none"),
]


@torch.no_grad()
def numeric(sae: SAE, x: torch.Tensor, latent: int, step: float = 1e-6) -> float:
    """‖∂z/∂x‖ by central differences; error about step², and 1e-16·|z|/step by rounding."""
    nudge = step * torch.eye(D_MODEL, dtype=x.dtype)
    return float(((sae.encode(x + nudge) - sae.encode(x - nudge))[:, latent] / (2 * step)).norm())


def by_autograd(sae: SAE, x: torch.Tensor) -> torch.Tensor:
    """‖∂(‖x − x̂‖²)/∂w_i‖ of one token, all latents."""
    w = sae.score.W_enc.requires_grad_()
    (gradient,) = torch.autograd.grad((x - sae(x[None])[0]).square().sum(), w)
    return gradient.norm(dim=-1)


@pytest.mark.parametrize(("name", "selector", "kind"), KINDS)
def test_sensitivities_match_finite_differences(name, selector, kind):
    sae = random_sae(name, selector, kind)
    active = active_latents(sae, X)
    found = entry_gradients(sae, X, active).sensitivity
    for entry in range(0, len(active), 7):
        x, latent = X[active.token[entry]], int(active.latent[entry])
        assert found[entry] == pytest.approx(numeric(sae, x, latent), rel=1e-5), (entry, latent)


@pytest.mark.parametrize(("name", "selector", "kind"), KINDS[:-1])
def test_encoder_gradients_match_autograd(name, selector, kind):
    sae = random_sae(name, selector, kind)
    active = active_latents(sae, X)
    found = entry_gradients(sae, X, active).gradient
    expected = torch.stack([by_autograd(sae, x) for x in X])[active.token, active.latent]
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9)


def test_signed_and_gated_latents():
    sae = random_sae("standard")
    sae.selector = AbsTopK(5)
    active = active_latents(sae, X)
    assert (active.z < 0).any()
    sensitivity, gradient, *_ = entry_gradients(sae, X, active)
    np.testing.assert_allclose(sensitivity, sae.encoder_rows().norm(dim=1)[active.latent].detach(), rtol=1e-12)
    expected = torch.stack([by_autograd(sae, x) for x in X])[active.token, active.latent]
    np.testing.assert_allclose(gradient, expected, rtol=1e-7)
    sae.selector = Gate(*(drawn(D_SAE, seed=s) for s in (1, 2, 3)))
    active = active_latents(sae, X)
    expected = torch.stack([by_autograd(sae, x) for x in X])[active.token, active.latent]
    np.testing.assert_allclose(entry_gradients(sae, X, active).gradient, expected, rtol=1e-7)


@pytest.mark.parametrize("at_once", [1, 100])
def test_results_do_not_depend_on_the_chunk_size(monkeypatch, at_once):
    sae, x = random_sae("cosine"), X.clone()
    x[3] = sae.b_dec.detach()  # nothing is active there
    active = active_latents(sae, x)
    whole = entry_gradients(sae, x, active)
    monkeypatch.setattr(module, "ENTRIES", at_once)
    for one, other in zip(entry_gradients(sae, x, active), whole, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_inner_product_gradients_grow_quadratically():
    """x twice as far from b_dec: z and the error double, and so the row's gradient is four times as large."""
    w = drawn(6, D_MODEL)
    sae = SAE(Inner(w, torch.zeros(6).double()), random_sae("standard", "relu").selector, w, drawn(D_MODEL))
    near, far = (sae.b_dec.detach() + s * drawn(4, D_MODEL, seed=7) for s in (1, 2))
    one, two = (entry_gradients(sae, x, active_latents(sae, x)) for x in (near, far))
    np.testing.assert_allclose(one.sensitivity, two.sensitivity)
    for power, part in enumerate(("sensitivity", "error", "gradient")):
        np.testing.assert_allclose(2**power * getattr(one, part), getattr(two, part))
    np.testing.assert_allclose(one.error_norm, one.gradient)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_gradient_ratios_of_planted_errors_follow_formulas(exponent):
    """x = n·(cos t·d + sin t·e) read so that the error along d is c at every norm n: without its factor the ratio is 1.

    Inner product less c: factor n. exp(b)·n^a·cos + β with exp(b)·n^a·cos t = n·cos t at a = 1; else the error is c(n) by formula.
    """
    near, far, t, c = 3.0, 12.0, 0.4, 0.7
    n = np.repeat([near, far], 5)
    x = torch.zeros(10, 2).double()
    x[:, 0], x[:, 1] = (torch.from_numpy(n * part) for part in (np.cos(t), np.sin(t)))
    d, zero = torch.tensor([[1.0, 0]]).double(), torch.zeros(2).double()
    quartile = np.where(n == near, 0, 3)

    def ratios(score) -> dict[str, float]:
        sae = SAE(score, random_sae("standard", "relu").selector, d, zero)
        found = entry_gradients(sae, x, active_latents(sae, x))._asdict()
        total = {k: np.bincount(quartile, v, 4)[None] for k, v in found.items()}
        count = np.bincount(quartile, minlength=4)[None]
        return {k: float(quartile_ratio(v, count, 5)[0]) for k, v in total.items()}

    inner = ratios(Inner(d, torch.tensor([-c]).double()))
    assert inner == pytest.approx({"sensitivity": 1, "gradient": far / near, "error": 1, "error_norm": far / near})
    one = torch.ones(1).double()
    cosine = ratios(Cosine(d, -c * one, exponent * one, 0 * one))
    error = [abs(m * np.cos(t) - (m**exponent * np.cos(t) - c)) for m in (near, far)]
    bare = error[1] / error[0]
    expected = {"gradient": bare * (far / near) ** exponent, "error": bare, "error_norm": bare * far / near}
    assert {k: cosine[k] for k in expected} == pytest.approx(expected)


def test_ratios_need_tokens_in_both_quartiles():
    total = np.array([[2.0, 9, 9, 12], [2.0, 0, 0, 9], [0.0, 1, 1, 5]])
    count = np.array([[2, 5, 5, 3], [1, 0, 0, 3], [2, 1, 1, 2]])
    np.testing.assert_allclose(quartile_ratio(total, count, 2), [4, np.nan, np.nan])
    np.testing.assert_allclose(quartile_ratio(total, count, 1), [4, 1.5, np.nan])


def test_an_encoder_without_rows_raises():
    class Other:
        W_dec = torch.eye(4)

        def encode(self, x):
            return x.relu()

        def decode(self, z):
            return z @ self.W_dec

    sae, x = as_sae(Other()), torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ResultError, match="known as a function only"):
        entry_gradients(sae, x, active_latents(sae, x))

"""Effects of latents and ablations of mean activations, against plain formulas token by token."""

import numpy as np
import torch

from diagnostics.probe_perturbation.ablations import (
    ablated,
    at_dose,
    attribute_effects,
    changes,
    class_effects,
    largest,
    projected_out,
)
from sae_models.edits import zero_latents
from sae_models.sae import SAE
from sae_models.scores import Inner
from sae_models.selectors import ReLU

rng = np.random.default_rng(0)


def test_ablating_the_mean_is_the_mean_of_ablated_tokens():
    generator = torch.Generator().manual_seed(0)
    encoder, decoder = (torch.randn(20, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    bias = torch.randn(20, generator=generator, dtype=torch.float64)
    sae = SAE(Inner(encoder, bias), ReLU(), decoder, torch.randn(8, generator=generator, dtype=torch.float64))
    tokens = torch.randn(5, 7, 8, generator=generator, dtype=torch.float64)  # [text, token, d_model]
    some = torch.tensor([3, 11, 17])
    by_token = zero_latents(tokens, sae, some).mean(1) - tokens.mean(1)
    torch.testing.assert_close(ablated(sae.encode(tokens).mean(1), decoder, some), by_token)


def test_effects_match_their_formulas():
    z, y = np.abs(rng.normal(size=(30, 6))), rng.random(30) < 0.5
    w, d = rng.normal(size=4), rng.normal(size=(6, 4))
    gap, dot = z[y].mean(0) - z[~y].mean(0), d @ w
    given = torch.from_numpy(z), y, torch.from_numpy(w), torch.from_numpy(d)
    np.testing.assert_allclose(class_effects(*given).numpy(), np.maximum(gap, 0) * dot)
    np.testing.assert_allclose(attribute_effects(*given).numpy(), np.abs(gap * dot))
    # A latent turned round, with its decoder row, speaks for the class as before.
    turned = (
        torch.from_numpy(z * [-1, 1, -1, 1, 1, -1]),
        y,
        given[2],
        torch.from_numpy(d * np.array([-1, 1, -1, 1, 1, -1])[:, None]),
    )
    for effects in (class_effects, attribute_effects):
        torch.testing.assert_close(effects(*turned), effects(*given))


def test_largest_effects_are_positive_and_sorted():
    effect = torch.tensor([0.0, 3.0, -1.0, 5.0, 3.0])
    assert largest(effect, 2).tolist() == [3, 1] and largest(effect, 5).tolist() == [3, 1, 4]


def test_changes_are_nested_and_random_ones_dose_matched():
    z, d = torch.from_numpy(rng.random((9, 12))), torch.from_numpy(rng.normal(size=(12, 5)))
    found = changes(z, d, torch.tensor([4, 2, 7]), torch.tensor([1, 9, 0]), (1, 3, 8))
    for k in (1, 3, 8):
        n, own = found["selected", k]
        assert n == min(k, 3)
        torch.testing.assert_close(own, -sum(z[:, i, None] * d[i] for i in (4, 2, 7)[:k]))
        torch.testing.assert_close(found["random", k][1].norm(dim=1), own.norm(dim=1))
    assert not at_dose(torch.zeros(2, 5), torch.ones(2, 5)).any()  # latents that are silent in a text stay so


def test_projection_leaves_a_constant_logit():
    x, w = torch.from_numpy(rng.normal(size=(10, 5))), torch.from_numpy(rng.normal(size=5))
    logit = (x + projected_out(x, w, np.arange(4))) @ w
    torch.testing.assert_close(logit, (x[:4] @ w).mean().expand(10))

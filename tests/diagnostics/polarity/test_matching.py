"""SAEs whose decoders are the planted directions: what represents what, slopes, and detection of an unseen polarity."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from diagnostics.polarity.anomalies import (
    components,
    detected,
    deviation,
    error_detected,
    random_directions,
    strongest_latents,
)
from diagnostics.polarity.matching import match, reconstruction
from diagnostics.polarity.planted import Planted, spread_directions
from sae_models.sae import SAE
from sae_models.scores import Inner
from sae_models.selectors import AbsTopK, ReLU

D, PAIRS = 8, 8
U = spread_directions(PAIRS, D, torch.Generator().manual_seed(3))


def planted(rho=-1.0, one_sided=0):
    return Planted(U, 2.0, rho, 0.0, one_sided)


def sae(W_dec, selector, scale=1.0):
    return SAE(Inner(scale * W_dec, torch.zeros(len(W_dec))), selector, W_dec, torch.zeros(D)).requires_grad_(False)


def rows(data, n=3000, seed=0):
    return data.draw(n, torch.Generator().manual_seed(seed))


def test_signed_dictionary_matches_one_latent_per_pair():
    flipped = (
        torch.where(torch.arange(PAIRS)[:, None] % 2 == 0, 1.0, -1.0) * U
    )  # the sign of a decoder row is arbitrary
    found = match(sae(flipped, AbsTopK(PAIRS)), planted(), rows(planted()))
    assert (found.consolidated, found.recovered) == (1, 1)
    assert found.latent.tolist() == [[i, i] for i in range(PAIRS)]
    assert found.slopes() == pytest.approx((1, 1), abs=1e-5)


def test_unsigned_dictionary_matches_two_latents_per_pair():
    found = match(sae(torch.cat([U, -U]), ReLU()), planted(), rows(planted()))
    assert (found.consolidated, found.recovered) == (0, 1)
    assert found.latent.tolist() == [[i, i + PAIRS] for i in range(PAIRS)]
    half = match(sae(U, ReLU()), planted(), rows(planted()))
    assert (half.consolidated, half.recovered) == (0, 0.5)
    plus, minus = half.slopes()
    assert plus == pytest.approx(1, abs=1e-5) and np.isnan(minus)


def test_slope_inverts_shrinkage_and_rotation_breaks_matches():
    shrunk = match(sae(U, AbsTopK(PAIRS), scale=0.8), planted(-0.3), rows(planted(-0.3)))
    assert shrunk.slopes() == pytest.approx((1.25, 1.25), abs=1e-5)
    turned = torch.nn.functional.normalize(U + 0.6 * U.roll(1, 0), dim=1)  # cosine .86
    assert match(sae(turned, AbsTopK(PAIRS)), planted(), rows(planted())).recovered == 0


def test_reconstruction_of_the_planted_dictionary():
    some = rows(planted())
    l0, error = reconstruction(sae(U, AbsTopK(2)), some)
    kept = some.amplitude.abs().topk(2, dim=1).values.square().sum()
    assert (
        float((some.amplitude != 0).sum(1).clamp(max=2).float().mean()) <= l0 <= 2
    )  # rounding may fill up rows of fewer
    x = some.x.double().numpy()
    expected = float(some.amplitude.square().sum() - kept) / ((x - x.mean(0)) ** 2).sum()
    assert error == pytest.approx(expected, rel=1e-4)


def test_deviation_is_measured_from_the_usual_range():
    usual, z = (torch.randn(n, 3, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (500, 40))
    x, y = usual.numpy(), z.numpy()
    low, high = np.quantile(x, 0.001, axis=0), np.quantile(x, 0.999, axis=0)
    expected = (np.maximum(y - high, low - y) / x.std(0, ddof=1)).max(1)
    np.testing.assert_allclose(deviation(usual, z).numpy(), expected, rtol=1e-10)
    constant = deviation(torch.zeros(500, 1), torch.tensor([[0.0], [0.5], [-0.5]]))
    assert float(constant[0]) == 0 and bool((constant[1:] > 1e20).all())


def test_only_signed_latents_detect_an_unseen_polarity():
    data = planted(one_sided=4)
    usual, pair = rows(data), data.turned(2000, torch.Generator().manual_seed(5))
    signed, unsigned = sae(U, AbsTopK(PAIRS)), sae(torch.cat([U, -U[4:]]), ReLU())
    assert detected(strongest_latents(signed, usual, PAIRS), usual, pair) > 0.98
    assert detected(strongest_latents(unsigned, usual, 12), usual, pair) < 0.55
    assert error_detected(unsigned, pair) > 0.99  # it lies in what no latent reconstructs
    scores = [torch.cat([(r.x - unsigned(r.x)).norm(dim=1) for r in pair]).numpy(), [0] * 2000 + [1] * 2000]
    assert error_detected(unsigned, pair) == pytest.approx(roc_auc_score(scores[1], scores[0]))


def test_pca_random_and_strongest_latent_readings():
    some = rows(planted())
    pca = components(some, 3)(some.x)
    values = np.linalg.eigvalsh(np.cov(some.x.double().numpy().T))[::-1]
    np.testing.assert_allclose(pca.double().var(0).numpy(), values[:3], rtol=1e-4)
    assert random_directions(D, 3, torch.Generator())(some.x).shape == (len(some.x), 3)
    read = strongest_latents(sae(U, AbsTopK(PAIRS)), some, 3)(some.x)
    assert read.abs().mean(0).min() >= some.amplitude.abs().mean(0).sort().values[-3] - 1e-4

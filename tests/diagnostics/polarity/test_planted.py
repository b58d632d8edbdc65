"""Planted pairs: how often polarities are on, what rows are made of, how much directions overlap."""

import pytest
import torch

from diagnostics.polarity.planted import LARGEST, SMALLEST, Planted, least_cosine, spread_directions


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("rho", [-1.0, -0.4, 0.0])
def test_planted_polarities_have_the_requested_correlation(rho):
    pairs, active, n = 6, 2.4, 200_000
    rows = Planted(torch.eye(pairs), active, rho, 0.0).draw(n, seeded())
    alone, some = rows.alone.double(), active / pairs
    assert alone.mean((0, 1)).numpy() == pytest.approx([some * (1 - rho) / 4] * 2, abs=2e-3)
    assert float((rows.amplitude != 0).double().mean()) == pytest.approx(some * (3 - rho) / 4, abs=3e-3)
    assert not bool(rows.alone.all(dim=-1).any())
    plus, minus = (rows.amplitude[rows.alone[:, :, i]] for i in range(2))
    assert float(plus.min()) >= SMALLEST and float(-minus.max()) >= SMALLEST and float(plus.max()) <= LARGEST
    assert float(plus.mean()) == pytest.approx(1, abs=0.01) == pytest.approx(-float(minus.mean()), abs=0.01)


def test_rows_are_sums_of_directions_and_noise():
    u = spread_directions(12, 8, seeded())
    exact = Planted(u, 3.0, -0.5, 0.0).draw(50, seeded(1))
    torch.testing.assert_close(exact.x, exact.amplitude @ u)
    noisy = Planted(u, 3.0, -0.5, 0.1).draw(20_000, seeded(1))
    assert float((noisy.x - noisy.amplitude @ u).std()) == pytest.approx(0.1, rel=0.02)


def test_turned_rows_flip_one_one_sided_pair():
    planted = Planted(torch.eye(6), 2.0, -1.0, 0.05, one_sided=3)
    assert not bool((planted.draw(5000, seeded()).amplitude[:, :3] < 0).any())
    usual, turned = planted.turned(500, seeded())
    differ = usual.amplitude != turned.amplitude
    assert bool((differ.sum(1) == 1).all()) and bool(differ[:, :3].any(0).all()) and not bool(differ[:, 3:].any())
    torch.testing.assert_close(usual.amplitude[differ], -turned.amplitude[differ])
    torch.testing.assert_close(turned.x - usual.x, turned.amplitude - usual.amplitude)
    assert bool((usual.amplitude[differ] > 0).all())


@pytest.mark.parametrize("pairs", [5, 8, 12, 16])
def test_directions_are_as_orthogonal_as_possible(pairs):
    u = spread_directions(pairs, 8, seeded()).double()
    torch.testing.assert_close(u.norm(dim=1), torch.ones(pairs, dtype=u.dtype), rtol=1e-6, atol=0)
    cosines = (u @ u.T - torch.eye(pairs, dtype=u.dtype)).square().sum() / (pairs * (pairs - 1))
    assert float(cosines.sqrt()) == pytest.approx(least_cosine(pairs, 8), rel=0.15, abs=1e-6)

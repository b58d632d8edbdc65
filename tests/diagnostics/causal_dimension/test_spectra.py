"""Effective rank and its kin of spectra that are known, and of sketches."""

import numpy as np
import pandas as pd
import pytest
import torch

from diagnostics.causal_dimension.spectra import (
    dimension,
    effective_rank,
    needed,
    participation,
    sketched_participation,
    spectrum,
)


def planted(values: list[float], seed: int = 0) -> torch.Tensor:
    turn = torch.linalg.qr(
        torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ).Q
    return turn @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ turn.T


def test_dimension_counts_equal_eigenvalues():
    for n in (1, 5, 12):
        found = dimension(planted([3.0] * n + [0.0] * (12 - n)))
        assert found["trace"] == pytest.approx(3 * n)
        assert [found[name] for name in ("effective_rank", "participation")] == pytest.approx([n, n])
        assert [found[name] for name in ("n50", "n80", "n90")] == pytest.approx([0.5 * n, 0.8 * n, 0.9 * n])


def test_two_levels_by_hand():
    values = np.array([6.0, 2.0, 1.0, 1.0])
    assert spectrum(planted(values.tolist())) == pytest.approx(values)
    assert effective_rank(values) == pytest.approx(np.exp(-(0.6 * np.log(0.6) + 0.2 * np.log(0.2) + 0.2 * np.log(0.1))))
    assert participation(values) == pytest.approx(100 / 42) and participation(values) < effective_rank(values)
    assert [needed(values, share) for share in (0.5, 0.8, 0.9)] == pytest.approx([5 / 6, 2, 3])


def test_dimension_of_a_zero_matrix_is_nan():
    assert all(np.isnan(v) for name, v in dimension(torch.zeros(3, 3)).items() if name != "trace")


def sketches(full: torch.Tensor, k: int, draws: int) -> list[dict[str, float]]:
    stream, found = torch.Generator().manual_seed(3), []
    for _ in range(draws):
        q = torch.linalg.qr(torch.randn(len(full), k, generator=stream, dtype=torch.float64)).Q
        found.append(dimension(q.T @ full @ q, len(full)))
    return found


def test_sketches_estimate_trace_and_participation():
    """A third of the directions; the means of 400 draws within 3 standard errors, of the ratio within 6 %. κ comes out too low."""
    full = planted([0.8**i for i in range(48)])
    exact, found = dimension(full), pd.DataFrame(sketches(full, 16, 400))
    assert abs(found["trace"].mean() - exact["trace"]) < 3 * found["trace"].sem()
    assert found["participation"].mean() == pytest.approx(exact["participation"], rel=0.06)
    assert found["effective_rank"].mean() < 0.85 * exact["effective_rank"]


def test_a_sketch_of_all_directions_is_exact():
    full = planted([0.7**i for i in range(24)])
    [found] = sketches(full, 24, 1)
    assert found == pytest.approx(dimension(full), rel=1e-9)
    turn = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(5), dtype=torch.float64)).Q
    whole = sketched_participation(turn.T @ full @ turn, 24)
    assert whole == pytest.approx(dimension(full)["participation"], rel=1e-9)


def test_sketched_effective_rank_rises_to_the_exact_one():
    full = planted([0.7**i for i in range(24)])
    means = [np.mean([one["effective_rank"] for one in sketches(full, k, 40)]) for k in (4, 8, 16, 24)]
    assert means == sorted(means) and means[-1] == pytest.approx(dimension(full)["effective_rank"])

"""A planted norm detector is found; deletions from sums match the table without a prompt."""

import numpy as np
import pytest
import torch

from diagnostics.dictionary_comparison.quartiles import Sample, gradient_ratios, quartile_shares, without_each
from diagnostics.statistics.jackknife import from_deletions
from sae_models.active_latents import ActiveLatents

N_PROMPTS, EACH, D_SAE = 24, 20, 6


def planted(seed: int = 0) -> tuple[ActiveLatents, Sample]:
    """Latent 0 fires in the fourth quartile alone, 1 everywhere, 2 never, the others at random."""
    rng = np.random.default_rng(seed)
    n = N_PROMPTS * EACH
    quartile = rng.permutation(np.arange(n) % 4)
    z = rng.random((n, D_SAE)) * (rng.random((n, D_SAE)) < 0.3)
    z[:, 0], z[:, 1], z[:, 2] = quartile == 3, 1.0, 0.0
    token, latent = z.nonzero()
    prompt = np.repeat(np.arange(N_PROMPTS), EACH)
    sample = Sample(prompt, np.tile(np.arange(EACH), N_PROMPTS), torch.zeros(n, 1), quartile)
    return ActiveLatents(token, latent, z[token, latent].astype(np.float32), n, D_SAE), sample


def chosen(*latents: int) -> np.ndarray:
    return np.isin(np.arange(D_SAE), latents)


def test_a_norm_detector_is_found():
    active, sample = planted()
    found = quartile_shares(active, sample, chosen(0))
    assert [e.value for e in found] == [0, 0, 0, 1] and 0.5 < found[3].low < found[3].high == 1
    even = quartile_shares(active, sample, chosen(1))
    np.testing.assert_allclose([e.value for e in even], 0.25)
    assert all(e.low < 0.25 < e.high and e.n_prompts == N_PROMPTS for e in even)
    both = quartile_shares(active, sample, chosen(0, 1))
    np.testing.assert_allclose([e.value for e in both], [0.125, 0.125, 0.125, 0.625])
    assert all(np.isnan(e.value) for e in quartile_shares(active, sample, chosen(2)))


def test_intervals_match_shares_computed_without_each_prompt():
    active, sample = planted(1)
    members = chosen(0, 3, 4)

    def shares(keep: np.ndarray) -> np.ndarray:
        rows = []
        for latent in np.flatnonzero(members):
            own = active.token[(active.latent == latent) & keep[active.token]]
            rows.append([(sample.quartile[own] == q).mean() for q in range(4)])
        return np.mean(rows, axis=0)

    whole = shares(np.ones(len(sample.prompt), dtype=bool))
    without = np.array([shares(sample.prompt != g) for g in range(N_PROMPTS)])
    for q, found in enumerate(quartile_shares(active, sample, members)):
        fired = np.bincount(sample.prompt[active.token[members[active.latent]]], minlength=N_PROMPTS)
        expected = from_deletions(whole[q], without[:, q], fired, transform="logit")
        assert found.n_effective == pytest.approx(fired.sum() ** 2 / (fired**2).sum())
        for end in ("value", "low", "high", "se"):
            assert getattr(found, end) == pytest.approx(getattr(expected, end), abs=1e-12)


def test_gradient_ratios_of_planted_gradients():
    """Latent 3 is three times as strong in the fourth quartile as in the first, latent 4 equally strong, latent 5 too rare."""
    active, sample = planted(2)
    quartile = sample.quartile[active.token]
    rng = np.random.default_rng(0)
    value = np.where((active.latent == 3) & (quartile == 3), 3.0, 1.0) * (1 + 0.01 * rng.random(len(active)))
    keep = np.isin(active.latent, (3, 4)) | ((active.latent == 5) & (quartile != 0))
    some = active.token[keep], active.latent[keep] * 4 + quartile[keep]
    ratio, above = gradient_ratios(
        sample.prompt[some[0]], some[1], value[keep], D_SAE, np.arange(N_PROMPTS), at_least=5
    )
    np.testing.assert_allclose(ratio, [np.nan, np.nan, np.nan, 3, 1, np.nan], rtol=0.01)
    assert above.value == 0.5 and above.n_prompts == N_PROMPTS


def test_sums_without_each_prompt():
    active, sample = planted(3)
    prompt = sample.prompt[active.token]
    found = list(without_each(prompt, active.latent, D_SAE, range(N_PROMPTS), active.z.astype(float)))
    for place, (count, total) in enumerate(found):
        keep = prompt != place - 1  # the first is of all
        np.testing.assert_allclose(count, np.bincount(active.latent[keep], minlength=D_SAE))
        np.testing.assert_allclose(total, np.bincount(active.latent[keep], active.z[keep], D_SAE), atol=1e-9)

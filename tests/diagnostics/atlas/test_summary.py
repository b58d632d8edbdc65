"""Statistics of an atlas against loops over tokens and planted truths."""

import numpy as np
import pytest
from scipy import stats

from diagnostics.atlas.summary import FIRST, ByToken, calibration, first_of, rank_correlations, score_statistics


def table(seed: int = 0, prompts: int = 12, tokens: int = 6, latents: int = 14):
    """Prompts of some tokens with about so many latents each, in a shuffled order."""
    stream = np.random.default_rng(seed)
    prompt, position = np.divmod(
        np.repeat(np.arange(prompts * tokens), stream.integers(10, latents, prompts * tokens)), tokens
    )
    order = stream.permutation(len(prompt))
    return prompt[order], position[order], stream


def test_rank_correlations_match_scipy_token_by_token():
    prompt, position, stream = table()
    one, other = stream.normal(size=(2, len(prompt)))
    other += one
    tokens = ByToken.of(prompt, position)
    rho = rank_correlations(tokens, tokens.ranks(one), tokens.ranks(other))
    top = first_of(tokens, tokens.ranks(one), 3)
    seen = list(zip(prompt, position, strict=True))
    for i, (p, q) in enumerate(sorted(set(seen))):
        own = np.array([s == (p, q) for s in seen])
        assert tokens.prompt[i] == p and tokens.count[i] == own.sum()
        np.testing.assert_allclose(rho[i], stats.spearmanr(one[own], other[own]).statistic, atol=1e-12)
        assert set(one[own & top]) == set(np.sort(one[own])[-3:])


def test_perfect_and_useless_scores():
    prompt, position, stream = table(1, prompts=40)
    effect = np.exp(stream.normal(size=len(prompt)))
    tokens = ByToken.of(prompt, position)
    best = score_statistics(-effect, effect, tokens)  # a score counts by its size
    assert [best[name].value for name in ("rank", "recall", "captured", "false_negatives")] == [1, 1, 1, 0]
    none = score_statistics(stream.normal(size=len(prompt)), effect, tokens)
    assert none["rank"].low < 0 < none["rank"].high and none["false_negatives"].low < 0.5 < none["false_negatives"].high
    chance = (FIRST / tokens.count).mean()
    assert none["recall"].low < chance < none["recall"].high and none["captured"].value < 0.7


def test_false_negatives_by_hand():
    prompt, position = np.repeat(np.arange(20), 5), np.zeros(100, dtype=int)
    effect, score = np.arange(100.0), np.arange(100.0)
    score[[95, 97, 99]] = 0.0  # three of the ten largest are scored below the median
    found = score_statistics(score, effect, ByToken.of(prompt, position))["false_negatives"]
    assert found.value == pytest.approx(0.3) and found.n_rows == 10


def test_calibration_bins():
    predicted = np.linspace(0, 1, 1000)
    bins = calibration(predicted, 2 * predicted, bins=10)
    assert [b["rows"] for b in bins] == [100] * 10
    assert all(b["low"] < b["median"] < b["high"] and b["median"] == pytest.approx(2 * b["predicted"]) for b in bins)
    assert calibration(np.zeros(0), np.zeros(0)) == []

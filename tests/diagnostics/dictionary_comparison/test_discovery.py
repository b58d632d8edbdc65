"""Planted gaps: latents that one dictionary lacks count as discovery, the same latents with less noise as separability."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from diagnostics.dictionary_comparison.discovery import _folds, _held_out, discovery_split
from diagnostics.statistics.jackknife import jackknife
from interventions import ResultError
from interventions.texts.groups import first_of_group

N, CLASSES = 120, 3
LABELS = [f"class {i % CLASSES}" for i in range(N)]
KIND = np.arange(N) % CLASSES
PAIRS = np.array([[0, 3], [1, 4], [2, 5]])


def latents(noise: float, seed: int) -> np.ndarray:
    """A latent for each class."""
    return np.eye(CLASSES)[KIND] + noise * np.random.default_rng(seed).normal(size=(N, CLASSES))


def noise_of(n: int) -> np.ndarray:
    return 0.1 * np.random.default_rng(7).normal(size=(N, n))


def test_gap_from_missing_latents_is_discovery():
    """B has A's noisy latents, and clean ones."""
    a = latents(1.0, 0)
    b = np.concatenate([3 * latents(0.1, 1), a], axis=1)  # larger, so that these are chosen
    found = discovery_split(a, b, PAIRS, LABELS)
    assert found.gap.value > 0.15 and found.gap.low > 0
    assert found.separability.value == 0
    assert found.share.value == pytest.approx(1)
    assert found.accuracy["b"].value > 0.99 and found.n_tasks == CLASSES
    assert found.accuracy["b_matched"].value == found.accuracy["a_matched"].value == found.accuracy["a"].value


def test_gap_from_less_noise_is_separability():
    a = latents(1.0, 0)
    b = np.concatenate([noise_of(3), latents(0.1, 1)], axis=1)
    found = discovery_split(a, b, PAIRS, LABELS)
    assert found.separability.value == pytest.approx(found.gap.value) and found.gap.low > 0.1
    assert found.discovery.value == pytest.approx(0) and found.share.kind == "bounded"
    parts = found.as_dict()
    assert parts["texts"] == N and parts["gap"]["value"] == found.gap.value


def test_swapping_the_dictionaries_changes_the_signs():
    a, b = latents(0.8, 0), np.concatenate([latents(0.5, 1), noise_of(3)], axis=1)[:, [3, 4, 5, 0, 1, 2]]
    one, other = discovery_split(a, b, PAIRS, LABELS), discovery_split(b, a, PAIRS[:, ::-1], LABELS)
    for part in ("gap", "separability", "discovery"):
        assert getattr(one, part).value == pytest.approx(-getattr(other, part).value)
    assert one.accuracy["a_matched"] == other.accuracy["b_matched"]


@pytest.mark.parametrize("k", [1, 2])
def test_accuracy_matches_scikit_learn_probes(k):
    a = np.concatenate([latents(0.7, 0), noise_of(4) * 5], axis=1)
    found = discovery_split(a, latents(0.5, 1), PAIRS % 3, LABELS, k=k, folds=4, seed=3)
    fold = _folds(np.array(LABELS), np.arange(N), 4, 3)
    assert all((np.bincount(fold[c == KIND]) == 10).all() for c in range(CLASSES))
    scores = []
    for c in range(CLASSES):
        y, right = c == KIND, np.zeros(N, dtype=bool)
        for held in range(4):
            fit = fold != held
            best = np.argsort(-np.abs(a[fit & y].mean(0) - a[fit & ~y].mean(0)))[:k]
            x = (a[:, best] - a[fit][:, best].mean(0)) / a[fit][:, best].std(0)
            probe = LogisticRegression(class_weight="balanced").fit(x[fit], y[fit])
            right[~fit] = (probe.predict(x) == y)[~fit]
        scores.append((right[y].mean() + right[~y].mean()) / 2)
    assert found.accuracy["a"].value == pytest.approx(np.mean(scores))


def test_two_classes_are_one_task_and_invalid_input_raises():
    two = np.array(LABELS)[KIND < 2]
    a = latents(0.5, 0)[KIND < 2]
    assert discovery_split(a, a, PAIRS % 3, list(two)).n_tasks == 1
    assert discovery_split(a, a, PAIRS % 3, list(two)).gap.value == 0
    for pairs, labels, message in (
        (np.zeros((0, 2), dtype=int), list(two), "expected"),
        (PAIRS % 3, list(two[:-1]), "for 79 labels"),
        (PAIRS % 3, ["one"] * len(two), "1 classes"),
    ):
        with pytest.raises(ResultError, match=message):
            discovery_split(a, a, pairs, labels)
    with pytest.raises(ResultError, match="3 groups for 80 labels"):
        discovery_split(a, a, PAIRS % 3, list(two), groups=["a", "b", "c"])
    with pytest.raises(ResultError, match=r"at least 3 texts \(or groups of texts\), 5 folds"):
        discovery_split(a, a, PAIRS % 3, list(two), groups=[str(i % 6) for i in range(80)])


def test_groups_are_not_split_between_folds_or_deletions():
    group = np.arange(N) // CLASSES // 4 * CLASSES + KIND  # ten of four texts a class
    group = first_of_group(group.tolist())
    fold = _folds(np.array(LABELS), group, 5, 0)
    assert all(len(set(fold[group == g])) == 1 for g in group) and len(set(group)) == 30
    assert all((np.bincount(fold[c == KIND]) == 8).all() for c in range(CLASSES))
    a, b = latents(0.9, 0), latents(0.5, 1)
    names = [f"group {g}" for g in group]
    found = discovery_split(a, b, PAIRS % 3, LABELS, groups=names)
    assert (found.n_texts, found.n_groups, found.gap.n_rows, found.gap.n_prompts) == (N, 30, N, 30)
    right = {}
    for name, x in (("a", a), ("b", b)):
        right[name] = _held_out(x, [np.array(LABELS) == f"class {c}" for c in range(CLASSES)], fold, 1)

    def accuracy(keep):
        both = [[(hit[keep & (c == KIND)].mean() + hit[keep & (c != KIND)].mean()) / 2 for c, hit in enumerate(right[n])] for n in "ab"]  # fmt: skip
        return np.mean(both[1]) - np.mean(both[0])

    known = jackknife(accuracy, N, group)
    assert (found.gap.value, found.gap.low, found.gap.high) == pytest.approx((known.value, known.low, known.high))

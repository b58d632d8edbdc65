"""Probes on a task with planted latents, and against a scikit-learn pipeline."""

import functools

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, log_loss, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from diagnostics.sparse_probing.probes import KINDS, ranked, task_probes
from diagnostics.sparse_probing.tasks import Task, tasks
from interventions import ResultError

N, D_SAE, KS = 120, 50, (1, 3, 80)
PLANTED, SECOND, DEAD = 7, 31, 20
"""Latents: one equals the class, with negative sign; one predicts it in part, on a larger scale; from DEAD on, five never fire."""


def planted() -> tuple[torch.Tensor, np.ndarray, Task]:
    """Latents and activations of texts, the task of class `b`."""
    rng = np.random.default_rng(0)
    labels = ["ab"[i % 2] for i in range(N)]
    own = np.array(labels) == "b"
    z = rng.exponential(size=(N, D_SAE)) * (rng.random((N, D_SAE)) < 0.3)
    z[:, PLANTED] = -5 * own * (1 + rng.random(N))
    z[:, SECOND] = 3 * (own == (rng.random(N) < 0.8))
    z[:, DEAD : DEAD + 5] = 0
    x = rng.normal(size=(N, 9)) + own[:, None]
    task = tasks([f"text {i}" for i in range(N)], labels, np.ones(N, dtype=bool))["b"]
    return torch.from_numpy(z).float(), x, task


@functools.cache
def probes(seed: int = 0) -> dict[tuple[str, int], tuple[dict, np.ndarray]]:
    z, x, task = planted()
    found = task_probes(z, x, task, KS, 1.0, torch.Generator().manual_seed(seed))
    return {(line["kind"], line["k"]): (line, logits) for line, logits in found}


def chosen(line: dict) -> list[int]:
    return [int(latent) for latent in line["latents"].split()]


def test_planted_latents_are_found_and_controls_are_at_chance():
    found = probes()
    assert list(dict.fromkeys(kind for kind, _ in found)) == list(KINDS)
    first = found["selected", 1][0]
    assert chosen(first) == [PLANTED] == chosen(found["best", 1][0])
    assert first["accuracy"] == first["auc"] == first["balanced_accuracy"] == 1
    assert chosen(found["selected", 3][0])[:2] == [PLANTED, SECOND]
    lots = [probes(seed) for seed in range(8)]
    by_chance = [lot["random", 1][0]["accuracy"] for lot in lots if PLANTED not in chosen(lot["random", 1][0])]
    assert abs(np.mean(by_chance) - 0.5) < 0.15  # 8 × 36 texts, SECOND among them: 3 standard errors and a little
    assert found["all", 0][0]["n_features"] == D_SAE - 5 == found["selected", 80][0]["n_features"]
    assert found["raw", 0][0]["n_features"] == 9 and found["raw", 0][0]["latents"] == ""


def test_random_latents_are_nested_distinct_and_active():
    firsts = set()
    for seed in range(8):
        found = probes(seed)
        few, many, every = (chosen(found["random", k][0]) for k in KS)
        assert many[:1] == few and every[:3] == many and len(set(every)) == D_SAE - 5
        assert not set(every) & set(range(DEAD, DEAD + 5))
        firsts.add(few[0])
    assert len(firsts) > 4


@pytest.mark.parametrize("key", [("selected", 3), ("random", 3), ("all", 0), ("raw", 0), ("best", 1)], ids=str)
def test_probes_match_a_scikit_learn_pipeline(key):
    z, x, task = planted()
    line, logits = probes()[key]
    features = x if key[0] == "raw" else z.double().numpy()
    if line["latents"]:
        features = features[:, chosen(line)]
    plain = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-12, max_iter=10_000))
    plain.fit(features[task.train], task.y_train)
    np.testing.assert_allclose(logits, plain.decision_function(features[task.test]), atol=2e-4)  # lbfgs's tolerance
    p = plain.predict_proba(features[task.test])[:, 1]
    assert line["accuracy"] == pytest.approx(plain.score(features[task.test], task.y_test))
    assert line["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(task.y_test, p > 0.5))
    assert line["auc"] == pytest.approx(roc_auc_score(task.y_test, p))
    assert line["cross_entropy"] == pytest.approx(log_loss(task.y_test, p), abs=1e-4)
    fit_on = plain.predict_proba(features[task.train])[:, 1]
    assert line["cross_entropy_train"] == pytest.approx(log_loss(task.y_train, fit_on), abs=1e-4)
    assert line["n_groups"] == line["n_test"] == len(task.test)  # each text its own
    assert line["accuracy_low"] <= line["accuracy"] <= line["accuracy_high"]


def test_best_latent_minimises_the_training_loss():
    z, _, task = planted()
    z[:, PLANTED] = 0
    best = {
        (line["kind"], line["k"]): line
        for line, _ in task_probes(z, z.double().numpy(), task, (1,), 1.0, torch.Generator())
    }["best", 1]
    losses = {}
    for latent in range(D_SAE):
        feature = z[:, [latent]].double().numpy()[task.train]
        plain = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-10)).fit(feature, task.y_train)
        losses[latent] = log_loss(task.y_train, plain.predict_proba(feature)[:, 1])
    assert chosen(best) == [min(losses, key=losses.get)]
    assert best["cross_entropy_train"] == pytest.approx(min(losses.values()), abs=1e-6)


def test_latents_are_ranked_by_absolute_mean_difference():
    z = torch.tensor([[3.0, 0, -9, 1], [1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, -1]])
    assert ranked(z, np.array([True, True, False, False])).tolist() == [2, 0, 3, 1]
    assert ranked(torch.zeros(4, 3), np.array([True, True, False, False])).tolist() == [0, 1, 2]


def test_held_out_texts_affect_neither_selection_nor_fit():
    z, x, task = planted()
    told = z.clone()
    told[torch.from_numpy(task.test), 0] = 100 * torch.from_numpy(task.y_test).float()

    def fits(z: torch.Tensor) -> list[tuple]:
        found = task_probes(z, x, task, KS, 1.0, torch.Generator().manual_seed(0))
        return [tuple(line[name] for name in ("kind", "k", "latents", "cross_entropy_train")) for line, _ in found]

    assert fits(told) == fits(z)


def test_an_sae_that_never_fires_raises():
    z, x, task = planted()
    with pytest.raises(ResultError, match="no latent is active on any of 84 training texts"):
        task_probes(torch.zeros_like(z), x, task, KS, 1.0, torch.Generator())

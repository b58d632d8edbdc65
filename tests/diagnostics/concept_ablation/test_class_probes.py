"""Probes of classes, against scikit-learn's own pipeline."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from diagnostics.concept_ablation.class_probes import C, fit_probes
from interventions.errors import ResultError


def test_probes_match_a_scikit_learn_pipeline():
    generator = np.random.default_rng(0)
    labels = np.repeat(["a", "b", "c"], 20)
    x = generator.normal(size=(60, 8)) * np.linspace(0.1, 5, 8) + np.array([[0, 1, 2][ord(l) - 97] for l in labels])[:, None]  # noqa: E741  # fmt: skip
    ranking = np.arange(60) % 2 == 0
    found = fit_probes(x, labels.tolist(), ranking)
    assert found.classes == ("a", "b", "c")
    for i, name in enumerate(found.classes):
        pipeline = make_pipeline(
            StandardScaler(), LogisticRegression(C=C, class_weight="balanced", tol=1e-10, max_iter=2000)
        ).fit(x[ranking], labels[ranking] == name)
        np.testing.assert_allclose(found.logits(x)[:, i], pipeline.decision_function(x), rtol=1e-4, atol=1e-5)
        right = pipeline.predict(x[~ranking]) == (labels[~ranking] == name)
        own = labels[~ranking] == name
        assert found.accuracy[name] == pytest.approx((right[own].mean() + right[~own].mean()) / 2)
        assert np.array_equal(found.of(name), found.weight[i])


def test_one_class_raises():
    with pytest.raises(ResultError, match="expected two or more"):
        fit_probes(np.zeros((8, 2)), ["a"] * 8, np.arange(8) < 4)

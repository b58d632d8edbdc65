"""Logistic fits against scikit-learn's other solvers, and against what must hold at an optimum."""

import warnings

import numpy as np
import pytest
import torch
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.preprocessing import StandardScaler

from diagnostics.statistics.jackknife import jackknife
from diagnostics.statistics.logistic import auc, cross_entropies, fitted, many_fits, one_latent_fits
from interventions import ResultError


def sample(n: int = 60, d: int = 7, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Texts × features of unequal scale, some sparse, one constant, one that separates the classes; and their class."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2 == 0
    x = rng.normal(size=(n, d)) * 10.0 ** rng.integers(-3, 4, d) + rng.normal(size=d)
    x[:, 1] = np.where(rng.random(n) < 0.15, rng.exponential(size=n), 0)
    x[:, 2] = 0.7
    x[:, 3] = y * rng.exponential(size=n) * 40
    x[:, 4] += 2 * y * x[:, 4].std()
    return x, y


def reference(x: np.ndarray, y: np.ndarray, c: float) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and loss of each text by another solver (the objective is strictly convex but for a constant feature)."""
    u = StandardScaler().fit_transform(x)
    probe = LogisticRegression(C=c, solver="lbfgs", tol=1e-12, max_iter=10_000).fit(u, y)
    return probe.predict_proba(u)[:, 1], probe.coef_[0]


@pytest.mark.parametrize(
    "c", [0.03, 1.0, 300.0]
)  # mostly penalty, the default, nearly none (separable latents run off)
def test_one_latent_fits_match_scikit_learn(c):
    x, y = sample()
    found = one_latent_fits(torch.from_numpy(x), y, c)
    for i in range(x.shape[1]):
        p, _ = reference(x[:, [i]], y, c)
        own = expit(float(found.weight[i]) * x[:, i] + float(found.bias[i]))
        np.testing.assert_allclose(own, p, atol=2e-5)  # lbfgs stops where its gradient is small
        assert float(found.cross_entropy[i]) == pytest.approx(log_loss(y, p), abs=1e-6)
    assert float(found.weight[2]) == 0 and float(found.cross_entropy[2]) == pytest.approx(np.log(2))


def test_one_latent_fits_are_independent_optima():
    x, y = sample(200, 40, 1)
    z = torch.from_numpy(x)
    found = one_latent_fits(z, y)
    alone = one_latent_fits(z[:, 7:8], y)
    assert float(alone.weight[0]) == pytest.approx(float(found.weight[7]), rel=1e-9)
    scale = z.std(0, correction=0)
    miss = torch.sigmoid(z * found.weight + found.bias) - torch.from_numpy(y)[:, None].double()
    slope = (found.weight * scale) + (miss * (z - z.mean(0)) / scale.clamp(min=1e-30)).sum(0)
    steep = torch.stack([slope, miss.sum(0)])[:, [i for i in range(40) if i != 2]]
    assert float(steep.abs().amax()) < 1e-7  # the gradient is 0; sums of 200 terms in float64
    moved = one_latent_fits(-3 * z + 5, y)
    torch.testing.assert_close(moved.cross_entropy, found.cross_entropy, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(-3 * moved.weight, found.weight, rtol=1e-6, atol=1e-12)


def test_labels_of_one_class_raise():
    for y in (np.ones(60, dtype=bool), np.zeros(60, dtype=bool), np.arange(59) % 2 == 0):
        with pytest.raises(ResultError, match="expected one label a text, of both kinds"):
            one_latent_fits(torch.from_numpy(sample()[0]), y)


def test_fits_do_not_depend_on_block_size(monkeypatch):
    x, y = sample()
    whole = one_latent_fits(torch.from_numpy(x), y)
    monkeypatch.setattr("diagnostics.statistics.logistic._ENTRIES", 2 * len(x))
    parts = one_latent_fits(torch.from_numpy(x), y)
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-9, atol=0)


@pytest.mark.parametrize("d", [5, 90])  # fewer features than texts; more, which are turned first
def test_multi_feature_fits_match_scikit_learn(d):
    x, y = sample(40, d)
    fit = fitted(x, y, 0.5)
    p, coefficients = reference(x, y, 0.5)
    np.testing.assert_allclose(expit(fit.logits(x)), p, atol=2e-5)
    np.testing.assert_allclose(fit.weight * x.std(0), coefficients, atol=2e-5)
    assert fit.weight[2] == 0
    one = one_latent_fits(torch.from_numpy(x[:, 4:5]), y, 0.5)
    alone = fitted(x[:, 4:5], y, 0.5)
    assert alone.weight[0] == pytest.approx(float(one.weight[0]), rel=1e-6)
    assert alone.bias == pytest.approx(float(one.bias[0]), rel=1e-6, abs=1e-9)


def test_scores_of_held_out_texts():
    rng = np.random.default_rng(3)
    y = np.arange(30) < 15
    logits = np.round(rng.normal(size=30) + y, 1)  # ties
    losses = cross_entropies(logits, y)
    assert losses.mean() == pytest.approx(log_loss(y, expit(logits)))
    assert cross_entropies(np.array([1e4, -1e4]), np.array([True, True])).tolist() == [0, 1e4]
    # Each text alone; groups of one kind; groups of both kinds.
    for group in (np.arange(30), np.repeat(np.arange(15), 2) + (np.arange(30) == 15), np.arange(30) % 12):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an interval from few groups
            found = auc(logits, y, group)
            loop = jackknife(lambda keep: roc_auc_score(y[keep], logits[keep]), 30, group)
        assert found.value == pytest.approx(roc_auc_score(y, logits))
        assert (found.low, found.high) == pytest.approx((loop.low, loop.high))
        assert (found.n_rows, found.n_prompts) == (30, len(set(group)))


def test_balanced_fit_weights_classes_equally():
    x, y = sample(60, 6)
    keep = np.flatnonzero(y | (np.arange(60) % 4 == 1))  # 30 of the class, 15 others
    thrice = np.r_[keep, keep[~y[keep]]]  # the others twice: kinds of equal number and weight
    few, many = fitted(x[keep], y[keep], 1.0, balanced=True), LogisticRegression(class_weight="balanced", tol=1e-10)
    u = StandardScaler().fit_transform(x[keep])
    many.fit(u, y[keep])
    np.testing.assert_allclose(few.logits(x[keep]), many.decision_function(u), atol=2e-4)
    again = LogisticRegression(C=0.75, tol=1e-10).fit(StandardScaler().fit(x[keep]).transform(x[thrice]), y[thrice])
    np.testing.assert_allclose(few.logits(x[keep]), again.decision_function(u), atol=2e-4)  # 45/(2·30) = .75


@pytest.mark.parametrize("n_features", [1, 3, 50])
def test_many_fits_match_single_fits(n_features):
    """With constant features, more features than texts, labels of their own, and shares that are whole: texts that repeat or are absent."""
    rng = np.random.default_rng(n_features)
    x, y = rng.normal(3, 5, size=(6, 40, n_features)), rng.random((6, 40)) < 0.4
    x[0, :, 0] = 7
    share = rng.integers(0, 3, size=y.shape)
    weight, bias = many_fits(*(torch.from_numpy(part.astype(float)) for part in (x, y, share)), 0.5)
    for i in range(len(x)):
        times = np.repeat(np.arange(40), share[i])
        alone = fitted(x[i][times], y[i][times], 0.5)
        np.testing.assert_allclose(weight[i], alone.weight, atol=1e-6)
        np.testing.assert_allclose(bias[i], alone.bias, atol=1e-5)

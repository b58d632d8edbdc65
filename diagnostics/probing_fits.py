"""Logistic probes: all one-latent fits at once, fits on several features, full probes of classes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy import ndarray
from torch import Tensor

from diagnostics import statistics
from diagnostics.probing_tasks import tasks
from diagnostics.statistics import Estimate
from interventions.errors import ResultError

_ITERATIONS, _TOLERANCE = 50, 1e-10
_ENTRIES = 2**22  # of texts × latents, held several times


@dataclass(frozen=True, eq=False)
class OneLatentFits:
    """A logistic probe on each latent alone: P(class) = σ(weight·z + bias)."""

    weight: Float[Tensor, "latent"]
    """on the latent's own scale; 0 for one that is constant on the texts"""
    bias: Float[Tensor, "latent"]
    cross_entropy: Float[Tensor, "latent"]
    """mean over the texts fitted on, nats"""


@torch.no_grad()
def one_latent_fits(
    z: Float[Tensor, "text latent"], y: Bool[ndarray, "text"], inverse_penalty: float = 1.0
) -> OneLatentFits:
    """Newton's method for every latent at once.

        min over w, b of  ½w² + C · Σ_texts CE(y, σ(w·ẑ + b)),   ẑ = (z − mean)/sd,  C = inverse_penalty

    z: pooled latents, any scale. y: true for the class. The optimum is scikit-learn's LogisticRegression(C=C) of the standardised
    latent, to rounding. Steps are halved where the objective would rise. Source: the probes of arXiv:2406.04093 (Newton's method); the
    penalty is ours: without one a latent that separates the texts has no finite optimum. Raises `ResultError` for texts of one kind.
    """
    if len(y) != len(z) or y.all() or not y.any():
        raise ResultError(
            f"{len(z)} texts, {int(y.sum())} of {len(y)} of the class; expected one label a text, of both kinds"
        )
    few = max(1, _ENTRIES // max(1, len(z)))
    truth = torch.from_numpy(y).to(z.device, torch.float64)
    parts = [_newton(some.double(), truth, inverse_penalty) for some in z.split(few, dim=1)]
    weight, bias, loss = (torch.cat(part).to(z.dtype) for part in zip(*parts, strict=True))
    return OneLatentFits(weight, bias, loss)


def _newton(z: Tensor, y: Tensor, c: float) -> tuple[Tensor, Tensor, Tensor]:
    mean, sd = z.mean(0), z.std(0, correction=0)
    flat = sd <= 1e-12 * z.abs().amax(0)
    u = torch.where(flat, 0, (z - mean) / torch.where(flat, 1, sd))
    sign = (1 - 2 * y)[:, None]

    def losses(w: Tensor, b: Tensor) -> Tensor:
        return torch.nn.functional.softplus(sign * (u * w + b)).sum(0)

    w, b = torch.zeros_like(mean), torch.zeros_like(mean)
    value = 0.5 * w**2 + c * losses(w, b)
    for _ in range(_ITERATIONS):
        p = torch.sigmoid(u * w + b)
        miss, curve = p - y[:, None], p * (1 - p)
        g_w, g_b = w + c * (miss * u).sum(0), c * miss.sum(0)
        a, m, d = 1 + c * (curve * u * u).sum(0), c * (curve * u).sum(0), c * curve.sum(0)
        det = a * d - m * m
        step_w, step_b = (d * g_w - m * g_b) / det, (a * g_b - m * g_w) / det
        new = value
        for _ in range(_ITERATIONS):
            new = 0.5 * (w - step_w) ** 2 + c * losses(w - step_w, b - step_b)
            worse = new > value + 1e-12 * value.abs()
            if not bool(worse.any()):
                break
            step_w, step_b = (torch.where(worse, step / 2, step) for step in (step_w, step_b))
        w, b, value = w - step_w, b - step_b, torch.minimum(new, value)
        if bool((step_w.abs() + step_b.abs()).amax() < _TOLERANCE):
            break
    weight = torch.where(flat, 0, w / torch.where(flat, 1, sd))
    return weight, b - weight * mean, losses(w, b) / len(z)


@dataclass(frozen=True)
class Fit:
    """A logistic probe on some features: logit = x·weight + bias."""

    weight: Float[ndarray, "feature"]
    """on the features' own scale; 0 for one that is constant on the texts"""
    bias: float

    def logits(self, x: Float[ndarray, "text feature"]) -> Float[ndarray, "text"]:
        """Log odds of the class."""
        return x.astype(float) @ self.weight + self.bias


def fitted(x: Float[ndarray, "text feature"], y: Bool[ndarray, "text"], inverse_penalty: float = 1.0) -> Fit:
    """scikit-learn's LogisticRegression(C=inverse_penalty) on standardised features.

        min over w, b of  ½‖w‖² + C · Σ_texts CE(y, σ(w·x̂ + b))

    More features than texts are turned into as many as there are texts first: the optimum lies in their span, and the penalty does not
    change by turning.
    """
    from sklearn.linear_model import LogisticRegression

    x = x.astype(float)
    mean, sd = np.asarray(x.mean(0)), np.asarray(x.std(0))
    flat = sd <= 1e-12 * np.abs(x).max(0, initial=0)
    scale = np.where(flat, 1, sd)
    u = np.where(flat, 0, (x - mean) / scale)
    basis = np.linalg.qr(u.T)[0] if u.shape[1] > len(u) else None
    probe = LogisticRegression(C=inverse_penalty, solver="newton-cholesky", tol=1e-8, max_iter=1000)
    probe.fit(u if basis is None else u @ basis, y)
    w = probe.coef_[0] if basis is None else basis @ probe.coef_[0]
    weight = np.where(flat, 0, w / scale)
    return Fit(weight, float(np.ravel(probe.intercept_)[0] - weight @ mean))


def cross_entropies(logits: Float[ndarray, "text"], y: Bool[ndarray, "text"]) -> Float[ndarray, "text"]:
    """−log P(its own class) of each text, nats."""
    return np.logaddexp(0, np.where(y, -logits, logits))


def auc(score: Float[ndarray, "text"], y: Bool[ndarray, "text"]) -> Estimate:
    """The share of pairs of a text of the class and another in which the first scores higher (ties: half), by jackknife over texts."""
    higher = (score[y][:, None] > score[~y]) + 0.5 * (score[y][:, None] == score[~y])
    p, n = higher.shape
    with np.errstate(all="ignore"):
        without = np.r_[
            (higher.sum() - higher.sum(1)) / ((p - 1) * n),
            (higher.sum() - higher.sum(0)) / (p * (n - 1)),
        ]
    return statistics.from_deletions(float(higher.mean()), without, len(score))


@dataclass(frozen=True, eq=False)
class ClassProbes:
    """A logistic probe for each class against the rest, on raw activations: logit = x·weight + bias."""

    classes: tuple[str, ...]
    """of two classes the later one by name alone"""
    weight: Float[Tensor, "class d_model"]
    """on the activations' own scale, their dtype and device"""
    bias: Float[Tensor, "class"]
    accuracy: tuple[Estimate, ...]
    """of each probe, on held-out texts, half of them of the class; delete-one-text jackknife"""

    def logits(self, x: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row class"]:
        """Log odds of each class. A probe is linear: that of a token is its part of the text's mean."""
        return x.to(self.weight) @ self.weight.T + self.bias


def class_probes(
    x: Float[Tensor, "text d_model"],
    labels: Sequence[str],
    texts: Sequence[str],
    *,
    test_share: float = 0.3,
    inverse_penalty: float = 1.0,
    seed: int = 0,
) -> ClassProbes:
    """Fit a full logistic probe of each class on mean-pooled activations, such as `PooledTexts.mean_activations`.

    texts decide which are held out, as in `tasks`; texts whose activation is not finite are left out. Weights are those of the training
    texts. Raises `ResultError` for too few texts, and for lengths that do not fit.
    """
    if not len(x) == len(labels) == len(texts):
        raise ResultError(
            f"{len(x)} activations, {len(labels)} labels, {len(texts)} texts; expected one of each a text"
        )
    values = x.detach().double().cpu().numpy()
    weights, biases, accuracy = [], [], []
    found = tasks(texts, labels, np.asarray(np.isfinite(values).all(1)), test_share=test_share, seed=seed)
    for task in found.values():
        fit = fitted(values[task.train], task.y_train, inverse_penalty)
        right = (fit.logits(values[task.test]) > 0) == task.y_test
        weights.append(fit.weight)
        biases.append(fit.bias)
        accuracy.append(statistics.share(right, np.arange(len(right))))
    weight, bias = (torch.from_numpy(np.array(part)).to(x) for part in (weights, biases))
    return ClassProbes(tuple(found), weight, bias, tuple(accuracy))

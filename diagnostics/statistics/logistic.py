"""Logistic probes: all one-latent fits at once, fits on several features; how they are judged."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from diagnostics.statistics.estimate import Estimate
from diagnostics.statistics.jackknife import from_deletions
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
    truth = torch.from_numpy(y).to(z.device, torch.float64)[None]
    parts = [_one_latent(some.double(), truth, inverse_penalty) for some in z.split(few, dim=1)]
    weight, bias, loss = (torch.cat(part).to(z.dtype) for part in zip(*parts, strict=True))
    return OneLatentFits(weight, bias, loss)


def _one_latent(z: Tensor, truth: Tensor, inverse_penalty: float) -> tuple[Tensor, Tensor, Tensor]:
    x, y = z.T[..., None], truth.expand(z.shape[1], -1)
    weight, bias = many_fits(x, y, torch.ones_like(y), inverse_penalty)
    logits = (x @ weight[..., None])[..., 0] + bias[:, None]
    return weight[:, 0], bias, torch.nn.functional.softplus((1 - 2 * y) * logits).mean(-1)


@torch.no_grad()
def many_fits(
    x: Float[Tensor, "fit text feature"],
    y: Float[Tensor, "fit text"],
    share: Float[Tensor, "fit text"],
    inverse_penalty: float = 1.0,
) -> tuple[Float[Tensor, "fit feature"], Float[Tensor, "fit"]]:
    """Weights and biases of many logistic probes, each on texts, labels and shares of its own, by Newton's method in one batch.

        min over w, b of  ½‖w‖² + C · Σ_texts a·CE(y, σ(w·x̂ + b)),   x̂ = (x − mean)/sd, both weighted with a

    y: 1 for the class, else 0. share: a, from 0 up (0: the text is not there). x, y, share: float64. Each fit is that of `fitted`, to
    1e-10 of the standardised scale; weights are on the features' own scale, 0 for a feature that is constant. More features than texts
    are turned into as many as there are texts first. Steps are halved where the objective would rise. Cost: texts · features² a fit and step. Source: ours.
    """
    a = share / share.sum(-1, keepdim=True)
    mean = (a[..., None] * x).sum(1, keepdim=True)
    present = share[..., None] > 0
    sd = (a[..., None] * (x - mean).square()).sum(1, keepdim=True).sqrt()
    flat = sd <= 1e-12 * (x.abs() * present).amax(1, keepdim=True)
    scale = torch.where(flat, 1, sd)
    u = torch.where(flat | ~present, 0, (x - mean) / scale)
    basis = torch.linalg.qr(u.mT)[0] if u.shape[2] > u.shape[1] else None
    w, b = _newton(u if basis is None else u @ basis, y, inverse_penalty * share)
    w = w if basis is None else (basis @ w[..., None])[..., 0]
    weight = torch.where(flat[:, 0], 0, w / scale[:, 0])
    return weight, b - (weight * mean[:, 0]).sum(-1)


def _newton(u: Tensor, y: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    sign, n_features = 1 - 2 * y, u.shape[2]
    u = torch.cat([u, torch.ones_like(u[..., :1])], dim=-1)  # the bias is the last
    ridge = u.new_ones(n_features + 1)
    ridge[-1] = 0

    def product(w: Tensor) -> Tensor:
        return (u @ w[..., None])[..., 0]

    def objective(w: Tensor) -> Tensor:
        return 0.5 * (ridge * w * w).sum(-1) + (c * torch.nn.functional.softplus(sign * product(w))).sum(-1)

    w = torch.zeros_like(u[:, 0])
    value = objective(w)
    for _ in range(_ITERATIONS):
        p = torch.sigmoid(product(w))
        slope = ridge * w + ((c * (p - y))[..., None] * u).sum(1)
        curve = u.mT @ ((c * p * (1 - p))[..., None] * u) + ridge.diag()
        step = torch.linalg.solve(curve, slope)
        new = value
        for _ in range(_ITERATIONS):
            new = objective(w - step)
            worse = new > value + 1e-12 * value.abs()
            if not bool(worse.any()):
                break
            step = torch.where(worse[:, None], step / 2, step)
        w, value = w - step, torch.minimum(new, value)
        if bool(step.abs().amax() < _TOLERANCE):
            break
    return w[:, :-1], w[:, -1]


@dataclass(frozen=True)
class Fit:
    """A logistic probe on some features: logit = x·weight + bias."""

    weight: Float[ndarray, "feature"]
    """on the features' own scale; 0 for one that is constant on the texts"""
    bias: float

    def logits(self, x: Float[ndarray, "text feature"]) -> Float[ndarray, "text"]:
        """Log odds of the class."""
        return x.astype(float) @ self.weight + self.bias


def fitted(
    x: Float[ndarray, "text feature"], y: Bool[ndarray, "text"], inverse_penalty: float = 1.0, *, balanced: bool = False
) -> Fit:
    """scikit-learn's LogisticRegression(C=inverse_penalty) on standardised features.

        min over w, b of  ½‖w‖² + C · Σ_texts a·CE(y, σ(w·x̂ + b))

    a = 1, or where `balanced` half the texts ÷ those of the text's own kind, so that both kinds weigh alike.
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
    weights = "balanced" if balanced else None
    probe = LogisticRegression(
        C=inverse_penalty, class_weight=weights, solver="newton-cholesky", tol=1e-8, max_iter=1000
    )
    probe.fit(u if basis is None else u @ basis, y)
    w = probe.coef_[0] if basis is None else basis @ probe.coef_[0]
    weight = np.where(flat, 0, w / scale)
    return Fit(weight, float(np.ravel(probe.intercept_)[0] - weight @ mean))


def cross_entropies(logits: Float[ndarray, "text"], y: Bool[ndarray, "text"]) -> Float[ndarray, "text"]:
    """−log P(its own class) of each text, nats."""
    return np.logaddexp(0, np.where(y, -logits, logits))


def auc(score: Float[ndarray, "text"], y: Bool[ndarray, "text"], group: Int[ndarray, "text"]) -> Estimate:
    """The share of pairs of a text of the class and another in which the first scores higher (ties: half), by jackknife over groups."""
    higher = (score[y][:, None] > score[~y]) + 0.5 * (score[y][:, None] == score[~y])
    of = np.unique(group, return_inverse=True)[1]
    member = (of[:, None] == np.arange(of.max() + 1)).astype(float)
    own, others = member[y], member[~y]
    # Without a group: pairs with either text in it are gone, and those with both must not go twice.
    gone = own.T @ higher.sum(1) + others.T @ higher.sum(0) - ((own.T @ higher) * others.T).sum(1)
    with np.errstate(all="ignore"):
        without = (higher.sum() - gone) / ((len(own) - own.sum(0)) * (len(others) - others.sum(0)))
    return from_deletions(float(higher.mean()), without, member.sum(0))

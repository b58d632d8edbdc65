"""The probes of one task and their held-out scores: on selected latents, controls, and the raw activations."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from diagnostics.sparse_probing.tasks import Task
from diagnostics.statistics.logistic import auc, cross_entropies, fitted, one_latent_fits
from diagnostics.statistics.measures import mean, share
from diagnostics.statistics.tables import few_prompts
from interventions.errors import ResultError

KINDS = ("selected", "random", "best", "all", "raw")
"""Kinds of probes. `selected`: the k latents of largest |mean difference| on the training texts; `random`: k latents drawn at random
among those active there; `best`: the one-latent probe of smallest training cross-entropy; `all`: all latents active there; `raw`: the
activations, as a ceiling."""


def task_probes(
    z: Float[Tensor, "text d_sae"],
    x: Float[ndarray, "text d_model"],
    task: Task,
    ks: Sequence[int],
    inverse_penalty: float,
    stream: torch.Generator,
) -> list[tuple[dict[str, Any], Float[ndarray, "test"]]]:
    """For each probe of a task its line of the table, from `kind` on, and its logits on the held-out texts.

    z, x: latents and activations averaged over each text's tokens. stream: draws the random latents (nested in k).
    Where fewer than k latents are active all of them are used. Raises `ResultError` where none is active.
    """
    device = z.device
    train = z[torch.from_numpy(task.train).to(device)]
    active = (train != 0).any(0).nonzero()[:, 0]
    if not len(active):
        raise ResultError(
            f"no latent is active on any of {len(train)} training texts; this SAE does not fire on these texts"
        )
    train = train[:, active]
    test = z[torch.from_numpy(task.test).to(device)][:, active]
    lot = torch.randperm(z.shape[1], generator=stream).to(device)[active].argsort()
    orders, y = {"selected": ranked(train, task.y_train), "random": lot}, task.y_train
    found = []

    def add(kind: str, k: int, features: tuple[ndarray, ndarray], latents: Tensor | None = None) -> None:
        fit = fitted(features[0], y, inverse_penalty)
        line = {"kind": kind, "k": k, "n_features": features[0].shape[1], "n_train": len(y), "n_test": len(task.test)}
        line["n_groups"] = len(set(task.group_test.tolist()))
        line["cross_entropy_train"] = float(cross_entropies(fit.logits(features[0]), y).mean())
        line["latents"] = "" if latents is None else " ".join(map(str, active[latents].tolist()))
        logits = fit.logits(features[1])
        found.append((line | _judged(logits, task.y_test, task.group_test), logits))

    for kind, order in orders.items():
        for k in ks:
            chosen = order[:k]
            features = train[:, chosen].cpu().numpy(), test[:, chosen].cpu().numpy()
            add(kind, k, features, chosen)
    one = one_latent_fits(train, task.y_train, inverse_penalty).cross_entropy.argmin()[None]
    add("best", 1, (train[:, one].cpu().numpy(), test[:, one].cpu().numpy()), one)
    add("all", 0, (train.cpu().numpy(), test.cpu().numpy()))
    add("raw", 0, (x[task.train], x[task.test]))
    return found


def ranked(z: Float[Tensor, "text latent"], y: Bool[ndarray, "text"]) -> Int[Tensor, "latent"]:
    """Latents by |mean over the class − mean over the rest|, the largest first; ties by index."""
    own = torch.from_numpy(y).to(z.device)
    return (z[own].double().mean(0) - z[~own].double().mean(0)).abs().argsort(descending=True, stable=True)


def _judged(logits: Float[ndarray, "test"], y: Bool[ndarray, "test"], group: Int[ndarray, "test"]) -> dict[str, float]:
    """Scores on held-out texts, with a jackknife over their groups."""
    right = (logits > 0) == y
    with few_prompts():  # few groups: n_groups stands beside each interval
        scores = {
            "accuracy": share(right, group),
            "auc": auc(logits, y, group),
            "cross_entropy": mean(cross_entropies(logits, y), group),
        }
    line = {"balanced_accuracy": float((right[y].mean() + right[~y].mean()) / 2)}
    for name, estimate in scores.items():
        line |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return line

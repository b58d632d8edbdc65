"""Linear probes of classes on mean-pooled activations, for targeted probe perturbation."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from diagnostics.statistics.logistic import fitted
from interventions.errors import ResultError

C = 0.1
"""inverse strength of the ridge penalty on standardised activations"""


@dataclass(frozen=True)
class ClassProbes:
    """A logistic probe for each class against the others, on mean-pooled activations."""

    classes: tuple[str, ...]
    weight: Float[ndarray, "label d_model"]
    """in logits per unit of the activation"""
    bias: Float[ndarray, "label"]
    accuracy: dict[str, float]
    """balanced accuracy of each probe on texts that it was not trained on"""

    def logits(self, pooled: Float[ndarray, "text d_model"]) -> Float[ndarray, "text label"]:
        """w·x + b of each class."""
        return pooled @ self.weight.T + self.bias

    def of(self, name: str) -> Float[ndarray, "d_model"]:
        """The weights of one class."""
        return self.weight[self.classes.index(name)]


def fit_probes(
    pooled: Float[ndarray, "text d_model"], labels: Sequence[str], ranking: Bool[ndarray, "text"]
) -> ClassProbes:
    """One probe for each class, with balanced classes, fitted on the ranking half of the texts and tested on the other half.

    Activations are standardised on the ranking half, and the L2 penalty (`C`) acts on the standardised weights; `weight` is for raw
    activations. Raises `ResultError` for fewer than two classes in a half.
    """
    label = np.asarray(labels)
    classes = tuple(sorted(set(labels)))
    if any(len(set(label[side])) < 2 for side in (ranking, ~ranking)):
        raise ResultError(
            f"classes {list(classes)}; expected two or more among the texts that rank and among the others"
        )
    weights, biases, accuracy = [], [], {}
    for name in classes:
        fit = fitted(pooled[ranking], label[ranking] == name, C, balanced=True)
        right = (fit.logits(pooled[~ranking]) > 0) == (label[~ranking] == name)
        own = np.asarray(label[~ranking] == name)
        accuracy[name] = float((right[own].mean() + right[~own].mean()) / 2) if own.any() and not own.all() else np.nan
        weights.append(fit.weight)
        biases.append(fit.bias)
    return ClassProbes(classes, np.stack(weights), np.array(biases), accuracy)

"""SAEs trained on one stream of activations."""

from typing import TYPE_CHECKING

from interventions.lazy import handed_on

if TYPE_CHECKING:
    from sae_models.training.from_model import SAESpec, train_saes
    from sae_models.training.recipe import Recipe
    from sae_models.training.runs import Job, train
    from sae_models.training.trainer import SAETraining

__all__ = [
    "Job",
    "Recipe",
    "SAESpec",
    "SAETraining",
    "train",
    "train_saes",
]

_HOMES = {
    "Job": "runs",
    "Recipe": "recipe",
    "SAESpec": "from_model",
    "SAETraining": "trainer",
    "train": "runs",
    "train_saes": "from_model",
}
"""The module of each name."""
__getattr__, __dir__ = handed_on(__name__, _HOMES)

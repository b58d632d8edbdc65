"""SAEs trained on one stream of activations."""

from sae_models.training.from_model import SAESpec, train_saes
from sae_models.training.runs import Job, train
from sae_models.training.trainer import Recipe, SAETraining

__all__ = [
    "Job",
    "Recipe",
    "SAESpec",
    "SAETraining",
    "train",
    "train_saes",
]

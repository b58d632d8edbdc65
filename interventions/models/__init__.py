"""One causal language model, however it is wrapped: Hugging Face, TransformerLens, nnsight."""

from interventions.models.causal_model import CausalModel, Shapes
from interventions.models.loading import load_model
from interventions.models.weights import WRAPPED, canonical_tensors
from interventions.models.wrapping import active_adapters, wrap

__all__ = [
    "WRAPPED",
    "CausalModel",
    "Shapes",
    "active_adapters",
    "canonical_tensors",
    "load_model",
    "wrap",
]

"""One causal language model, however it is wrapped: Hugging Face, TransformerLens, nnsight."""

from typing import TYPE_CHECKING

from interventions.lazy import handed_on

if TYPE_CHECKING:
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

_HOMES = {
    "CausalModel": "causal_model",
    "Shapes": "causal_model",
    "WRAPPED": "weights",
    "active_adapters": "wrapping",
    "canonical_tensors": "weights",
    "load_model": "loading",
    "wrap": "wrapping",
}
"""The module of each name."""
__getattr__, __dir__ = handed_on(__name__, _HOMES)

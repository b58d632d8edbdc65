"""Sparse autoencoders: score → selector → linear decoder; read, trained, put into a model."""

from typing import TYPE_CHECKING

from interventions.lazy import handed_on

if TYPE_CHECKING:
    from sae_models.errors import BelongingError, CheckpointError, SAEError
    from sae_models.live import as_sae
    from sae_models.loading import load_sae
    from sae_models.sae import SAE
    from sae_models.saving import save_sae

__all__ = [
    "SAE",
    "BelongingError",
    "CheckpointError",
    "SAEError",
    "as_sae",
    "load_sae",
    "save_sae",
]

_HOMES = {
    "BelongingError": "errors",
    "CheckpointError": "errors",
    "SAE": "sae",
    "SAEError": "errors",
    "as_sae": "live",
    "load_sae": "loading",
    "save_sae": "saving",
}
"""The module of each name."""
__getattr__, __dir__ = handed_on(__name__, _HOMES)

"""Sparse autoencoders: score → selector → linear decoder; read, trained, put into a model."""

from sae_models.errors import BelongingError, CheckpointError, SAEError
from sae_models.live import as_sae
from sae_models.loading import load_sae
from sae_models.sae import SAE
from sae_models.saving import save_sae

__all__ = ["SAE", "BelongingError", "CheckpointError", "SAEError", "as_sae", "load_sae", "save_sae"]

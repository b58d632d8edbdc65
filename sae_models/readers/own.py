"""Our own folders: what `save_sae` wrote."""

from sae_models.errors import CheckpointError
from sae_models.readers.stored import Stored
from sae_models.readers.strict import Options, Tensors
from sae_models.sae import SAE
from sae_models.saving import CONFIG, WEIGHTS, is_own, own_sae
from sae_models.selectors import BatchTopK


def recognises(stored: Stored) -> bool:
    """`cfg.json` with our metadata."""
    return stored.path.name == WEIGHTS and is_own(stored.config)


def read(stored: Stored, options: Options) -> SAE:
    """The SAE as it was saved. Options: model_name, hook_name, where it was saved without."""
    if not is_own(stored.config):
        raise CheckpointError(f"{stored.path.parent} has no {CONFIG} written by save_sae")
    wide = Tensors(stored.values)
    tensors = {key: wide.take(key, *value.shape) for key, value in stored.values.items()}
    try:
        sae = own_sae(stored.config, tensors)
    except KeyError as missing:
        raise CheckpointError(f"{CONFIG} has no {missing}; it is not complete") from missing
    if isinstance(sae.selector, BatchTopK) and len(tensors["threshold"].unique()) > 1:
        raise CheckpointError(
            "a BatchTopK SAE with thresholds that differ: changed after save_sae wrote it; expected one"
        )
    sae.model_name, sae.hook_name = options.belongs(sae.model_name, sae.hook_name)
    return sae

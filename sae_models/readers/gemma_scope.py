"""Gemma Scope (arXiv:2408.05147): `params.npz`.

z = ReLU(s)·1[s > θ],   s = x W_enc + b_enc   (b_dec is not subtracted),   x̂ = z W_dec + b_dec
"""

import re

from sae_models.errors import CheckpointError
from sae_models.readers.stored import Stored
from sae_models.readers.strict import Options, Tensors
from sae_models.sae import SAE
from sae_models.scores import Inner
from sae_models.selectors import JumpReLU

_REPOSITORY = re.compile(r"gemma-scope-(?P<size>\d+b)-(?P<tuning>pt|it)-(?P<site>\w+)")
_HOOKS = {"res": "hook_resid_post", "mlp": "hook_mlp_out"}


def recognises(stored: Stored) -> bool:
    """Arrays in an `.npz`."""
    return stored.path.suffix == ".npz"


def read(stored: Stored, options: Options) -> SAE:
    """A JumpReLU SAE. Options: model_name, hook_name, where the path does not tell them.

    Where the path still has the repository's name, its transcoders, attention SAEs (which read all heads before their output
    matrix) and embedding SAEs (which read embeddings before their scaling) are refused: their files look alike.
    """
    path = stored.path.as_posix()
    repository, layer = _REPOSITORY.search(path), re.search(r"/layer_(\d+)/", path)
    model_name = hook_name = None
    if repository:
        site = repository["site"]
        if site not in _HOOKS or "/embedding/" in path:
            what = "an SAE of embeddings before they are scaled" if site in _HOOKS else f"of kind {site!r}"
            raise CheckpointError(
                f"{repository[0]} is {what}; expected one of the residual stream or of MLP outputs (res, mlp)"
            )
        model_name = f"gemma-2-{repository['size']}" + ("-it" if repository["tuning"] == "it" else "")
        hook_name = f"blocks.{layer[1]}.{_HOOKS[site]}" if layer else None
    tensors = Tensors(stored.values)
    W_enc, W_dec = tensors.pair("W_enc", "W_dec", encoder_columns=True)
    d_sae, d_model = W_dec.shape
    b_enc, b_dec = tensors.take("b_enc", d_sae), tensors.take("b_dec", d_model)
    selector = JumpReLU(tensors.take("threshold", d_sae))
    tensors.finish("a Gemma Scope SAE")
    model_name, hook_name = options.belongs(model_name, hook_name)
    return SAE(
        Inner(W_enc, b_enc),
        selector,
        W_dec,
        b_dec,
        subtract_b_dec=False,
        metadata={"layout": "gemma_scope"},
        model_name=model_name,
        hook_name=hook_name,
    )

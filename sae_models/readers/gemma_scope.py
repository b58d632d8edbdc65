"""Gemma Scope (arXiv:2408.05147): `params.npz`; and Gemma Scope 2: `params.safetensors`, names in lower case, and `config.json`.

z = ReLU(s)·1[s > θ],   s = x W_enc + b_enc   (b_dec is not subtracted),   x̂ = z W_dec + b_dec
"""

import re
from typing import NoReturn

from sae_models.errors import BelongingError, CheckpointError
from sae_models.gates import JumpReLU
from sae_models.readers.stored import Stored
from sae_models.readers.strict import Options, Tensors, setting
from sae_models.sae import SAE
from sae_models.scores import Inner

_REPOSITORY = re.compile(r"gemma-scope-(?P<size>\d+b)-(?P<tuning>pt|it)-(?P<site>\w+)")
_HOOKS = {"res": "hook_resid_post", "mlp": "hook_mlp_out"}
_REPOSITORY_2 = re.compile(
    r"gemma-scope-2-(?P<model>\d+[bm]-(?:pt|it))/.*?(?P<kind>[a-z_]+?)(?:_all)?/layer_(?P<layer>\d+)_"
)
_MODULES = {"output": "hook_resid_post", "post_feedforward_layernorm.output": "hook_mlp_out"}
"""Of Gemma 3: what stands behind `model.layers.N.` in a configuration, and the site here."""


def recognises(stored: Stored) -> bool:
    """Arrays in an `.npz`, or the names of the two matrices in lower case."""
    return stored.path.suffix == ".npz" or {"w_enc", "w_dec"} <= stored.values.keys()


def read(stored: Stored, options: Options) -> SAE:
    """A JumpReLU SAE. Options: model_name, hook_name, where neither path nor configuration tells them.

    Where the path still has the repository's name, its transcoders, attention SAEs (which read all heads before their output
    matrix) and embedding SAEs (which read embeddings before their scaling) are refused: their files look alike. Those of
    Gemma Scope 2 are refused by the configuration too.
    """
    second = "w_enc" in stored.values
    model_name, hook_name = _belongs_2(stored) if second else _belongs(stored)
    tensors = Tensors(stored.values)
    if "affine_skip_connection" in tensors:
        raise CheckpointError(
            "a transcoder (affine_skip_connection): it writes elsewhere than it reads; expected an SAE"
        )
    names = ("w_enc", "w_dec") if second else ("W_enc", "W_dec")
    W_enc, W_dec = tensors.pair(*names, encoder_columns=True)
    d_sae, d_model = W_dec.shape
    width = setting(stored.config, "width", int, type(None), default=None)
    if second and width not in (None, d_sae):
        raise CheckpointError(f"w_dec has {d_sae} latents, and config.json says width {width}; expected the same")
    b_enc, b_dec = tensors.take("b_enc", d_sae), tensors.take("b_dec", d_model)
    selector = JumpReLU(tensors.spread("threshold", d_sae))
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


def _belongs(stored: Stored) -> tuple[str | None, str | None]:
    """Model and site by the path."""
    path = stored.path.as_posix()
    repository, layer = _REPOSITORY.search(path), re.search(r"/layer_(\d+)/", path)
    if repository is None:
        return None, None
    site = repository["site"]
    if site not in _HOOKS or "/embedding/" in path:
        what = "an SAE of embeddings before they are scaled" if site in _HOOKS else f"of kind {site!r}"
        raise CheckpointError(
            f"{repository[0]} is {what}; expected one of the residual stream or of MLP outputs (res, mlp)"
        )
    model_name = f"gemma-2-{repository['size']}" + ("-it" if repository["tuning"] == "it" else "")
    return model_name, f"blocks.{layer[1]}.{_HOOKS[site]}" if layer else None


def _belongs_2(stored: Stored) -> tuple[str | None, str | None]:
    """Model and site by the configuration, or by the path where there is none."""
    if not stored.config:
        found = _REPOSITORY_2.search(stored.path.as_posix())
        if found is None:
            return None, None
        hook = {"resid_post": "hook_resid_post", "mlp_out": "hook_mlp_out"}.get(found["kind"])
        if hook is None:
            _refuse(f"of kind {found['kind']!r}", heads=found["kind"] == "attn_out")
        return _hub_name(f"gemma-3-{found['model']}"), f"blocks.{found['layer']}.{hook}"
    config = stored.config
    architecture, kind = setting(config, "architecture", str), setting(config, "type", str, default="sae")
    if (architecture, kind) != ("jump_relu", "sae"):
        _refuse(f"a {kind!r} of architecture {architecture!r}")
    read, written = (setting(config, f"hf_hook_point_{way}", str, type(None), default=None) for way in ("in", "out"))
    if written not in (None, read) or setting(config, "affine_connection", bool, default=False):
        _refuse(f"a transcoder from {read} to {written}")
    module = re.fullmatch(r"(?:model\.)?(?:language_model\.)?layers\.(\d+)\.(.+)", read or "")
    if module is None or module[2] not in _MODULES:
        _refuse(f"an SAE of {read}", heads=".self_attn." in (read or ""))
    name = setting(config, "model_name", str, type(None), default=None)
    return None if name is None else _hub_name(name), f"blocks.{module[1]}.{_MODULES[module[2]]}"


def _hub_name(model: str) -> str:
    """The hub's name of a model that Gemma Scope 2 knows as `gemma-v3-…`, or as a pretrained 270m with `-pt`."""
    return model.replace("-v3", "-3").replace("-270m-pt", "-270m")


def _refuse(what: str, *, heads: bool = False) -> NoReturn:
    if heads:
        raise BelongingError(f"{what}, inside attention heads; expected one of the residual stream or of MLP outputs")
    raise CheckpointError(f"{what}; expected an SAE (jump_relu) of the residual stream or of MLP outputs")

"""What an SAE does to its input before anything else, and undoes on its output.

Each gives `(u, scale, shift)` with x ≈ scale·u + shift, so that decoding stays linear once `scale` is folded into the latents:

    x̂ = scale·(f W_dec + b_dec) + shift = z W_dec + offset(x),   z = scale·f,   offset(x) = scale·b_dec + shift
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_models.errors import SAEError


class Normalised(NamedTuple):
    """An input as the SAE sees it, and the way back."""

    u: Float[Tensor, "*row d_model"]
    scale: Float[Tensor, "*row 1"] | None
    """None: 1"""
    shift: Float[Tensor, "*row 1"] | None
    """None: 0"""


class Identity(nn.Module):
    """u = x."""

    kind = "none"

    def forward(self, x: Float[Tensor, "*row d_model"]) -> Normalised:
        return Normalised(x, None, None)

    def settings(self) -> dict[str, object]:
        """What it takes to make this one again with `normalisation`."""
        return {"kind": self.kind}


class LayerNorm(Identity):
    """u = (x − mean(x)) / (std(x) + 1e-5), std with d_model − 1; the way back multiplies by std alone.

    Source: the released code of arXiv:2406.04093; SAELens calls it `layer_norm`.
    """

    kind = "layer_norm"
    eps = 1e-5

    def forward(self, x: Float[Tensor, "*row d_model"]) -> Normalised:
        mean = x.mean(dim=-1, keepdim=True)
        centred = x - mean
        std = centred.std(dim=-1, keepdim=True)
        return Normalised(centred / (std + self.eps), std, mean)


class ConstantNorm(Identity):
    """u = x·√d_model/‖x‖: every input has norm √d_model. SAELens calls it `constant_norm_rescale`."""

    kind = "constant_norm"

    def forward(self, x: Float[Tensor, "*row d_model"]) -> Normalised:
        scale = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        return Normalised(x / scale, scale, None)


class Centred(Identity):
    """u = x − mean(x); the way back adds the mean.

    What a model with LayerNorm adds to its residual stream may have its mean taken away without any effect on the logits:
    TransformerLens does so (`center_writing_weights`), and an SAE trained there reads centred activations.
    """

    kind = "centred"

    def forward(self, x: Float[Tensor, "*row d_model"]) -> Normalised:
        mean = x.mean(dim=-1, keepdim=True)
        return Normalised(x - mean, None, mean)


class CentredConstantNorm(ConstantNorm):
    """u = (x − mean(x))·√d_model/‖x − mean(x)‖: `ConstantNorm` of centred inputs."""

    kind = "centred_constant_norm"

    def forward(self, x: Float[Tensor, "*row d_model"]) -> Normalised:
        mean = x.mean(dim=-1, keepdim=True)
        return super().forward(x - mean)._replace(shift=mean)


CENTRED = {"none": "centred", "constant_norm": "centred_constant_norm"}
"""What a normalisation becomes where the SAE was trained on centred inputs (`layer_norm` centres them itself)."""


class Factor(Identity):
    """u = factor·x, one number for all inputs."""

    kind = "factor"
    factor: Tensor

    def __init__(self, factor: float):
        super().__init__()
        if not factor > 0:
            raise SAEError(f"inputs scaled by {factor}; expected a positive number")
        self.register_buffer("factor", torch.tensor(float(factor)), persistent=False)

    def forward(self, x: Float[Tensor, "*row d_model"]) -> Normalised:
        return Normalised(x * self.factor, (1 / self.factor).expand(*x.shape[:-1], 1), None)

    def settings(self) -> dict[str, object]:
        return {"kind": self.kind, "factor": float(self.factor)}


def normalisation(kind: str = "none", **settings: float) -> Identity:
    """By name: `none`, `layer_norm`, `constant_norm`, `centred`, `centred_constant_norm`, or `factor` with `factor=`.

    Raises `SAEError` for another name.
    """
    kinds = (Identity, LayerNorm, ConstantNorm, Factor, Centred, CentredConstantNorm)
    known = {found.kind: found for found in kinds}
    if kind not in known:
        raise SAEError(f"no input normalisation {kind!r}; known: {', '.join(known)}")
    return known[kind](**settings)

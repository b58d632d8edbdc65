"""How strongly an input matches each latent, before anything is selected.

A score is a matrix product followed by a map of each entry alone, so that a training step can form the product for all latents
without gradients, and the gradients for the selected entries alone:

    s_i = finish(<u, r_i>),    u = argument(x_c),   r_i = rows(W_dec)_i
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_models.errors import SAEError
from sae_models.selectors import Take, everything


class Argument(NamedTuple):
    """What is multiplied with the rows, and the norm that `finish` may scale by."""

    u: Float[Tensor, "*row d_model"]
    norm: Float[Tensor, "*row 1"]
    """‖x_c‖, at least 1e-8"""


class Score(nn.Module):
    """Base: rows of an encoder matrix, and a bias."""

    kind = ""
    W_enc: nn.Parameter
    b_enc: nn.Parameter | None
    reads_norm = False
    """whether `finish` depends on ‖x_c‖"""

    def __init__(self, W_enc: Float[Tensor, "d_sae d_model"], b_enc: Float[Tensor, "d_sae"] | None):
        super().__init__()
        self.W_enc = nn.Parameter(W_enc)
        self.b_enc = None if b_enc is None else nn.Parameter(b_enc)

    def argument(self, x_c: Float[Tensor, "*row d_model"]) -> Argument:
        """u and ‖x_c‖."""
        return Argument(x_c, norm_of(x_c))

    def rows(self, W_dec: Float[Tensor, "d_sae d_model"]) -> Float[Tensor, "d_sae d_model"]:
        """The directions that u is multiplied with."""
        return self.W_enc

    def finish(self, product: Tensor, norm: Tensor, take: Take = everything) -> Tensor:
        """From <u, r_i> to s_i. product `[*row, d_sae]` with norm `[*row, 1]`, or both of the same shape at single entries."""
        return product if self.b_enc is None else product + take(self.b_enc)

    def forward(
        self, x_c: Float[Tensor, "*row d_model"], W_dec: Float[Tensor, "d_sae d_model"]
    ) -> Float[Tensor, "*row d_sae"]:
        """s `[*row, d_sae]` for centred inputs."""
        u, norm = self.argument(x_c)
        return self.finish(u @ self.rows(W_dec).T, norm)


def norm_of(x_c: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row 1"]:
    """‖x_c‖, at least 1e-8, kept."""
    return x_c.norm(dim=-1, keepdim=True).clamp(min=1e-8)


def unit_rows(matrix: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
    """Rows of norm 1 (a row of zeros stays)."""
    return matrix / matrix.norm(dim=-1, keepdim=True).clamp(min=1e-8)


class Inner(Score):
    """s_i = <w_i, x_c> + b_i."""

    kind = "inner"


class Tied(Score):
    """s_i = <d_i, x_c> + b_i: the encoder is the decoder. The baseline of `Aligned`."""

    kind = "tied"

    def __init__(self, b_enc: Float[Tensor, "d_sae"]):
        nn.Module.__init__(self)
        self.b_enc = nn.Parameter(b_enc)

    def rows(self, W_dec: Float[Tensor, "d_sae d_model"]) -> Float[Tensor, "d_sae d_model"]:
        return W_dec


class Aligned(Score):
    """s_i = <w_i, x_c> + b_i with <w_i, d_i> = 1 whatever the parameters v_i, d_i are:

        w_i = d_i/‖d_i‖² + (I − d_i d_iᵀ/‖d_i‖²) v_i

    Here `W_enc` holds v; v = d starts from the tied encoder. Our reconstruction from the abstract of arXiv:2605.18629: that
    <w_i, d_i> is fixed to 1 by reparameterisation, without a hyper-parameter, is published; the form above is ours.
    """

    kind = "aligned"

    def rows(self, W_dec: Float[Tensor, "d_sae d_model"]) -> Float[Tensor, "d_sae d_model"]:
        square = W_dec.square().sum(dim=-1, keepdim=True)
        along = (self.W_enc * W_dec).sum(dim=-1, keepdim=True)
        return self.W_enc + W_dec * ((1 - along) / square)


class Direction(Score):
    """s_i = cos(x_c, w_i); with `unit=False` <x_c/‖x_c‖, w_i>. No bias: the score of the magnitude bypass."""

    kind = "direction"

    def __init__(self, W_enc: Float[Tensor, "d_sae d_model"], unit: bool = True):
        super().__init__(W_enc, None)
        self.unit = unit

    def argument(self, x_c: Float[Tensor, "*row d_model"]) -> Argument:
        norm = norm_of(x_c)
        return Argument(x_c / norm, norm)

    def rows(self, W_dec: Float[Tensor, "d_sae d_model"]) -> Float[Tensor, "d_sae d_model"]:
        return unit_rows(self.W_enc) if self.unit else self.W_enc


class Cosine(Direction):
    """s_i = exp(a_i·log max(‖x_c‖, 1e-8) + b_i)·cos(x_c, w_i) + β_i. Source: arXiv:2606.15054.

    a = 0: pure cosine; a = 1, b = 0: the inner product with unit rows. a and b are one number (global), one for each of G equal
    slices of the dictionary (group; a remainder joins the last), or one a latent (per-feature); with `delta` the exponent of
    latent i is a + δ_i (base + delta). `fixed` keeps a where it is (pure cosine: a = 0).
    """

    kind = "cosine"
    reads_norm = True

    def __init__(
        self,
        W_enc: Float[Tensor, "d_sae d_model"],
        b_enc: Float[Tensor, "d_sae"],
        a: Float[Tensor, "group_a"],
        b: Float[Tensor, "group_b"],
        delta: Float[Tensor, "d_sae"] | None = None,
        fixed: bool = False,
    ):
        Score.__init__(self, W_enc, b_enc)
        self.unit = True
        d_sae = len(W_enc)
        for name, scale in (("a", a), ("b", b)):
            if not 1 <= len(scale) <= d_sae:
                raise SAEError(f"{len(scale)} scales {name} for {d_sae} latents; expected 1 to {d_sae}")
        if delta is not None and len(a) != 1:
            raise SAEError(f"{len(a)} base exponents beside a delta for each latent; expected 1")
        self.scale_a = nn.Parameter(a, requires_grad=not fixed)
        self.scale_b = nn.Parameter(b)
        self.scale_delta = None if delta is None else nn.Parameter(delta)
        self.fixed = fixed

    def exponents(self) -> Float[Tensor, "d_sae"]:
        """a_i of each latent, with its delta."""
        a = spread(self.scale_a, len(self.W_enc)).expand(len(self.W_enc))
        return a if self.scale_delta is None else a + self.scale_delta

    def finish(self, product: Tensor, norm: Tensor, take: Take = everything) -> Tensor:
        d_sae = len(self.W_enc)
        a = spread(self.scale_a, d_sae) if self.scale_delta is None else self.scale_a + self.scale_delta
        b = spread(self.scale_b, d_sae)
        a, b = (parameter if len(parameter) == 1 else take(parameter) for parameter in (a, b))
        assert self.b_enc is not None
        return (a * norm.log() + b).exp() * product + take(self.b_enc)


def spread(scale: Float[Tensor, "group"], d_sae: int) -> Float[Tensor, "latent"]:
    """One number for each of G slices → one a latent (or the single one); the remainder joins the last slice."""
    groups = len(scale)
    if groups in (1, d_sae):
        return scale
    return scale[(torch.arange(d_sae, device=scale.device) // (d_sae // groups)).clamp(max=groups - 1)]


def starting_scale(mean_norm: float, d_model: int) -> float:
    """b to start from: log √d_model, but log mean‖x_c‖ where that mean is more than 2 times away from √d_model.

    Source: arXiv:2606.15054 (without the exception 97 % of the latents of a model with ‖x‖ ≈ 6 die).
    """
    root = d_model**0.5
    return math.log(root if 0.5 <= mean_norm / root <= 2 else mean_norm)

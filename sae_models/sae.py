"""A sparse autoencoder as score → selector → linear decoder."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_models.errors import BelongingError, SAEError
from sae_models.normalise import Identity
from sae_models.scores import Score, norm_of
from sae_models.selectors import Selector


class SAE(nn.Module):
    """An SAE of any architecture known here:

        (u, scale, shift) = normalise(x),   x_c = u − b_dec   (u where the SAE does not subtract b_dec)
        f = select(score(x_c)),             z = scale·f       (restore_norm: z = scale·f·‖x_c‖/‖f W_dec‖)
        x̂ = z W_dec + offset(x),            offset(x) = scale·b_dec + shift

    Latents carry every scale, so that decoding is linear and a latent's part of x̂ is z_i·d_i. No state is kept between calls.
    """

    W_dec: nn.Parameter
    """`[d_sae, d_model]`, a row d_i for each latent"""
    b_dec: nn.Parameter
    """`[d_model]`"""

    def __init__(
        self,
        score: Score,
        selector: Selector,
        W_dec: Float[Tensor, "d_sae d_model"],
        b_dec: Float[Tensor, "d_model"],
        *,
        normalise: Identity | None = None,
        subtract_b_dec: bool = True,
        restore_norm: bool = False,
        model_name: str | None = None,
        hook_name: str | None = None,
        metadata: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.normalise = normalise or Identity()
        self.score, self.selector = score, selector
        self.W_dec, self.b_dec = nn.Parameter(W_dec), nn.Parameter(b_dec)
        self.subtract_b_dec, self.restore_norm = subtract_b_dec, restore_norm
        self.model_name, self.hook_name = model_name, hook_name
        """where it belongs: the model's name and a TransformerLens-style hook name (None: not known)"""
        self.metadata: dict[str, Any] = dict(metadata or {})
        """what else its file or its training says of it"""

    @property
    def d_model(self) -> int:
        """Width of the activations it reads."""
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_dec.shape[0]

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights, in which it computes."""
        return self.W_dec.dtype

    def centred(self, x: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
        """x_c, what the score sees. Raises `SAEError` for inputs of another width."""
        return self._centred(self.normalise(self._input(x)).u)

    def encode(self, x: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_sae"]:
        """Latents z, scales folded in, in the SAE's dtype. Raises `SAEError` for inputs of another width."""
        u, scale, _ = self.normalise(self._input(x))
        x_c = self._centred(u)
        f = self.selector(self.score(x_c, self.W_dec))
        if self.restore_norm:
            f = f * restoring(x_c, f @ self.W_dec)
        return f if scale is None else f * scale

    def offset(self, x: Float[Tensor, "*row d_model"]) -> Float[Tensor, "#*row d_model"]:
        """What x̂ is without any latent: b_dec, unless the SAE normalises its input."""
        _, scale, shift = self.normalise(self._input(x))
        offset = self.b_dec.expand(x.shape) if scale is None else scale * self.b_dec
        return offset if shift is None else offset + shift

    def decode(self, z: Float[Tensor, "*row d_sae"]) -> Float[Tensor, "*row d_model"]:
        """z W_dec + b_dec. Raises `SAEError` where the offset depends on x: there x̂ is `z @ W_dec + offset(x)`."""
        if self.normalise.kind != "none":
            raise SAEError(f"this SAE normalises its input ({self.normalise.kind}); use z @ sae.W_dec + sae.offset(x)")
        return z @ self.W_dec + self.b_dec

    def forward(self, x: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
        """The reconstruction x̂, in the SAE's dtype."""
        return self.encode(x) @ self.W_dec + self.offset(x)

    def encoder_rows(self) -> Float[Tensor, "d_sae d_model"]:
        """w_i as the score uses them: materialised where they are a function of other parameters."""
        return self.score.rows(self.W_dec)

    def alignment(self) -> Float[Tensor, "d_sae"]:
        """<w_i, d_i> of each latent (for unit rows their cosine). Source: arXiv:2605.18629."""
        return (self.encoder_rows() * self.W_dec).sum(dim=-1)

    def check_finite(self) -> None:
        """Raise `SAEError` where a weight is nan or infinite: no number that comes of it can be trusted."""
        for name, value in self.named_parameters():
            if not bool(value.isfinite().all()):
                n = int((~value.isfinite()).sum())
                raise SAEError(f"{name} of an SAE holds {n} values that are nan or infinite; expected finite weights")

    def check_belongs(
        self, *, d_model: int | None = None, model_name: str | None = None, hook_name: str | None = None
    ) -> None:
        """Raise `BelongingError` where the SAE was trained on another width, model or site than it is put to.

        Names of models are compared without their owner and case; what the SAE does not say of itself is not compared.
        """
        if d_model is not None and d_model != self.d_model:
            raise BelongingError(
                f"an SAE of width {self.d_model} for activations of width {d_model}; take one of that width"
            )
        for what, own, given in (("model", self.model_name, model_name), ("site", self.hook_name, hook_name)):
            if own is not None and given is not None and _plain(own) != _plain(given):
                raise BelongingError(
                    f"an SAE of {what} {own!r} put to {what} {given!r}; take one trained there, or clear sae.{what}_name"
                    if what == "model"
                    else f"an SAE of site {own!r} put to site {given!r}; take one trained there, or clear sae.hook_name"
                )

    def _input(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.d_model:
            raise BelongingError(
                f"activations of width {x.shape[-1]} for an SAE of width {self.d_model}; take one of that width"
            )
        return x.to(self.W_dec)

    def _centred(self, u: Tensor) -> Tensor:
        return u - self.b_dec if self.subtract_b_dec else u

    def extra_repr(self) -> str:
        where = f"{self.model_name or 'unknown model'}, {self.hook_name or 'unknown site'}"
        return f"{self.score.kind} → {self.selector.kind}, d_model={self.d_model}, d_sae={self.d_sae}, {where}"


def restoring(x_c: Float[Tensor, "*row d_model"], r: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row 1"]:
    """‖x_c‖/‖r‖, and 0 where r is 0: no latent is active there, and nothing can be restored."""
    norm = r.norm(dim=-1, keepdim=True)
    some = norm > 0
    return torch.where(some, norm_of(x_c) / torch.where(some, norm, 1), 0)


def _plain(name: str) -> str:
    return name.rsplit("/", 1)[-1].lower()

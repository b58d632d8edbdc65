"""What is done to an activation through an SAE's latents: pure functions of tensors `[..., d_model]`.

The same function works on replay's rows, in a TransformerLens hook and inside an nnsight trace. With z = encode(x) and z′ the
latents changed, what the SAE does not explain stays (`keep_error`) or goes:

    x + (z′ − z) W_dec        or        z′ W_dec + offset(x)

The result has the dtype and device of x. Latents may have either sign. A set of latents is a number, a list or tensor of them, a
truth value for each of d_sae, or one set for each row, `[..., latent]` padded with −1; each latent once, at least one a set.
A value or factor is one number, one a latent `[latent]`, one a row `[..., 1]` or one for each `[..., latent]`, in the order given.
A live object of another library (SAELens) is taken as `as_sae` adapts it, at each call: adapt it once where calls are many.
Raises `SAEError` for latents that do not exist, sets and values of another shape, and activations of another width.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sae_models.errors import BelongingError, SAEError
from sae_models.live import as_sae

Vectors = Float[Tensor, "*row d_model"]
Latents = int | Sequence[int] | Int[Tensor, "*set"] | Bool[Tensor, "d_sae"]
"""Which latents: the same in every row, or a set for each row `[..., latent]`, padded with −1."""
Value = float | Tensor


@runtime_checkable
class Decoder(Protocol):
    """What an edit needs of an SAE."""

    if TYPE_CHECKING:  # from Python 3.12 isinstance does not see the parameters of a module

        @property
        def W_dec(self) -> Float[Tensor, "d_sae d_model"]: ...

    def encode(self, x: Vectors) -> Float[Tensor, "*row d_sae"]: ...

    def offset(self, x: Vectors) -> Vectors: ...


def reconstruct(x: Vectors, sae: Decoder | nn.Module) -> Vectors:
    """x̂ = z W_dec + offset(x)."""
    sae = _decoder(sae)
    return (_latents(x, sae) @ sae.W_dec + sae.offset(x)).to(x)


def zero_latents(x: Vectors, sae: Decoder | nn.Module, latents: Latents, *, keep_error: bool = True) -> Vectors:
    """z′ = 0 at the latents given (ablation): x − Σ z_i d_i over them."""
    return _set_latents(x, sae, latents, lambda z: torch.zeros_like(z), keep_error)


def clamp_latents(
    x: Vectors, sae: Decoder | nn.Module, latents: Latents, value: Value, *, keep_error: bool = True
) -> Vectors:
    """z′ = value at the latents given, also where they were not active."""
    return _set_latents(x, sae, latents, lambda z: _fitting(value, z, "value").expand_as(z), keep_error)


def scale_latents(
    x: Vectors, sae: Decoder | nn.Module, latents: Latents, factor: Value, *, keep_error: bool = True
) -> Vectors:
    """z′ = factor·z at the latents given."""
    return _set_latents(x, sae, latents, lambda z: _fitting(factor, z, "factor") * z, keep_error)


def keep_latents(x: Vectors, sae: Decoder | nn.Module, latents: Latents, *, keep_error: bool = True) -> Vectors:
    """z′ = 0 at all other latents. All of them kept: x itself, or x̂ without the error."""
    sae = _decoder(sae)
    index = _chosen(latents, sae, x)
    z = _latents(x, sae)
    if keep_error:
        return _added(x, -z.masked_fill(_mask(index, z), 0) @ sae.W_dec)
    return (_products(_at(z, index), index, sae) + sae.offset(x)).to(x)


def change_latents(
    x: Vectors, sae: Decoder | nn.Module, change: Callable[[Tensor], Tensor], *, keep_error: bool = True
) -> Vectors:
    """z′ = change(z), any function of all latents `[..., d_sae]`; only those that it changes are decoded."""
    sae = _decoder(sae)
    z = _latents(x, sae)
    new = change(z.clone())  # a change in place must not change what it is compared with
    if new.shape != z.shape:
        raise SAEError(f"the change gave latents of shape {list(new.shape)}; expected {list(z.shape)}")
    if not keep_error:
        return (new @ sae.W_dec + sae.offset(x)).to(x)
    delta = new - z
    index = (delta != 0).reshape(-1, delta.shape[-1]).any(dim=0).nonzero()[:, 0]
    return _added(x, _products(_at(delta, index), index, sae))


def _set_latents(
    x: Tensor, sae: Decoder | nn.Module, latents: Latents, change: Callable[[Tensor], Tensor], keep_error: bool
) -> Tensor:
    sae = _decoder(sae)
    index = _chosen(latents, sae, x)
    z = _latents(x, sae)
    old = _at(z, index)
    new = change(old)
    if keep_error:
        return _added(x, _products(new - old, index, sae))
    if index.ndim == 1:
        z = z.index_copy(-1, index, new)
    else:  # what stands in the padding lands in one column more
        z = torch.cat([z, z[..., :1]], dim=-1).scatter(-1, index % (z.shape[-1] + 1), new)[..., :-1]
    return (z @ sae.W_dec + sae.offset(x)).to(x)


def _decoder(sae: Any) -> Decoder:
    return sae if isinstance(sae, Decoder) and hasattr(sae, "W_dec") else as_sae(sae)


def _latents(x: Tensor, sae: Decoder) -> Tensor:
    if x.shape[-1] != sae.W_dec.shape[1]:
        raise BelongingError(
            f"activations of width {x.shape[-1]} for an SAE of width {sae.W_dec.shape[1]}; take one of that width"
        )
    return sae.encode(x)


def _added(x: Tensor, change: Tensor) -> Tensor:
    """x + change in the wider of the two dtypes, then as x."""
    return (x.to(change.device, torch.promote_types(x.dtype, change.dtype)) + change).to(x)


def _at(z: Tensor, index: Tensor) -> Tensor:
    """Latents of the set, `[..., latent]`; those of the padding 0."""
    if index.ndim == 1:
        return z[..., index]
    return z.gather(-1, index.clamp(min=0)).masked_fill(index < 0, 0)


def _products(z: Tensor, index: Tensor, sae: Decoder) -> Tensor:
    """Σ z_i d_i over the set."""
    if index.ndim == 1:
        return z @ sae.W_dec[index]
    return (z.masked_fill(index < 0, 0)[..., None, :] @ sae.W_dec[index.clamp(min=0)])[..., 0, :]


def _mask(index: Tensor, z: Tensor) -> Tensor:
    """Which of d_sae are in the set, `[d_sae]` or `[..., d_sae]`."""
    n = z.shape[-1]
    mask = torch.zeros(*index.shape[:-1], n + 1, dtype=torch.bool, device=z.device)
    return mask.scatter_(-1, index % (n + 1), True)[..., :-1]  # −1 lands in one column more


def _chosen(latents: Latents, sae: Decoder, x: Tensor) -> Int[Tensor, "*chosen"]:
    """The set as indices `[latent]`, or `[..., latent]` padded with −1."""
    d_sae, device = sae.W_dec.shape[0], sae.W_dec.device
    found = torch.as_tensor(latents, device=device)
    if found.numel() == 0:
        raise SAEError("an empty set of latents; give at least one")
    if found.dtype == torch.bool:
        if found.shape != (d_sae,):
            raise SAEError(f"truth values of shape {list(found.shape)} for latents; expected [{d_sae}], one for each")
        found = found.nonzero()[:, 0]
    if found.is_floating_point() or found.is_complex():
        raise SAEError(f"latents of dtype {found.dtype}; expected whole numbers or truth values")
    found = torch.atleast_1d(found.long())
    if found.ndim > 1 and found.shape[:-1] != x.shape[:-1]:
        raise SAEError(
            f"sets of latents of shape {list(found.shape)} for activations {list(x.shape)}; expected one set for all, [latent], "
            f"or one a row, {[*x.shape[:-1], 'latent']}"
        )
    least = 0 if found.ndim == 1 else -1
    outside = (found < least) | (found >= d_sae)
    if bool(outside.any()):
        padding = "" if found.ndim == 1 else " (−1 pads)"
        raise SAEError(f"latent {int(found[outside][0])} does not exist; the SAE has {d_sae}, from 0{padding}")
    if bool((found < 0).all(dim=-1).any()) or found.numel() == 0:
        raise SAEError("an empty set of latents; give at least one (in each row)")
    ordered = found.sort(dim=-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if bool(twice.any()):
        raise SAEError(f"latent {int(ordered[..., 1:][twice][0])} is given twice; give each once")
    return found


def _fitting(value: Value, z: Tensor, what: str) -> Tensor:
    """A value or factor that broadcasts over the latents of the set, `[..., latent]`."""
    found = torch.as_tensor(value, dtype=z.dtype, device=z.device)
    shapes = [(), z.shape[-1:], (*z.shape[:-1], 1), tuple(z.shape)]
    if tuple(found.shape) not in shapes:
        raise SAEError(
            f"a {what} of shape {list(found.shape)}; expected one of {', '.join(str(list(s)) for s in shapes)}"
        )
    return found

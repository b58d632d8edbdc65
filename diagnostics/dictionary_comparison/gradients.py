"""Norms of gradients of each latent at each token: of its activation by the input, and of the loss by its encoder row.

For an inner product the first does not depend on the token, and the second is the error's part along d_i times ‖x_c‖.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from interventions.errors import ResultError
from sae_models.active_latents import ActiveLatents
from sae_models.live import Wrapped
from sae_models.sae import SAE
from sae_models.scores import Direction

ENTRIES, ENTRIES_GPU = 2**22, 2**26
"""Numbers in memory at once in the copies of the inputs, one copy an entry."""


class EntryGradients(NamedTuple):
    """At each (token, latent) where the latent is active, `[entry]` each."""

    sensitivity: Float[ndarray, "entry"]
    """‖∂z_i/∂x‖, of the activation, with its scales and norms"""
    gradient: Float[ndarray, "entry"]
    """‖∂(‖x − x̂‖²)/∂w_i‖, of the token's squared error, by the encoder's row"""
    error: Float[ndarray, "entry"]
    """2·|<x − x̂, d_i>|, of the squared error by z_i: no factor of the norm, whatever the score"""
    error_norm: Float[ndarray, "entry"]
    """2·|<x − x̂, d_i>|·‖x_c‖: the gradient that a row read as <w_i, x_c> would have, whatever the score"""


@torch.no_grad()
def entry_gradients(sae: SAE, x: Float[Tensor, "token d_model"], active: ActiveLatents) -> EntryGradients:
    """Gradients' norms at each (token, latent) where the latent is active: see `EntryGradients`.

        gradient = error·‖x_c‖  for <w_i, x_c>;      error·e^b‖x_c‖^a·sin θ/‖w_i‖  for e^b‖x_c‖^a·cos θ,  θ = angle(x_c, w_i)

    The set of active latents is held fixed. w_i: the encoder row, before normalisation where the score normalises it. For an inner
    product the sensitivity is ‖w_i‖ at every token. Where the norm is restored, an error along what is decoded does not count. Raises
    `ResultError` for an SAE of which only the function `encode` is known. Source: arXiv:2606.15054 (encoder-gradient ratio); that the
    ratio is of `gradient` is our reading, since that of `sensitivity` is 1 in every standard SAE; the two without a score's factor are ours.
    """
    if isinstance(sae.score, Wrapped):
        raise ResultError("the encoder is known as a function only; it has no rows whose gradients could be formed")
    rows = sae.encoder_rows().detach()
    found = [_chunk(sae, rows, *part) for part in _parts(sae, x, active)] or [(torch.zeros(0),) * 4]
    return EntryGradients(*(torch.cat(some).double().cpu().numpy() for some in zip(*found, strict=True)))


def _parts(sae: SAE, x: Tensor, active: ActiveLatents) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Some tokens at a time: their activations, and the row and latent of each of their entries."""
    budget = (ENTRIES if sae.device.type == "cpu" else ENTRIES_GPU) // x.shape[1]
    start, token = active.start, 0
    while token < len(x):
        stop = max(token + 1, int(np.searchsorted(start, start[token] + budget, side="right")) - 1)
        some = slice(start[token], start[stop])
        if some.stop > some.start:
            row = torch.from_numpy(active.token[some] - token).to(sae.device)
            yield x[token:stop].to(sae.W_dec), row, torch.from_numpy(active.latent[some]).to(sae.device)
        token = stop


def _chunk(sae: SAE, rows: Tensor, x: Tensor, row: Tensor, latent: Tensor) -> tuple[Tensor, ...]:
    W_dec, w = sae.W_dec.detach(), rows[latent]
    with torch.enable_grad():
        each = x[row].detach().requires_grad_()  # a copy for each entry, so that one pass gives all gradients apart
        u, norm = sae.score.argument(sae.centred(each))
        product = (u * w).sum(-1)
        f = _activation(sae, product, norm[:, 0], latent)
        d_x, d_product = torch.autograd.grad(f.sum(), (each, product))
        whole = x.detach().requires_grad_()
        factor, decoded = _factor(sae, whole, row, latent, w)
        d_factor = torch.autograd.grad(factor.sum(), whole)[0] if factor.requires_grad else torch.zeros_like(x)
    f, u, factor, decoded = f.detach(), u.detach(), factor.detach(), decoded.detach()
    sensitivity = (factor[row] * d_x + f[:, None] * d_factor[row]).norm(dim=-1)
    error = x - factor * decoded - sae.offset(x)
    if sae.restore_norm:  # what is decoded keeps its length: an error along it is not reduced by more of it
        along = decoded / decoded.norm(dim=-1, keepdim=True).clamp(min=1e-30)
        error = error - (error * along).sum(-1, keepdim=True) * along
    by_latent = 2 * (error[row] * W_dec[latent]).sum(-1).abs()
    length = u.norm(dim=-1)
    if isinstance(sae.score, Direction) and sae.score.unit:  # the row's length is divided out
        length = (u - (u * w).sum(-1, keepdim=True) * w).norm(dim=-1) / sae.score.W_enc[latent].norm(dim=-1)
    gradient = by_latent * (factor[row, 0] * d_product).abs() * length
    return sensitivity, gradient, by_latent, by_latent * sae.centred(x)[row].norm(dim=-1)


def _activation(sae: SAE, product: Tensor, norm: Tensor, latent: Tensor) -> Tensor:
    """f of selected entries: their score, through a gate's magnitude where there is one."""
    s = sae.score.finish(product, norm, lambda parameter: parameter[latent])
    return sae.selector.magnitude(s, lambda parameter: parameter[latent])


def _factor(sae: SAE, x: Tensor, row: Tensor, latent: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The factor between f and z, `[token, 1]`, and f W_dec, `[token, d_model]`."""
    x_c, scale = sae.centred(x), sae.normalise(x).scale
    u, norm = sae.score.argument(x_c)
    f = _activation(sae, (u[row] * w).sum(-1), norm[row, 0], latent)
    decoded = torch.zeros_like(x).index_add(0, row, f[:, None] * sae.W_dec.detach()[latent])
    factor = x.new_ones(len(x), 1) if scale is None else scale
    if sae.restore_norm:
        factor = factor * x_c.norm(dim=-1, keepdim=True) / decoded.norm(dim=-1, keepdim=True).clamp(min=1e-30)
    return factor, decoded


def quartile_ratio(
    total: Float[ndarray, "latent quartile"], count: Int[ndarray, "latent quartile"], at_least: int
) -> Float[ndarray, "latent"]:
    """Mean over the fourth quartile of ‖x‖ ÷ mean over the first, from sums and counts; nan below `at_least` tokens in either."""
    known = (count[:, 0] >= at_least) & (count[:, 3] >= at_least) & (total[:, 0] > 0)
    mean = total / np.maximum(count, 1)
    return np.where(known, mean[:, 3] / np.where(known, mean[:, 0], 1.0), np.nan)

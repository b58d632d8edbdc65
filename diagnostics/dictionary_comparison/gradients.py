"""Norms of gradients of each latent at each token: of its activation by the input, and of the loss by its encoder row.

For an inner product the first does not depend on the token, and the second is proportional to ‖x_c‖ and the error.
"""

from collections.abc import Iterator

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
from sae_models.selectors import Gate

ENTRIES, ENTRIES_GPU = 2**22, 2**26
"""Numbers in memory at once in the copies of the inputs, one copy an entry."""


@torch.no_grad()
def entry_gradients(
    sae: SAE, x: Float[Tensor, "token d_model"], active: ActiveLatents
) -> tuple[Float[ndarray, "entry"], Float[ndarray, "entry"]]:
    """Two gradients' norms at each (token, latent) where the latent is active:

        sensitivity  ‖∂z_i/∂x‖                      of the activation, with its scales and norms
        gradient     ‖∂(‖x − x̂‖²)/∂w_i‖            of the token's squared error, by the encoder's row

    The set of active latents is held fixed. w_i: the encoder row, before normalisation where the score normalises it. For an inner
    product <w_i, x_c> the first is ‖w_i‖ at every token, and the second 2·|<x − x̂, d_i>|·‖x_c‖. Raises `ResultError` for an SAE of
    which only the function `encode` is known. Source: arXiv:2606.15054 (encoder-gradient ratio); that the ratio is of the second is
    our reading, since the first gives 1 in every standard SAE.
    """
    if isinstance(sae.score, Wrapped):
        raise ResultError("the encoder is known as a function only; it has no rows whose gradients could be formed")
    rows = sae.encoder_rows().detach()
    found = [_chunk(sae, rows, *part) for part in _parts(sae, x, active)]
    none = torch.zeros(0)
    first, second = zip(*found, strict=True) if found else ([none], [none])
    return torch.cat(first).double().cpu().numpy(), torch.cat(second).double().cpu().numpy()


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


def _chunk(sae: SAE, rows: Tensor, x: Tensor, row: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
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
    by_row = 2 * factor[row, 0] * d_product * (error[row] * W_dec[latent]).sum(-1)
    length = u.norm(dim=-1)
    if isinstance(sae.score, Direction) and sae.score.unit:  # the row's length is divided out
        length = (u - (u * w).sum(-1, keepdim=True) * w).norm(dim=-1) / sae.score.W_enc[latent].norm(dim=-1)
    return sensitivity, by_row.abs() * length


def _activation(sae: SAE, product: Tensor, norm: Tensor, latent: Tensor) -> Tensor:
    """f of selected entries: their score, through a gate's magnitude where there is one."""
    s = sae.score.finish(product, norm, lambda parameter: parameter[latent])
    if isinstance(sae.selector, Gate):
        return sae.selector.r_mag[latent].exp() * s + sae.selector.b_mag[latent]
    return s


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

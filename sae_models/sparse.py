"""The few selected entries of a batch: their products, their decoding, and gradients that touch nothing else.

Of a step's six dense products `[row, d_model] × [d_model, d_sae]` (scores, decoding, and the gradients of both) only the scores
must be formed for every latent; at k of d_sae active latents the rest costs k/d_sae as much. All of it is `embedding_bag`:
sums of rows of a matrix, weighted, in the order of the entries.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sae_models.selectors import Support


def decoded(
    activation: Float[Tensor, "entry"], W_dec: Float[Tensor, "d_sae d_model"], support: Support
) -> Float[Tensor, "row d_model"]:
    """z W_dec for the latents given as entries, with gradients to the activations and the decoder."""
    return _Decoded.apply(activation, W_dec, support.row, support.latent, support.n_rows)


def products(
    u: Float[Tensor, "row d_model"], rows: Float[Tensor, "d_sae d_model"], support: Support
) -> Float[Tensor, "entry"]:
    """<u_row, r_latent> at the entries, as they were formed before, with gradients to u and the rows."""
    return _Products.apply(u, rows, support.row, support.latent, support.product)


def weighted_sums(
    weight: Float[Tensor, "entry"],
    of: Float[Tensor, "item d_model"],
    item: Int[Tensor, "entry"],
    bag: Int[Tensor, "entry"],
    n_bags: int,
) -> Float[Tensor, "bag d_model"]:
    """Σ weight·of[item] over the entries of each bag; `bag` is sorted."""
    starts = torch.searchsorted(bag, torch.arange(n_bags + 1, device=bag.device))
    return F.embedding_bag(item, of, starts, mode="sum", per_sample_weights=weight, include_last_offset=True)


class _Decoded(torch.autograd.Function):
    """x̂_r = Σ z_e·d_i(e) over the entries e of row r; ∂z_e = <∂x̂_r(e), d_i(e)>, ∂d_i = Σ z_e·∂x̂_r(e) over those of latent i."""

    @staticmethod
    def forward(ctx: Any, activation: Tensor, W_dec: Tensor, row: Tensor, latent: Tensor, n_rows: int) -> Tensor:
        ctx.save_for_backward(activation, W_dec, row, latent)
        ctx.n_rows = n_rows
        return weighted_sums(activation, W_dec, latent, row, n_rows)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor):
        activation, W_dec, row, latent = ctx.saved_tensors
        d_activation = d_W_dec = None
        gradient = grad_outputs[0].contiguous()
        if ctx.needs_input_grad[0]:
            d_activation = _dots(gradient, W_dec, row, latent)
        if ctx.needs_input_grad[1]:
            by_latent = latent.argsort(stable=True)
            d_W_dec = weighted_sums(activation[by_latent], gradient, row[by_latent], latent[by_latent], len(W_dec))
        return d_activation, d_W_dec, None, None, None


def _dots(a: Tensor, b: Tensor, row: Tensor, latent: Tensor) -> Tensor:
    """<a[row], b[latent]> of each entry, as the derivative of weighted sums by their weights: that kernel of the library's
    gathers nothing into memory."""
    weight = torch.zeros(len(row), device=a.device, dtype=a.dtype, requires_grad=True)
    with torch.enable_grad():
        total = weighted_sums(weight, b.detach(), latent, row, len(a))
    return torch.autograd.grad(total, weight, a)[0]


class _Products(torch.autograd.Function):
    """c_e = <u_r(e), w_i(e)>, formed before; ∂u_r = Σ ∂c_e·w_i(e) over the entries of row r, ∂w_i = Σ ∂c_e·u_r(e) of latent i."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, rows: Tensor, row: Tensor, latent: Tensor, product: Tensor) -> Tensor:
        ctx.save_for_backward(u, rows, row, latent)
        return product.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor):
        u, rows, row, latent = ctx.saved_tensors
        d_u = d_rows = None
        gradient = grad_outputs[0].contiguous()
        if ctx.needs_input_grad[0]:
            d_u = weighted_sums(gradient, rows, latent, row, len(u))
        if ctx.needs_input_grad[1]:
            by_latent = latent.argsort(stable=True)
            d_rows = weighted_sums(gradient[by_latent], u, row[by_latent], latent[by_latent], len(rows))
        return d_u, d_rows, None, None, None

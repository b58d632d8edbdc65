"""Sets of edits of one activation, turned as a whole about it: the same geometry, other directions."""

import torch
from jaxtyping import Float
from torch import Tensor

from interventions.errors import EditError


def rotated_edits(
    x: Float[Tensor, "d_model"], deltas: Float[Tensor, "edit d_model"], towards: Float[Tensor, "random d_model"]
) -> Float[Tensor, "edit d_model"]:
    """A placebo for several edits of x at once: what a random rotation that leaves x in place makes of them.

        R x = x,   Rᵀ R = 1:   δ′_i = R δ_i,   hence  <δ′_i, δ′_j> = <δ_i, δ_j>  and  <δ′_i, x> = <δ_i, x>

    So every norm, every cosine to x, every cosine between two edits, and with them the dose and angle of every sum of edits, are
    kept exactly; all else is random. The edits' parts across x lie in a space of r dimensions; R carries it into the space that
    the first r of `towards` span across x, orthonormalised in their order (Gaussian rows: a uniformly random rotation; differences
    of two other tokens' activations: directions that the model's own data take). Formed in float64; the dtype of `deltas`.

    Raises `EditError` when there are fewer than r directions, or they do not span r dimensions across x. Source: ours, after the
    geometry-matched controls of arXiv:2605.03160.
    """
    unit = x.double() / x.double().norm()
    wide = deltas.double()
    along = (wide @ unit)[:, None] * unit
    _, size, basis = torch.linalg.svd(wide - along, full_matrices=False)
    rank = int((size > 1e-9 * size.amax().clamp(min=1e-300)).sum())
    if rank == 0:
        return deltas.clone()
    if len(towards) < rank:
        raise EditError(f"{len(towards)} random directions for edits of {rank} dimensions; give at least {rank}")
    rows = towards[:rank].double()
    rows = torch.cat([unit[None], rows / rows.norm(dim=-1, keepdim=True)])
    found, triangle = torch.linalg.qr(rows.T)
    diagonal = triangle.diagonal()
    if bool((diagonal.abs() < 1e-9).any()) or not bool(diagonal.isfinite().all()):
        raise EditError(f"{rank} random directions that do not span {rank} dimensions across x; give others")
    turned = (found * diagonal.sign())[:, 1:].T
    return (along + (wide - along) @ basis[:rank].T @ turned).to(deltas)

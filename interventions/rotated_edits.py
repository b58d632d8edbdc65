"""Sets of edits of one activation, turned as a whole about it: the same geometry, other directions."""

import torch
from jaxtyping import Float
from torch import Tensor

from interventions.errors import EditError

INDEPENDENT = 1e-4
"""Share of a direction's length that must lie across those before it; rounding of float32 activations leaves some 1e-6."""


def rotated_edits(
    x: Float[Tensor, "d_model"], deltas: Float[Tensor, "edit d_model"], towards: Float[Tensor, "random d_model"]
) -> Float[Tensor, "edit d_model"]:
    """A placebo for several edits of x at once: what a random rotation that leaves x in place makes of them.

        R x = x,   Rᵀ R = 1:   δ′_i = R δ_i,   hence  <δ′_i, δ′_j> = <δ_i, δ_j>  and  <δ′_i, x> = <δ_i, x>

    So every norm, every cosine to x, every cosine between two edits, and with them the dose and angle of every sum of edits, are
    kept exactly; all else is random. The edits' parts across x lie in a space of r dimensions; R carries it into the space of the
    first r of `towards` that are linearly independent of x and of each other, orthonormalised in their order (Gaussian rows: a
    uniformly random rotation; differences of two other tokens' activations: directions that the model's own data take). Give more
    than there are edits: those that repeat but for rounding, vanish or are not finite are passed over. nan where r are not found.
    Formed in float64; the dtype of `deltas`.

    Raises `EditError` when there are fewer than r directions. Source: ours, after the geometry-matched controls of arXiv:2605.03160.
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
    found = _independent(unit, towards.double(), rank)
    if len(found) < rank:
        return torch.full_like(deltas, torch.nan)
    return (along + (wide - along) @ basis[:rank].T @ found).to(deltas)


def _independent(
    unit: Float[Tensor, "d_model"], rows: Float[Tensor, "random d_model"], most: int
) -> Float[Tensor, "found d_model"]:
    """The first so many rows that add a dimension to `unit` and those before them, orthonormalised."""
    found = unit[None]
    for row in rows / rows.norm(dim=1, keepdim=True):
        if len(found) > most:
            break
        rest = row - found.T @ (found @ row)
        if bool(rest.norm() > INDEPENDENT):
            rest = rest - found.T @ (found @ rest)  # once more, for what rounding leaves
            found = torch.cat([found, rest[None] / rest.norm()])
    return found[1:]

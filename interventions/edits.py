"""What is done to a vector: pure functions of tensors `[..., d_model]`.

The same function works on replay's rows, in a TransformerLens hook and inside an nnsight trace. Norms are L2 norms, of
vectors however large or small, given in float32 at least; the result has the dtype and device of `x`. A vector of norm
zero has no direction: what needs one gives non-finite values there, which diagnostics drop and count.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from interventions.errors import EditError

Vectors = Float[Tensor, "*row d_model"]
Shared = Float[Tensor, "*#row d_model"]
"""One vector a row, or one that several rows share (broadcast)."""
INDEPENDENT = 1e-4
"""Share of a direction's length that must lie across those before it; rounding of float32 activations leaves some 1e-6."""


def _wide(x: Tensor) -> Tensor:
    """float64 stays, everything else becomes float32: half precision cannot square norms safely."""
    return x if x.dtype == torch.float64 else x.float()


def _size(x: Vectors) -> Float[Tensor, "*row 1"]:
    """‖x‖ in float64: squares of float32 numbers neither overflow nor vanish there; those of float64 are scaled first."""
    if x.dtype != torch.float64:
        return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64)
    scale = x.abs().amax(dim=-1, keepdim=True)
    scale = torch.where((scale > 0) & scale.isfinite(), scale, 1.0)
    return scale * torch.linalg.vector_norm(x / scale, dim=-1, keepdim=True)


def norm(x: Vectors) -> Float[Tensor, "*row 1"]:
    """‖x‖ over the last axis, kept, in float32 at least."""
    return _size(x).to(_wide(x[..., :0]).dtype)


def centred_norm(x: Vectors) -> Float[Tensor, "*row 1"]:
    """‖x − mean(x)‖, the mean taken over the last axis; kept, in float32 at least."""
    x = _wide(x)
    return norm(x - x.mean(dim=-1, keepdim=True))


def norm_read(kind: str, x: Vectors) -> Float[Tensor, "*row 1"]:
    """What a block's norm layer divides x by, but for √d_model and its ε: ‖x‖ for `RMSNorm`, ‖x − mean(x)‖ for `LayerNorm`.

    kind: a model's `norm_kind`. Raises `EditError` for any other.
    """
    known = {"RMSNorm": norm, "LayerNorm": centred_norm}
    if kind not in known:
        raise EditError(f"norm kind {kind!r}; known: {', '.join(known)}")
    return known[kind](x)


def _unit(x: Vectors) -> Vectors:
    return (x.double() / _size(x)).to(_wide(x[..., :0]).dtype)


def swap_direction(x: Vectors, source: Shared) -> Vectors:
    """`source`'s direction with x's norm: (source/‖source‖)·‖x‖. Source: arXiv:2606.15054, direction patch."""
    return (_unit(source) * norm(x)).to(x.dtype)


def swap_norm(x: Vectors, source: Shared) -> Vectors:
    """x's direction with `source`'s norm: (x/‖x‖)·‖source‖. Source: arXiv:2606.15054, norm patch."""
    return (_unit(x) * norm(source)).to(x.dtype)


def replace(x: Vectors, source: Shared) -> Vectors:
    """`source` itself, in the shape and dtype of x (full patch)."""
    return source.to(x).expand_as(x)


def rescale(x: Vectors, factor: float | Tensor) -> Vectors:
    """factor·x; a tensor `factor` has the shape of x's rows, `[...]` or `[..., 1]`."""
    if isinstance(factor, Tensor):
        factor = factor.to(x.device)
        if factor.ndim == x.ndim - 1:
            factor = factor[..., None]
        factor = _wide(factor)
    return (_wide(x) * factor).to(x.dtype)


def zero(x: Vectors) -> Vectors:
    """The zero vector (zero ablation)."""
    return torch.zeros_like(x)


def mean(x: Vectors, over: Float[Tensor, "sample d_model"]) -> Vectors:
    """The mean of a sample of activations (mean ablation)."""
    if over.shape[0] == 0:
        raise EditError("mean ablation over 0 activations; give at least one")
    return replace(x, _wide(over).mean(dim=0))


def resample(x: Vectors, sample: Float[Tensor, "sample d_model"], generator: torch.Generator) -> Vectors:
    """One vector of `sample`, drawn uniformly for each row (resample ablation).

    The generator may live on the CPU whatever the device of x: the draw is then the same on every device.
    """
    if sample.shape[0] == 0:
        raise EditError("resample ablation from 0 activations; give at least one")
    index = torch.randint(sample.shape[0], x.shape[:-1], generator=generator, device=generator.device)
    return sample[index.to(sample.device)].to(x)


def add_direction(x: Vectors, direction: Shared, coefficient: float | Tensor = 1.0) -> Vectors:
    """x + coefficient·direction (steering). The direction is used as given, not normalised."""
    rows = _wide(direction).to(x.device).expand(x.shape)  # so that a coefficient a row meets its row
    return (_wide(x) + rescale(rows, coefficient)).to(x.dtype)


def project_out(
    x: Vectors, direction: Float[Tensor, "d_model"] | Float[Tensor, "k d_model"], reference: Shared | float = 0.0
) -> Vectors:
    """x without its component along a direction, or in the span of several (rows of `direction`, of any length).

        x' = x − Q Qᵀ (x − reference),   Q an orthonormal basis of the rows of `direction`

    `reference` 0 removes <x, d̂> (projection to zero); the mean activation removes <x − μ, d̂> (projection to the mean).
    Linearly dependent rows span what they span. Raises `EditError` when every direction is zero, or one is not finite.
    Source: arXiv:2606.15054, projection ablation.
    """
    rows = torch.atleast_2d(direction).to(x.device).double()
    if not bool((good := rows.isfinite().all(dim=-1)).all()):
        raise EditError(f"cannot project out direction {int(good.int().argmin())} of {len(rows)}: it is not finite")
    length = _size(rows)
    rows = (rows / length)[length[:, 0] > 0]  # of unit length: a short row is no less a direction than a long one
    if len(rows) == 0:
        raise EditError("cannot project out a direction of norm 0")
    _, singular, basis = torch.linalg.svd(rows, full_matrices=False)
    rank = int((singular > singular.amax() * max(rows.shape) * torch.finfo(torch.float32).eps).sum())
    basis = basis[:rank].to(_wide(x).dtype)
    offset = reference.to(x.device) if isinstance(reference, Tensor) else reference
    return (_wide(x) - (_wide(x) - offset) @ basis.T @ basis).to(x.dtype)


def remove_projection(
    x: Vectors, direction: Shared, share: float | Tensor = 1.0, reference: Shared | float = 0.0
) -> Vectors:
    """x without a share of its component along a direction of its own (of any length), each row another one.

        x' = x − share·<x − reference, d̂>·d̂

    With `share` 1 what `project_out` does with one direction for all rows. Non-finite where the direction is zero.
    Source: arXiv:2606.15054, projection ablation.
    """
    unit = _unit(direction.to(x.device)).to(_wide(x).dtype)
    rest = _wide(x) - (reference.to(x.device) if isinstance(reference, Tensor) else reference)
    along = (rest * unit).sum(-1, keepdim=True)
    return add_direction(_wide(x), along * unit, -share).to(x.dtype)


def random_like(x: Vectors, generator: torch.Generator) -> Vectors:
    """Isotropic Gaussian rows in the shape of x, float32 at least.

    Drawn on the generator's device, then moved: a CPU generator gives the same numbers on every device.
    """
    dtype = _wide(x).dtype
    return torch.randn(x.shape, generator=generator, device=generator.device, dtype=dtype).to(x.device)


def tangent(x: Vectors, towards: Shared) -> Vectors:
    """The unit tangent at x̂ that points to `towards`: `towards` without its component along x, normalised.

    Non-finite where `towards` is parallel to x but for rounding: there is no way to turn.
    """
    unit = _unit(x).double()
    rest = towards.to(x.device).double()
    for _ in range(2):  # once more for what rounding leaves when `towards` is nearly parallel to x
        rest = rest - (rest * unit).sum(-1, keepdim=True) * unit
    size, rounding = _size(rest), 8 * torch.finfo(_wide(x).dtype).eps
    known = size > rounding * _size(towards).to(x.device)
    return torch.where(known, rest / size, torch.nan).to(_wide(x).dtype)


def rotate_by_angle(x: Vectors, towards: Shared, angle: float | Tensor) -> Vectors:
    """x turned by `angle` (radians) along the great circle towards `towards`, its norm kept.

    ‖x‖·(cos θ·x̂ + sin θ·û),   û = tangent(x, towards)
    """
    theta = torch.as_tensor(angle, dtype=torch.float64, device=x.device)
    if theta.ndim == x.ndim - 1:
        theta = theta[..., None]
    unit, along = _unit(x).double(), tangent(x, towards).double()
    return (norm(x).double() * (theta.cos() * unit + theta.sin() * along)).to(x.dtype)


def rotate_by_distance(x: Vectors, towards: Shared, distance: float | Tensor) -> Vectors:
    """x turned towards `towards`, its norm kept, until it has moved by `distance` (the chord, an L2 norm).

    θ = 2·asin(distance / 2‖x‖). No rotation moves x further than 2‖x‖: non-finite there, for the caller to count.
    The control for an edit that only changes the norm.
    """
    chord = torch.as_tensor(distance, dtype=torch.float64, device=x.device)
    if chord.ndim == x.ndim:
        chord = chord.squeeze(-1)
    return rotate_by_angle(x, towards, 2 * torch.asin(chord / (2 * norm(x).double().squeeze(-1))))


def angle_between(x: Vectors, y: Vectors) -> Float[Tensor, "*row"]:
    """Angle in radians, accurate near 0 and π: 2·atan2(‖x̂ − ŷ‖, ‖x̂ + ŷ‖)."""
    a, b = x.double() / _size(x), y.double() / _size(y)
    return (2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1))).to(_wide(x).dtype)


def cosine(x: Vectors, y: Vectors) -> Float[Tensor, "*row"]:
    """cos of the angle between x and y."""
    return (_unit(x) * _unit(y)).sum(-1)


def matched_placebo(x: Vectors, edited: Vectors, towards: Shared) -> Vectors:
    """A random edit as large as a given one: `edited`'s norm and its angle to x, another direction.

        ‖y‖·(cos θ·x̂ + sin θ·û),   θ = angle(x, y),   û = tangent(x, towards)

    So it lies at the same distance from x as `edited`. With `towards` Gaussian the tangent is isotropic; with the
    difference of two other tokens' activations it is one that the model's own data take. Ours.
    """
    turned = rotate_by_angle(_wide(x), towards, angle_between(x, edited))
    return rescale(turned, norm(edited) / norm(x)).to(x.dtype)


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

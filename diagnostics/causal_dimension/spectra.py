"""How many directions hold a matrix G: of its eigenvalues λ ≥ 0, q = λ / Σ λ.

    effective rank        exp(−Σ q log q)            participation ratio   1 / Σ q²  ≤  effective rank
    directions for 80 %   how many of the first eigenvectors hold 80 % of the trace, the last one in part

Of a sketch S = QᵀGQ, Q `[d, k]` an orthonormal basis of a random subspace: the eigenvalues of S·d/k have those of G as their limit
at k = d, where they are the same; for smaller k the effective rank comes out too low. Σ λ and Σ λ² are estimated without bias, hence
their ratio, the participation ratio, nearly so:

    E ‖S‖²   = k(2A + B)/(d(d+2)) + k(k−1)(dA − B)/(d(d−1)(d+2)),          A = Σ λ²,  B = (Σ λ)²
    E (tr S)² = k(2A + B)/(d(d+2)) + k(k−1)((d+1)B − 2A)/(d(d−1)(d+2))

Source: second moments of orthogonal matrices (Weingarten 1978).
"""

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

SHARES = (0.5, 0.8, 0.9)
STATISTICS = ("effective_rank", "participation", *(f"n{share * 100:.0f}" for share in SHARES))
Spectrum = Float[ndarray, "eigenvalue"]


def spectrum(matrix: Float[Tensor, "d d"]) -> Spectrum:
    """Eigenvalues, falling; what rounding leaves below 0 is 0."""
    return torch.linalg.eigvalsh(matrix).clamp(min=0).flip(0).cpu().numpy()


def effective_rank(values: Spectrum) -> float:
    """exp of the entropy of λ / Σ λ (Roy & Vetterli 2007); nan where all are 0."""
    if not values.any():
        return float("nan")
    q = values[values > 0] / values.sum()
    return float(np.exp(-(q * np.log(q)).sum()))


def participation(values: Spectrum) -> float:
    """(Σ λ)² / Σ λ²; nan where all are 0."""
    return float(values.sum() ** 2 / np.square(values).sum()) if values.any() else float("nan")


def sketched_participation(sketch: Float[Tensor, "k k"], width: int) -> float:
    """A/B solved from ‖S‖² and (tr S)² (see the head of this module), d = width ≥ 2; nan where the equations give no positive A, B."""
    k, d = len(sketch), width
    one, two = k / (d * (d + 2)), k * (k - 1) / (d * (d - 1) * (d + 2))
    moments = np.array([float(sketch.square().sum()), float(sketch.trace() ** 2)])
    a, b = np.linalg.solve([[2 * one + d * two, one - two], [2 * one - 2 * two, one + (d + 1) * two]], moments)
    return float(b / a) if a > 0 and b > 0 else float("nan")


def needed(values: Spectrum, share: float) -> float:
    """How many of the largest eigenvalues add up to this share of their sum, the last one in part; nan where all are 0."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    return float(np.interp(share * total[-1], total, np.arange(len(total)))) if values.any() else float("nan")


def dimension(matrix: Float[Tensor, "k k"], width: int | None = None) -> dict[str, float]:
    """Trace and `STATISTICS` of a matrix; with fewer rows than width, those of the `[width, width]` matrix that it is a sketch of."""
    width = width or len(matrix)
    values = spectrum(matrix) * width / len(matrix)
    return {
        "trace": float(values.sum()),
        "effective_rank": effective_rank(values),
        "participation": sketched_participation(matrix, width) if width > len(matrix) else participation(values),
        **{f"n{share * 100:.0f}": needed(values, share) for share in SHARES},
    }

"""Similar latents, in the same SAE and in others: by decoder direction and by activations."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from scipy import sparse

from sae_models.dictionaries import Dictionary


def correlations(z: Float[ndarray, "token"], found: sparse.csc_matrix) -> Float[ndarray, "latent"]:
    """Pearson's correlation of z with each column of a sparse matrix `[token, latent]`; nan where either is constant."""
    n, z = len(z), np.asarray(z, dtype=float)
    other = sparse.csc_matrix(found, dtype=float)
    total, square = np.asarray(other.sum(0))[0], np.asarray(other.multiply(other).sum(0))[0]
    both = other.T @ (z - z.mean())
    variance = (square - total**2 / n) * ((z - z.mean()) ** 2).sum()
    with np.errstate(all="ignore"):
        return np.where(variance > 1e-12 * square * (z * z).sum(), both / np.sqrt(variance), np.nan)


@dataclass(frozen=True)
class Neighbour:
    """A latent near another one."""

    sae: str
    latent: int
    cosine: float
    """of the two decoder rows"""
    correlation: float
    """of the two activations over the usable tokens (Pearson), each SAE reading its own site; nan where one is never active"""
    frequency: float
    """share of the usable tokens on which it is active"""
    nearest: str
    """`direction`: among the largest cosines (|cosine| where latents have either sign); `activation`: the largest |correlation|"""


def nearest(
    latent: int, z: Float[ndarray, "token"], own: Dictionary, other: Dictionary, found: sparse.csc_matrix, n: int = 3
) -> list[Neighbour]:
    """The n latents of another SAE (or of the same, itself left out) nearest in direction, and the most correlated one if it is not
    among them.

    z: of the latent; found: z of the other SAE's latents at the same tokens. Each value is the largest of d_sae numbers and so partly
    due to chance; there is no interval for that.
    """
    directions = torch.nn.functional.normalize(other.directions.float(), dim=-1)
    direction = torch.nn.functional.normalize(own.directions[latent].float(), dim=-1)
    cosine = (directions @ direction.to(directions.device)).double().cpu().numpy()
    r = correlations(z, found)
    frequency = np.diff(found.indptr) / max(1, len(z))
    signed = bool((z < 0).any() or (found.data < 0).any())
    order = np.argsort(-(np.abs(cosine) if signed else cosine), kind="stable")
    by_r = np.argsort(-np.nan_to_num(np.abs(r), nan=-1), kind="stable")
    if other is own:
        order, by_r = order[order != latent], by_r[by_r != latent]
    chosen = {int(i): "direction" for i in order[:n]}
    if len(by_r) and np.isfinite(r[by_r[0]]):
        chosen.setdefault(int(by_r[0]), "activation")
    return [
        Neighbour(other.name, i, float(cosine[i]), float(r[i]), float(frequency[i]), how) for i, how in chosen.items()
    ]

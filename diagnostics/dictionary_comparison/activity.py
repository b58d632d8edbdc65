"""Decoder rows and sparse activations of a dictionary: correlations, cosines, near-duplicates.

Pure functions; latents may have either sign.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy import sparse
from torch import Tensor

from interventions.errors import ResultError
from sae_models.scores import unit_rows

BLOCK = 2**23
"""Pairs of latents computed at once."""


@dataclass(frozen=True, eq=False)
class Activity:
    """Activations of a dictionary's latents on some tokens, and its decoder rows."""

    z: sparse.csc_matrix
    """`[token, latent]`, float64"""
    rows: Float[Tensor, "latent d_model"]
    """decoder rows, of norm 1 (a row of zeros stays)"""
    fired: Int[ndarray, "latent"]
    """number of tokens on which each is active"""
    mean: Float[ndarray, "latent"]
    sd: Float[ndarray, "latent"]
    """over all tokens, zeros too; 0 where a latent is constant"""
    signed: bool
    """whether any activation is negative"""

    @classmethod
    def of(cls, z: Any, W_dec: Float[Tensor, "latent d_model"]) -> "Activity":
        """From a sparse matrix `[token, latent]` and decoder rows of any length. Raises `ResultError` where they do not fit."""
        z = sparse.csc_matrix(z, dtype=np.float64)
        n, d_sae = cast(tuple[int, int], z.shape)
        if d_sae != len(W_dec) or n == 0:
            raise ResultError(f"activations {[n, d_sae]} for {len(W_dec)} decoder rows; expected [token, {len(W_dec)}]")
        z.eliminate_zeros()
        mean = np.asarray(z.sum(axis=0)).ravel() / n
        square = np.asarray(z.multiply(z).sum(axis=0)).ravel() / n
        variance = square - mean**2
        sd = np.sqrt(np.where(variance > 1e-12 * square, variance, 0.0))  # smaller values are rounding of a constant
        return cls(z, unit_rows(W_dec.detach()), np.diff(z.indptr), mean, sd, bool((z.data < 0).any()))

    @property
    def n_tokens(self) -> int:
        """Number of tokens."""
        n, _ = cast(tuple[int, int], self.z.shape)
        return n

    def rotated(self, by: int) -> "Activity":
        """Activations shifted by `by` tokens. Frequencies and correlations within the dictionary stay; correlations with another
        dictionary are then due to chance."""
        n = self.n_tokens
        moved = sparse.csc_matrix(sparse.csr_matrix(self.z)[(np.arange(n) - by) % n])
        return Activity(moved, self.rows, self.fired, self.mean, self.sd, self.signed)


def correlations(
    a: Activity, b: Activity, latents: slice | Int[ndarray, "some"] = slice(None)
) -> Float[ndarray, "a b"]:
    """Pearson's correlation over tokens of some latents of `a` with all of `b`; 0 where either is constant.

        (Σ z_a z_b / n − m_a m_b) / (σ_a σ_b)

    The sum runs over the tokens where both are active; means and variances count the others as 0. Exact, and never dense in tokens.
    """
    n = a.n_tokens
    if n != b.n_tokens:
        raise ResultError(f"activations on {n} and on {b.n_tokens} tokens; give the same tokens to both")
    together = (a.z[:, latents].T @ b.z).toarray() / n
    return _standardised(together, a.mean[latents, None], b.mean, a.sd[latents, None], b.sd)


def pair_correlations(
    a: Activity, b: Activity, i: Int[ndarray, "pair"], j: Int[ndarray, "pair"]
) -> Float[ndarray, "pair"]:
    """Correlations of single pairs: latent i of `a` with latent j of `b`."""
    found = np.zeros(len(i))
    for start in range(0, len(i), 4096):
        some = slice(start, start + 4096)
        together = np.asarray(a.z[:, i[some]].multiply(b.z[:, j[some]]).sum(axis=0)).ravel() / a.n_tokens
        found[some] = _standardised(together, a.mean[i[some]], b.mean[j[some]], a.sd[i[some]], b.sd[j[some]])
    return found


def _standardised(together: ndarray, mean_a: ndarray, mean_b: ndarray, sd_a: ndarray, sd_b: ndarray) -> ndarray:
    size = sd_a * sd_b
    return np.clip(np.where(size > 0, (together - mean_a * mean_b) / np.where(size > 0, size, 1.0), 0.0), -1, 1)


def cosines(a: Activity, b: Activity, latents: slice = slice(None)) -> Float[ndarray, "a b"]:
    """Cosine of decoder rows of some latents of `a` with all of `b`."""
    return (a.rows[latents] @ b.rows.to(a.rows).T).double().cpu().numpy()


def usable(of: Activity, min_active: int) -> Bool[ndarray, "latent"]:
    """Latents that can be matched: active on at least `min_active` tokens and not constant.

    Two latents that fire once, on the same token, have correlation 1: on few tokens a correlation means nothing.
    """
    return (of.fired >= max(min_active, 1)) & (of.sd > 0)


def blocks(n: int, width: int) -> Iterator[slice]:
    """Rows of a table of this width, `BLOCK` numbers at a time."""
    step = max(1, BLOCK // max(1, width))
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def chosen_pairs(some: slice, which: ndarray, weight: ndarray) -> tuple[ndarray, ndarray, ndarray]:
    """The chosen entries of a block: row in the whole table, column, weight."""
    i, j = which.nonzero()
    return i + some.start, j, weight[i, j]


def joined(parts: list[tuple[ndarray, ndarray, ndarray]]) -> tuple[ndarray, ndarray, ndarray]:
    """The entries of all blocks."""
    i, j, weight = (np.concatenate(column) for column in zip(*parts, strict=True))
    return i, j, weight


def near_duplicates(
    of: Activity, cosine: float = 0.9
) -> tuple[Int[ndarray, "pair"], Int[ndarray, "pair"], Float[ndarray, "pair"]]:
    """Pairs i < j of one dictionary whose decoder rows have a cosine (|cosine| for signed latents) above a threshold: i, j, the
    cosine."""
    n, parts = len(of.fired), []
    for some in blocks(n, n):
        cos = cosines(of, of, some)
        later = np.arange(n) > np.arange(some.start, some.stop)[:, None]
        parts.append(chosen_pairs(some, later & ((np.abs(cos) if of.signed else cos) > cosine), cos))
    return joined(parts)


def random_rows(like: Float[Tensor, "latent d_model"], generator: torch.Generator, isotropic: bool) -> Tensor:
    """As many random unit rows: isotropic, or normal with the mean and covariance of the given rows, normalised.

    The null of shared directions: decoder rows fill the space unevenly, so rows with their covariance are closer than isotropic ones.
    A CPU generator gives the same rows on every device.
    """
    noise = torch.randn(like.shape, generator=generator, dtype=torch.float64)
    if not isotropic:
        rows = like.double().cpu()
        size, axes = torch.linalg.eigh(torch.cov(rows.T))
        noise = rows.mean(0) + (noise * size.clamp(min=0).sqrt()) @ axes.T
    return unit_rows(noise).to(like)

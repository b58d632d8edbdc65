"""Which latents are active at which tokens, kept sparse: what atlases, comparisons and cards are made of."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from scipy import sparse
from torch import Tensor

from sae_models.sae import SAE

CHUNK, CHUNK_GPU = 2**24, 2**27  # latents formed at once


@dataclass(frozen=True, eq=False)
class ActiveLatents:
    """Every (token, latent) with z ≠ 0, of either sign, in ascending order of token, then latent; on the CPU."""

    token: Int[ndarray, "entry"]
    """row of the activations that were encoded"""
    latent: Int[ndarray, "entry"]
    z: Float[ndarray, "entry"]
    n_tokens: int
    d_sae: int

    def __len__(self) -> int:
        return len(self.z)

    @property
    def start(self) -> Int[ndarray, "bound"]:
        """Where each token's entries begin; one more for the end."""
        return np.searchsorted(self.token, np.arange(self.n_tokens + 1))

    def matrix(self) -> sparse.csr_matrix:
        """z as a sparse matrix `[token, d_sae]`."""
        return sparse.csr_matrix((self.z, (self.token, self.latent)), shape=(self.n_tokens, self.d_sae))

    def frequency(self) -> Float[ndarray, "d_sae"]:
        """Share of the tokens on which each latent is active."""
        return np.bincount(self.latent, minlength=self.d_sae) / max(1, self.n_tokens)


@torch.no_grad()
def active_latents(sae: SAE, x: Float[Tensor, "token d_model"]) -> ActiveLatents:
    """Encode some tokens at a time and keep what is active. Raises `BelongingError` for activations of another width."""
    many = max(1, (CHUNK if sae.device.type == "cpu" else CHUNK_GPU) // sae.d_sae)
    places, values = [], []
    for start in range(0, len(x), many):
        z = sae.encode(x[start : start + many])
        at = z.nonzero()
        values.append(z[at[:, 0], at[:, 1]].float().cpu())
        places.append((at + at.new_tensor([start, 0])).cpu())
    place = torch.cat(places) if places else torch.zeros(0, 2, dtype=torch.long)
    z = torch.cat(values) if values else torch.zeros(0)
    return ActiveLatents(place[:, 0].numpy(), place[:, 1].numpy(), z.numpy(), len(x), sae.d_sae)

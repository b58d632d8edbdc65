"""Small weights to write files from, and what it means for two outputs to be the same."""

import torch
from torch import Tensor

D_MODEL, D_SAE, K = 12, 40, 5


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Normal, the same for the same seed and shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(d_model: int = D_MODEL) -> Tensor:
    """Activations of two prompts, of norms from small to large, off zero."""
    return drawn(2, 9, d_model, seed=99) * torch.linspace(0.2, 6, 9)[:, None] + 0.5


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """Equal up to the order of summation: a few dozen terms in float32, each rounded to 6e-8 of the largest."""
    ours, theirs = ours.detach(), theirs.detach()
    assert ours.shape == theirs.shape and theirs.abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6 * float(theirs.abs().max()))


def strongest(s: Tensor, k: int = K) -> Tensor:
    """s where it is among the k largest of its row, else 0."""
    return s * (s >= s.sort(dim=-1, descending=True).values[..., k - 1 : k])

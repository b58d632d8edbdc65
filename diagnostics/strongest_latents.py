"""A token's latents of largest effect on the stream, what removes them, and the same edits turned about the token at random."""

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from diagnostics.edit_bench import Bench
from diagnostics.rotated_edits import rotated_edits


def strongest(
    bench: Bench, x: Float[Tensor, "item d_model"], k: int | None = None, among: np.ndarray | None = None
) -> tuple[Int[Tensor, "item k"], Float[Tensor, "item k"]]:
    """Each token's active latents by falling |z|‖d‖ (None: all of them), padded with −1, and their z, padded with 0."""
    z = bench.sae.encode(x.to(bench.sae.W_dec))
    size = z.abs() * bench.sae.W_dec.norm(dim=1)
    if among is not None:
        allowed = torch.zeros_like(size[0])
        allowed[torch.from_numpy(among).to(size.device)] = 1
        size = size * allowed
    size, index = size.topk(min(k or int((size > 0).sum(1).max().clamp(min=1)), size.shape[1]), dim=1)
    return index.masked_fill(size == 0, -1), z.gather(1, index).masked_fill(size == 0, 0)


def removals(bench: Bench, index: Int[Tensor, "item k"], z: Float[Tensor, "item k"]) -> Float[Tensor, "item k d_model"]:
    """−z_i·d_i of each token's latents; 0 in the padding."""
    return -z[..., None] * bench.sae.W_dec[index.clamp(min=0)]


def turned(
    bench: Bench,
    kind: str,
    items: pd.DataFrame,
    x: Float[Tensor, "item d_model"],
    deltas: Float[Tensor, "item k d_model"],
) -> Float[Tensor, "item k d_model"]:
    """Each token's edits turned about its x as one, in directions of one of `PLACEBOS`; nan where the text has not enough of them."""
    towards = bench.towards(kind, items, 2 * deltas.shape[1], "rotated")  # half of them to spare
    return torch.stack([rotated_edits(*some) for some in zip(x, deltas, towards, strict=True)])

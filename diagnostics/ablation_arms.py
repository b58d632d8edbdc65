"""What is taken from the stream when a concept's latents are ablated, and what it is compared with."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diagnostics.latent_ranking import Encoded
from diagnostics.sampling import generator, hash_keys
from interventions.edits import matched_placebo

ARMS = ("selected", "random", "placebo", "keep")
"""`selected`: the top N latents of the ranking, z_i·d_i subtracted wherever they fire, the SAE's error kept. `random`: as many other
latents that are active on the concept's texts, of like frequency. `placebo`: at each token a vector of the norm and angle of the
selected edit, turned towards the difference of two other tokens' activations. `keep`: all active latents but the top N subtracted,
the error kept: what the N suffice for (N = 0: none kept)."""
NEAREST = 10
"""latents of the nearest log frequency, one of which is drawn"""


def frequency_matched(
    selected: Int[Tensor, "latent"],
    frequency: Float[Tensor, "d_sae"],
    candidates: Bool[Tensor, "d_sae"],
    seed: int,
    label: str,
) -> Int[Tensor, "other"]:
    """For each selected latent, in turn, another one: of the `NEAREST` unused candidates in log frequency that of the smallest key.

    Fewer than `selected` where the candidates run out. Latents of frequency 0 are no candidates.
    """
    frequencies = frequency.double().cpu().numpy()
    pool = np.flatnonzero(candidates.cpu().numpy() & (frequencies > 0))
    pool = pool[np.argsort(frequencies[pool], kind="stable")]
    level, key = np.log(frequencies[pool]), hash_keys(seed, label, pool)
    free = np.ones(len(pool), dtype=bool)
    chosen = []
    for latent in selected.tolist()[: len(pool)]:
        wanted = np.log(max(frequencies[latent], 1e-12))
        far = np.where(free, np.abs(level - wanted), np.inf)
        near = np.argsort(far, kind="stable")[: min(NEAREST, int(free.sum()))]
        best = near[np.argmin(key[near])]
        free[best] = False
        chosen.append(int(pool[best]))
    return torch.tensor(chosen, dtype=torch.long, device=selected.device)


def tangents(
    x: Float[Tensor, "row d_model"], pool: Float[Tensor, "token d_model"], seed: int, label: str
) -> Float[Tensor, "row d_model"]:
    """For each row the difference of two tokens drawn from `pool` (tokens of other texts), the same for the same seed and label."""
    two = torch.randint(len(pool), (2, len(x)), generator=generator(seed, label))
    two[1] = torch.where(two[0] == two[1], (two[1] + 1) % len(pool), two[1])
    one, other = (pool[i.to(pool.device)] for i in two)
    return one - other


class Arm:
    """An arm at one N: Δx at the tokens of an `Encoded`."""

    def __init__(
        self,
        name: str,
        latents: Int[Tensor, "latent"],
        towards: Callable[[Bool[Tensor, "row"]], Float[Tensor, "some_row d_model"]] | None = None,
    ):
        self.name, self.latents, self.towards = name, latents, towards

    def delta(self, encoded: Encoded, keep: Bool[Tensor, "row"]) -> tuple[Float[Tensor, "some_row d_model"], int]:
        """Δx at the tokens `keep`, exactly 0 where no latent concerned is active; and how many placebos do not exist."""
        some = encoded.take(keep)
        removed = -some.contribution(self.latents, rest=self.name == "keep")
        if self.towards is None:
            return removed, 0
        edited = (removed != 0).any(-1)
        x, found = some.x[edited].to(removed), torch.zeros_like(removed)
        placebo = matched_placebo(x, x + removed[edited], self.towards(keep)[edited].to(removed)) - x
        exists = placebo.isfinite().all(-1)  # not where all of x is removed: it has no direction then
        found[edited] = torch.where(exists[:, None], placebo, 0.0)
        return found, int((~exists).sum())

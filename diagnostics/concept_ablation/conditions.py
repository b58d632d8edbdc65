"""What is taken from the stream when a concept's latents are ablated, and what it is compared with."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diagnostics.concept_ablation.ranking import Encoded
from diagnostics.sampling.tokens import generator, hash_keys
from interventions.edits import matched_placebo

ARMS = ("selected", "random", "placebo", "keep")
"""`selected`: the top N latents of the ranking, z_i·d_i subtracted wherever they fire, the SAE's error kept. `random`: as many other
latents that are active on the concept's texts, each of like expected dose. `placebo`: at each token a vector of the norm and
angle of the selected edit, turned towards one direction for the whole text, the difference of two other tokens' activations. `keep`: all
active latents but the top N subtracted, the error kept: what the N suffice for (N = 0: none kept)."""
NEAREST, WITHIN = 10, 1.25
"""of so many latents of the nearest expected dose, no further off than this factor, one is drawn"""
_TRIES = 8  # tokens to find two of different activations among


def dose_matched(
    selected: Int[Tensor, "latent"],
    dose: Float[Tensor, "d_sae"],
    active: Bool[Tensor, "d_sae"],
    seed: int,
    label: str,
) -> Int[Tensor, "other"]:
    """For each selected latent, in turn, another active one of like expected dose (`Encoded.dose`), each once: a ranking by lot.

    Of the `NEAREST` unused ones in log dose that are within a factor `WITHIN` the one of the smallest key; the nearest where none is.
    What else is selected may be drawn: without it the floor would be drawn from the bottom of the ranking, from latents of other
    concepts. The first ones stay as more are selected. Fewer than `selected` where the active ones run out. Source: ours.
    """
    doses = dose.double().cpu().numpy()
    pool = np.flatnonzero(active.cpu().numpy() & (doses > 0))
    level, key = np.log(doses[pool]), hash_keys(seed, label, pool)
    free = np.ones(len(pool), dtype=bool)
    chosen = []
    for latent in selected.tolist():
        usable = free & (pool != latent)
        if not usable.any():
            break
        far = np.where(usable, np.abs(level - np.log(max(doses[latent], 1e-12))), np.inf)
        near = np.argsort(far, kind="stable")[:NEAREST]
        near = near[far[near] <= max(np.log(WITHIN), far[near[0]])]
        best = near[np.argmin(key[near])]
        free[best] = False
        chosen.append(int(pool[best]))
    return torch.tensor(chosen, dtype=torch.long, device=selected.device)


def directions(
    n_texts: int, pool: Float[Tensor, "token d_model"], seed: int, label: str
) -> Float[Tensor, "text d_model"]:
    """For each text the difference of two tokens of `pool` (tokens of other texts), drawn by seed and label.

    One a text, as a latent's decoder direction is the same wherever it fires: effects that add up over tokens do so here too.
    """
    drawn = torch.randint(len(pool), (_TRIES, n_texts), generator=generator(seed, label)).to(pool.device)
    apart = pool[drawn[0]] - pool[drawn[1:]]
    first = (apart != 0).any(-1).byte().argmax(0)
    return apart[first, torch.arange(n_texts, device=pool.device)]


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

"""Edits of the residual stream: a concept's latents ablated, and the controls."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diagnostics.concept_ablation.ranking import Encoded
from diagnostics.sampling.tokens import generator, hash_keys
from interventions.edits import matched_placebo

NEAREST, WITHIN = 10, 1.25
"""a random latent is drawn from this many nearest in expected dose, within this factor"""
_TRIES = 8  # tokens to find two of different activations among


def dose_matched(
    selected: Int[Tensor, "latent"],
    dose: Float[Tensor, "d_sae"],
    active: Bool[Tensor, "d_sae"],
    seed: int,
    label: str,
) -> Int[Tensor, "other"]:
    """For each selected latent, in turn, another active one of similar expected dose (`Encoded.dose`), each once.

    Drawn by seeded hash from the `NEAREST` unused latents in log dose within a factor `WITHIN`; the nearest one where there are none.
    Other selected latents may be drawn: otherwise the control would come from the bottom of the ranking, from latents of other
    concepts. A larger selection keeps the earlier draws. Fewer than `selected` where active latents run out. Source: ours.
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

    One direction a text, since a latent has the same decoder direction wherever it fires: effects of placebos add up over tokens too.
    """
    drawn = torch.randint(len(pool), (_TRIES, n_texts), generator=generator(seed, label)).to(pool.device)
    apart = pool[drawn[0]] - pool[drawn[1:]]
    first = (apart != 0).any(-1).byte().argmax(0)
    return apart[first, torch.arange(n_texts, device=pool.device)]


class Condition:
    """A condition at one N: Δx at the tokens of an `Encoded`."""

    def __init__(
        self,
        name: str,
        latents: Int[Tensor, "latent"],
        towards: Callable[[Bool[Tensor, "row"]], Float[Tensor, "some_row d_model"]] | None = None,
    ):
        self.name, self.latents, self.towards = name, latents, towards

    def delta(self, encoded: Encoded, keep: Bool[Tensor, "row"]) -> tuple[Float[Tensor, "some_row d_model"], int]:
        """Δx at the tokens `keep`, exactly 0 where none of the latents is active; and how many placebos do not exist."""
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

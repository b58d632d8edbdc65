"""Where the latents of an SAE fire in a text, and which of them are measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from diagnostics.sampling.tokens import hash_keys
from diagnostics.statistics.tables import where
from interventions.errors import ResultError
from sae_models.active_latents import ActiveLatents
from sae_models.dictionaries import Dictionary


@dataclass(frozen=True, eq=False)
class Firings:
    """Which latents of an SAE are active at the usable tokens of a text."""

    prompt: Int[ndarray, "token"]
    position: Int[ndarray, "token"]
    active: ActiveLatents

    @cached_property
    def count(self) -> Int[ndarray, "d_sae"]:
        """Usable tokens at which each latent is active."""
        return np.bincount(self.active.latent, minlength=self.active.d_sae)

    @cached_property
    def typical(self) -> Float[ndarray, "d_sae"]:
        """Mean |z| where active, with the sign of the sum of z; 0 for a latent that never is."""
        size, total = (
            np.bincount(self.active.latent, weights=w, minlength=self.active.d_sae)
            for w in (np.abs(self.active.z), self.active.z)
        )
        return np.where(total < 0, -1.0, 1.0) * size / np.maximum(self.count, 1)

    def among(self, keep: Bool[ndarray, "token"]) -> "Firings":
        """At some of the tokens."""
        entry = keep[self.active.token]
        token = (np.cumsum(keep) - 1)[self.active.token[entry]]
        active = ActiveLatents(
            token, self.active.latent[entry], self.active.z[entry], int(keep.sum()), self.active.d_sae
        )
        return Firings(self.prompt[keep], self.position[keep], active)

    def some(self, latents: Int[ndarray, "latent"], most: int, seed: int, label: str) -> pd.DataFrame:
        """At most so many tokens of each latent where it is active, by seeded hash; with z."""
        wanted = np.isin(self.active.latent, latents)
        latent, token, z = (x[wanted] for x in (self.active.latent, self.active.token, self.active.z))
        key = hash_keys(seed, f"firings/{label}", latent, self.prompt[token], self.position[token])
        order = np.lexsort((key, latent))
        latent, token, z = latent[order], token[order], z[order]
        _, first, size = np.unique(latent, return_index=True, return_counts=True)
        few = np.arange(len(latent)) - np.repeat(first, size) < most
        table = pd.DataFrame(
            {"target_prompt": self.prompt[token], "target_position": self.position[token], "latent": latent, "z": z}
        )
        return where(table, few).reset_index(drop=True)

    def draw(self, n: int, seed: int, label: str, at_least: int = 1) -> Int[ndarray, "latent"]:
        """So many latents that fire on `at_least` usable tokens, all equally likely, by seeded hash; ascending."""
        live = np.flatnonzero(self.count >= at_least)
        return np.sort(live[np.argsort(hash_keys(seed, f"latents/{label}", live), kind="stable")[:n]])


def chosen_latents(
    firings: Firings, latents: int | Sequence[int], seed: int, dictionary: Dictionary, at_least: int
) -> Int[ndarray, "latent"]:
    """The latents named, or so many drawn. Raises `ResultError` for one that does not exist or never fires, and where none is left."""
    if not isinstance(latents, int):
        some = np.unique(latents)
        bad = [i for i in some.tolist() if not 0 <= i < len(dictionary) or firings.count[i] == 0]
        if bad or not len(some):
            raise ResultError(
                f"latents {bad or 'none'} of {dictionary.name} do not exist or never fire here; it has {len(dictionary)}"
            )
        return some
    drawn = firings.draw(latents, seed, dictionary.label, at_least)
    if not len(drawn):
        raise ResultError(
            f"no latent of {dictionary.name} is active on {at_least} usable tokens or more; give more text"
        )
    return drawn


def partner_of(firings: Firings, latent: int) -> int:
    """The latent that is active at most of the tokens where this one is (the first of several); −1 where none is."""
    active = firings.active
    tokens = active.token[active.latent == latent]
    count = np.bincount(active.latent[np.isin(active.token, tokens)], minlength=active.d_sae)
    count[latent] = 0
    return int(count.argmax()) if count.any() else -1

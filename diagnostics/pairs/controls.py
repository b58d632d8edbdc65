"""Matched controls: the difference of two other pairs' clean runs, at the tokens of the same label."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from diagnostics.pairs.pair import Pairs, labels
from interventions.models.causal_model import CausalModel
from interventions.recording import Recording, record
from interventions.sites import Site

NO_CONTROL = "control without two other pairs that differ"
"""Why rows of controls are left out."""


def partners(pairs: Pairs, controls: int, seed: int) -> Int[ndarray, "pair control 2"]:
    """Two other pairs for each control of each pair, drawn among those with the same labels in the same order, or in the same pool.

    −1 where there are not two others.
    """
    names = [tuple(labels(pair)) for pair in pairs]
    found = np.full((len(pairs), controls, 2), -1)
    rng = np.random.default_rng(seed)
    for i, pool in enumerate(pairs.pools):
        others = [j for j in range(len(pairs)) if j != i and pairs.pools[j] == pool and set(names[j]) == set(names[i])]
        alike = [j for j in others if names[j] == names[i] and len(pairs[j]) == len(pairs[i])]
        some = alike if len(alike) >= 2 else others
        for k in range(controls):
            if len(some) >= 2:
                found[i, k] = rng.choice(some, size=2, replace=False)
    return found


@dataclass(frozen=True)
class Partners:
    """The clean runs that give the controls of some pairs, and where each of their positions' label stands in them."""

    run: Recording | None
    """None where no pair has two others"""
    row: Int[ndarray, "pair control 2"]
    """prompt of `run`; −1 where there are not two others"""
    position: Int[ndarray, "pair control 2 pos"]

    @classmethod
    def of(
        cls, model: CausalModel, pairs: Pairs, which: Sequence[int], sites: Sequence[Site], controls: int, seed: int
    ) -> "Partners":
        """Those of the pairs `which`, recorded at some sites."""
        drawn = partners(pairs, controls, seed)[list(which)]
        used = sorted(set(drawn.reshape(-1).tolist()) - {-1})
        run = record(model, [list(pairs[j].clean) for j in used], sites, keep_cache=False) if used else None
        row = np.where(drawn < 0, -1, np.searchsorted(used, drawn))
        position = np.zeros((*drawn.shape, max(len(pairs[i]) for i in which)), dtype=int)
        for n, i in enumerate(which):
            own = labels(pairs[i])
            for k, side in zip(*np.nonzero(drawn[n] >= 0), strict=True):
                there = {label: p for p, label in enumerate(labels(pairs[int(drawn[n, k, side])]))}
                position[n, k, side, : len(own)] = [there[label] for label in own]
        return cls(run, row, position)

    def difference(
        self, site: Site, k: int, pair: Int[ndarray, "token"], position: Int[ndarray, "token"]
    ) -> Float[Tensor, "token width"]:
        """a − b at a site: the two clean runs at the label of these tokens; pair: its number among `which`. nan without two others."""
        assert self.run is not None
        row = self.row[pair, k]
        one, other = (
            self.run.at(site, torch.from_numpy(row[:, side].clip(0)), torch.from_numpy(self.position[pair, k, side, position]))
            for side in (0, 1)
        )  # fmt: skip
        wide = torch.promote_types(one.dtype, torch.float32)
        alone = torch.from_numpy((row < 0).any(axis=1)).to(one.device)
        return (one.to(wide) - other.to(wide)).masked_fill(alone[:, None], torch.nan)


def unit(along: Float[Tensor, "*any width"]) -> Float[Tensor, "*any width"]:
    """along/‖along‖; nan where it is 0."""
    size = along.norm(dim=-1, keepdim=True)
    return torch.where(size > 0, along / size, torch.nan)

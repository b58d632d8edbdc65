"""The rows of the unit-norm experiment: tokens drawn once, edited alone and with their whole prompt."""

from typing import Any

import numpy as np
import pandas as pd
import torch

from diagnostics.running.clean import CleanActivations
from diagnostics.running.single_edits import EditedPrompts, EditedRows, among_prompts, column, dose_columns
from diagnostics.sampling.tokens import generator, hash_keys
from interventions.edits import norm, random_like, rescale, rotate_by_distance, swap_direction
from interventions.errors import ResultError
from interventions.sites import Site

ALONE = ("self", "unit_norm", "rotation")
"""Edits of one token: `self` (the noise floor); `unit_norm` x/‖x‖; `rotation`: x turned along a random tangent by the same distance."""
TOGETHER = ("unit_norm_everywhere", "rotation_everywhere")
"""The same for all tokens of the prompt at once, the first one too; read at the token."""


class UnitNormDesign:
    """Tokens, drawn once; filters drop them, and are counted."""

    def __init__(self, clean: CleanActivations, asked: int):
        self.clean, seed = clean, clean.settings.seed
        prompt, position = np.nonzero(np.arange(clean.usable.shape[1]) < clean.length[:, None])
        drawn = np.argsort(hash_keys(seed, "unit_norm", prompt, position), kind="stable")[:asked]
        prompt, position = prompt[drawn], position[drawn]
        keep = clean.usable[prompt, position]
        dropped = {reason: int(bad[prompt, position].sum()) for reason, bad in clean.filter.reasons.items()}
        self.found = {"pairs_dropped": {r: n for r, n in dropped.items() if n}, "tokens_used": int(keep.sum())}
        if not keep.any():
            raise ResultError(
                f"none of {asked} tokens is left, dropped: {self.found['pairs_dropped']}; give other text"
            )
        self.prompt, self.position, self.token = prompt[keep], position[keep], np.flatnonzero(keep)

    def _chosen(self, among: np.ndarray | None) -> np.ndarray:
        return among_prompts(self.prompt, among)

    def count(self, site: Site, among: np.ndarray | None, null: bool = False) -> int:
        """How many `rows` there are that are measured alone."""
        return len(self._chosen(among)) * len(ALONE)

    def rows(self, site: Site, among: np.ndarray | None) -> EditedRows:
        """The rows at a site whose tokens are in the prompts `among` (None: all), token by token; then those edited together."""
        chosen = self._chosen(among)
        prompt, position = self.prompt[chosen], self.position[chosen]
        x = self.clean.at(site, prompt, position)
        stream = generator(self.clean.settings.seed, "unit_norm", site)
        drawn = random_like(torch.empty(len(self.token), x.shape[1]), stream)[torch.from_numpy(chosen)]
        edited = torch.stack([self._edit(name, x, drawn.to(x.device)) for name in ALONE], dim=1)
        table = self._lines(chosen, list(ALONE), x) | dose_columns(x, edited)
        flat = edited.flatten(0, 1), x[:, None].expand_as(edited).flatten(0, 1)
        return EditedRows(pd.DataFrame(table), *flat, whole=self._together(site, chosen, x) if len(chosen) else None)

    def _lines(self, chosen: np.ndarray, names: list[str], x: torch.Tensor) -> dict[str, Any]:
        n = len(names)
        return {
            "token": self.token[chosen].repeat(n),
            "edit": names * len(chosen),
            "target_prompt": self.prompt[chosen].repeat(n),
            "target_position": self.position[chosen].repeat(n),
            "target_norm": column(norm(x).squeeze(-1), n),
            "norm_of_median": self.clean.norm_of_median[self.prompt[chosen], self.position[chosen]].repeat(n),
        }

    def _together(self, site: Site, chosen: np.ndarray, x: torch.Tensor) -> EditedPrompts:
        """Every prompt that holds a chosen token, once with norms of 1 and once turned."""
        some, which = np.unique(self.prompt[chosen], return_inverse=True)
        whole = self.clean.activations[site][torch.from_numpy(some).to(x.device)]
        stream = [generator(self.clean.settings.seed, "unit_norm everywhere", site, p) for p in some]
        towards = torch.stack([random_like(torch.empty(whole.shape[1:]), s) for s in stream]).to(x.device)
        vectors = torch.stack([self._edit(name, whole, towards) for name in ALONE[1:]])
        position = torch.from_numpy(self.position[chosen]).to(x.device)
        moved = vectors[:, torch.from_numpy(which).to(x.device), position].transpose(0, 1)
        table = self._lines(chosen, list(TOGETHER), x) | dose_columns(x, moved)
        run = (which[:, None] + len(some) * np.arange(2)).reshape(-1)
        return EditedPrompts(pd.DataFrame(table), run, np.tile(some, 2), vectors.flatten(0, 1))

    def _edit(self, name: str, x: torch.Tensor, towards: torch.Tensor) -> torch.Tensor:
        if name == "self":
            return swap_direction(x, x)
        if name == "unit_norm":
            return rescale(x, 1 / norm(x))
        return rotate_by_distance(x, towards, (norm(x) - 1).abs())

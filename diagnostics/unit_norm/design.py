"""The rows of the unit-norm experiment: tokens drawn once, edited alone and with their whole prompt."""

from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from diagnostics.running.clean import CleanActivations
from diagnostics.running.single_edits import EditedPrompts, EditedRows, among_prompts, dose_columns
from diagnostics.running.token_edits import TokenDesign
from diagnostics.sampling.tokens import generator
from interventions.edits import norm, random_like, rescale, rotate_by_distance, swap_direction
from interventions.sites import Site

ALONE = ("self", "unit_norm", "rotation")
"""Edits of one token: `self` (the noise floor); `unit_norm` x/‖x‖; `rotation`: x turned along a random tangent by the same distance."""
TOGETHER = ("unit_norm_everywhere", "rotation_everywhere")
"""The same for all tokens of the prompt at once, the first one too; read at the token."""


class UnitNormDesign(TokenDesign):
    """Tokens edited alone, and the same tokens where their whole prompt is edited."""

    def __init__(self, clean: CleanActivations, asked: int):
        super().__init__(clean, "unit_norm", asked, ALONE, lambda _clean, _site, x, towards: _edits(x, towards))

    def rows(self, site: Site, among: np.ndarray | None) -> EditedRows:
        """The rows at a site whose tokens are in the prompts `among` (None: all), token by token; then those edited together."""
        alone = super().rows(site, among)
        chosen = among_prompts(self.prompt, among)
        return replace(alone, whole=self._together(site, chosen) if len(chosen) else None)

    def _together(self, site: Site, chosen: np.ndarray) -> EditedPrompts:
        """Every prompt that holds a chosen token, once with norms of 1 and once turned."""
        some, which = np.unique(self.prompt[chosen], return_inverse=True)
        x = self.clean.at(site, self.prompt[chosen], self.position[chosen])
        whole = self.clean.activations[site][torch.from_numpy(some).to(x.device)]
        stream = [generator(self.clean.settings.seed, "unit_norm everywhere", site, p) for p in some]
        towards = torch.stack([random_like(torch.empty(whole.shape[1:]), s) for s in stream]).to(x.device)
        made = _edits(whole, towards)
        vectors = torch.stack([made[name] for name in ALONE[1:]])
        position = torch.from_numpy(self.position[chosen]).to(x.device)
        moved = vectors[:, torch.from_numpy(which).to(x.device), position].transpose(0, 1)
        table = self.lines(chosen, TOGETHER, x) | dose_columns(x, moved)
        run = (which[:, None] + len(some) * np.arange(2)).reshape(-1)
        return EditedPrompts(pd.DataFrame(table), run, np.tile(some, 2), vectors.flatten(0, 1))


def _edits(x: torch.Tensor, towards: torch.Tensor) -> dict[str, torch.Tensor]:
    """x `[..., d_model]` put back, forced to norm 1, and turned by the same distance."""
    turned = rotate_by_distance(x, towards, (norm(x) - 1).abs())
    return {"self": swap_direction(x, x), "unit_norm": rescale(x, 1 / norm(x)), "rotation": turned}

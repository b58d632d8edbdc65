"""The rows of a dose-response run: tokens and directions drawn once, edits of the same distance, and their controls."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from diagnostics.dose.summary import placebo_names
from diagnostics.running.clean import CleanActivations
from diagnostics.running.single_edits import EditedRows, among_prompts, column, dose_columns
from diagnostics.sampling.tokens import cross_prompt_pairs, generator
from diagnostics.statistics.tables import PLACEBOS
from interventions.edits import (
    add_direction,
    cosine,
    matched_placebo,
    norm,
    random_like,
    rescale,
    rotate_by_distance,
    swap_direction,
)
from interventions.errors import ResultError
from interventions.sites import Site

EDITS = ("toward_token", "between_tokens", "isotropic", "norm_up", "norm_down")
"""`toward_token`: x turned towards another token's activation along the great circle; `between_tokens`: towards the difference
of two other tokens' activations; `isotropic`: towards a random direction; `norm_up`, `norm_down`: (1 ± dose)·x."""
SELF = "self"
COLUMNS = (
    "model", "layer", "point", "context", "pair", "edit", "dose", "target_prompt", "target_position", "source_prompt",
    "source_position", "target_norm", "norm_of_median", "cosine", "delta_norm", "delta_angle", "kl", "js", "clean_entropy",
    "top1_changed", "kl_direct",
)  # fmt: skip
"""Of the table. dose: ‖Δx‖/‖x‖ as asked for (0: `self`, the noise floor); cosine: of target and source token. The others as in
the direction-norm table."""


def direction_digest(direction: Tensor) -> list[float]:
    """What tells one direction from another: its norm and three projections."""
    fixed = torch.randn(3, len(direction), generator=torch.Generator().manual_seed(0))
    return [float(norm(direction)), *(fixed.double() @ direction).tolist()]


def edit_names(directions: Mapping[str, Any] | Sequence[str]) -> list[str]:
    """Edits at every dose: ours, then each given direction with its placebos."""
    return [*EDITS, *(full for name in directions for full in (name, *placebo_names(name)))]


class DoseDesign:
    """Tokens and sources, and the vectors at each dose: the same whatever order they are asked for in."""

    def __init__(self, clean: CleanActivations, asked: int, doses: tuple[float, ...], directions: dict[str, Tensor]):
        self.clean, self.doses = clean, doses
        # By the name of an edit its direction, of length 1, and the kind of placebo; a name is never split.
        self.given: dict[str, tuple[Tensor, str | None]] = {}
        for name, direction in directions.items():
            unit = (direction / norm(direction)).float()
            kinds = zip((name, *placebo_names(name)), (None, *PLACEBOS), strict=True)
            self.given |= {full: (unit, kind) for full, kind in kinds}
        drawn = cross_prompt_pairs(clean.length, asked, clean.settings.seed)
        keep, dropped = clean.filter.keep(drawn)
        self.pairs, self.numbers = drawn.take(keep), np.flatnonzero(keep)
        self.found = {"pairs_dropped": {reason: n for reason, n in dropped.items() if n}, "pairs_used": int(keep.sum())}
        if not keep.any():
            raise ResultError(
                f"none of {asked} tokens is left, dropped: {self.found['pairs_dropped']}; give other text or a looser sink filter"
            )
        names = edit_names(directions)
        self.lines = [(SELF, 0.0), *((name, dose) for name in names for dose in doses)]

    def _chosen(self, among: np.ndarray | None) -> np.ndarray:
        return among_prompts(self.pairs.target_prompt, among)

    def count(self, site: Site, among: np.ndarray | None, null: bool = False) -> int:
        """How many `rows` there are."""
        return len(self._chosen(among)) * len(self.lines)

    def rows(self, site: Site, among: np.ndarray | None) -> EditedRows:
        """The rows at a site whose targets are in the prompts `among` (None: all), token by token."""
        chosen, n = self._chosen(among), len(self.lines)
        pairs = self.pairs.take(chosen)
        x = self.clean.at(site, pairs.target_prompt, pairs.target_position)
        a = self.clean.at(site, pairs.source_prompt, pairs.source_position)
        stream = generator(self.clean.settings.seed, "dose_response", site)
        isotropic = random_like(torch.empty(len(self.pairs), x.shape[1]), stream)[torch.from_numpy(chosen)].to(x.device)
        between = self.clean.between(site, len(self.pairs), stream, chosen)
        towards = {"toward_token": a, "between_tokens": between, "isotropic": isotropic}
        edited = torch.stack([self._edit(name, dose, x, towards) for name, dose in self.lines], dim=1)
        table = pd.DataFrame(
            {
                "pair": self.numbers[chosen].repeat(n),
                "edit": [name for name, _ in self.lines] * len(pairs),
                "dose": [dose for _, dose in self.lines] * len(pairs),
                "target_prompt": pairs.target_prompt.repeat(n),
                "target_position": pairs.target_position.repeat(n),
                "source_prompt": pairs.source_prompt.repeat(n),
                "source_position": pairs.source_position.repeat(n),
                "target_norm": column(norm(x).squeeze(-1), n),
                "norm_of_median": self.clean.pair_norm_of_median(pairs).repeat(n),
                "cosine": column(cosine(x, a), n),
                **dose_columns(x, edited),
            }
        )
        return EditedRows(table, edited.flatten(0, 1), x[:, None].expand_as(edited).flatten(0, 1))

    def _edit(self, name: str, dose: float, x: Tensor, towards: dict[str, Tensor]) -> Tensor:
        if name == SELF:
            return swap_direction(x, x)
        if name in towards:
            return rotate_by_distance(x, towards[name], dose * norm(x))
        if name in ("norm_up", "norm_down"):
            return rescale(x, 1 + dose if name == "norm_up" else 1 - dose)
        unit, kind = self.given[name]
        moved = add_direction(x.float(), unit.to(x.device), dose * norm(x))
        if kind is None:
            return moved.to(x.dtype)
        return matched_placebo(x, moved, towards["between_tokens" if kind == "placebo_token" else "isotropic"])

"""The rows of a question that edits single tokens, each in several ways: tokens drawn once, edits side by side."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from diagnostics.running.clean import CleanActivations
from diagnostics.running.single_edits import EditedRows, among_prompts, column, dose_columns
from diagnostics.sampling.tokens import generator, ranked_tokens
from interventions.edits import norm, random_like
from interventions.errors import ResultError
from interventions.sites import Site

MakeEdits = Callable[[CleanActivations, Site, Tensor, Tensor], dict[str, Tensor]]
"""Edited vectors `[target, d_model]` by the name of the edit, from the clean activations, the site, the tokens' activations x and a
random vector for each, both `[target, d_model]`."""


class TokenDesign:
    """`asked` tokens of all prompts, drawn once by seed and label. Filters drop tokens and are counted; none is drawn again.

    Raises `ResultError` where no token is left.
    """

    def __init__(self, clean: CleanActivations, label: str, asked: int, names: tuple[str, ...], edits: MakeEdits):
        self.clean, self.label, self.names, self.edits = clean, label, names, edits
        ranked = ranked_tokens(clean.length, clean.settings.seed, label)
        prompt, position = (part[:asked] for part in ranked)
        keep = clean.usable[prompt, position]
        dropped = {reason: int(bad[prompt, position].sum()) for reason, bad in clean.filter.reasons.items()}
        self.found = {"pairs_dropped": {r: n for r, n in dropped.items() if n}, "tokens_used": int(keep.sum())}
        if not keep.any():
            raise ResultError(
                f"none of {asked} tokens is left, dropped: {self.found['pairs_dropped']}; give other text"
            )
        self.prompt, self.position, self.token = prompt[keep], position[keep], np.flatnonzero(keep)

    def count(self, site: Site, among: np.ndarray | None, null: bool = False) -> int:
        """How many `rows` there are."""
        return len(among_prompts(self.prompt, among)) * len(self.names)

    def rows(self, site: Site, among: np.ndarray | None) -> EditedRows:
        """The rows at a site whose tokens are in the prompts `among` (None: all), token by token."""
        chosen = among_prompts(self.prompt, among)
        x = self.clean.at(site, self.prompt[chosen], self.position[chosen])
        stream = generator(self.clean.settings.seed, self.label, site)
        random = random_like(torch.empty(len(self.token), x.shape[1]), stream)[torch.from_numpy(chosen)]
        made = self.edits(self.clean, site, x, random.to(x.device))
        edited = torch.stack([made[name] for name in self.names], dim=1)
        table = self.lines(chosen, self.names, x) | dose_columns(x, edited)
        return EditedRows(pd.DataFrame(table), edited.flatten(0, 1), x[:, None].expand_as(edited).flatten(0, 1))

    def lines(self, chosen: np.ndarray, names: tuple[str, ...], x: Tensor) -> dict[str, Any]:
        """Columns of the table that say what is edited, edits of a token side by side."""
        n, at = len(names), (self.prompt[chosen], self.position[chosen])
        return {
            "token": self.token[chosen].repeat(n),
            "edit": list(names) * len(chosen),
            "target_prompt": at[0].repeat(n),
            "target_position": at[1].repeat(n),
            "target_norm": column(norm(x).squeeze(-1), n),
            "norm_of_median": self.clean.norm_of_median[at].repeat(n),
        }

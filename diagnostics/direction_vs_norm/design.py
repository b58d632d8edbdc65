"""The rows of direction and norm patches: pairs of tokens drawn once, the patches and their matched placebos."""

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from diagnostics.direction_vs_norm.summary import SCALES
from diagnostics.running.clean import CleanActivations
from diagnostics.running.single_edits import EditedRows, among_prompts, column, dose_columns
from diagnostics.sampling.tokens import Pairs, cross_prompt_pairs, generator, matching_pairs
from interventions.edits import (
    cosine,
    matched_placebo,
    norm,
    norm_read,
    random_like,
    replace,
    rescale,
    rotate_by_distance,
    swap_direction,
    swap_norm,
)
from interventions.errors import ResultError
from interventions.sites import Site

PATCHES = ("direction", "norm", "full", "placebo_direction", "placebo_token", "placebo_norm")
"""`direction`: A's direction, B's norm. `norm`: B's direction, A's norm. `full`: x_A itself. `placebo_direction`: the direction
patch's norm and angle, along a random tangent; `placebo_token`: along the difference of two other tokens' activations.
`placebo_norm`: B turned along a random tangent by the norm patch's distance."""
EDITS = {
    "random": (*PATCHES, "self"),
    "same_norm": PATCHES,
    "high_cosine": PATCHES,
    "scale_rotate": (*(f"scale_{s:g}" for s in SCALES), "random_direction", "rotate_like_0.5", "rotate_like_2"),
}
"""Edits by pair set. `self`: A = B, the noise floor. `scale_s`: s·x. `random_direction`: a random direction of the same norm.
`rotate_like_s`: x turned along a random tangent by the distance of `scale_s` (for 5 it would pass 2‖x‖: there is none)."""
COLUMNS = (
    "model", "layer", "point", "context", "pair_set", "pair", "edit", "target_prompt", "target_position", "source_prompt",
    "source_position", "target_norm", "source_norm", "norm_of_median", "cosine", "delta_norm", "delta_angle", "kl", "js",
    "clean_entropy", "top1_changed", "kl_direct",
)  # fmt: skip
"""Of the table. model: `trained`, or `random 0` … for randomly initialised models. pair: index within its pair set, the same pair
everywhere for `random` and `scale_rotate`; source columns are −1 and empty for `scale_rotate`. Norms and delta_norm = ‖Δx‖
are L2 norms; norm_of_median: the larger of the pair's ‖x‖ over the site's median, the largest over sites, which is what
the sink filter looks at; delta_angle is in radians, kl, js, clean_entropy and kl_direct in nats. With a horizon above 1 these
are sums over the positions read (top1_changed: at any of them), and `kl_at_0` … hold each position's KL. Models with
LayerNorm have `norm_read` = ‖x − mean(x)‖ of the target too."""


def null_pair_sets(pair_sets: list[str]) -> list[str]:
    """The pair sets of randomly initialised models: the random pairs, unless they were not asked for."""
    return ["random"] if "random" in pair_sets else pair_sets


class PatchDesign:
    """Which pairs there are at each site, and their vectors: the same whatever order they are asked for in."""

    def __init__(self, clean: CleanActivations, asked: int, pair_sets: list[str]):
        self.clean, self.seed = clean, clean.settings.seed
        drawn = cross_prompt_pairs(clean.length, asked, self.seed)
        keep, dropped = clean.filter.keep(drawn)
        dropped = {reason: n for reason, n in dropped.items() if n}
        if not keep.any():
            raise ResultError(
                f"none of {asked} pairs is left, dropped: {dropped}; give other text or a looser sink filter"
            )
        self.pairs: dict[tuple[Site, str], tuple[Pairs, np.ndarray]] = {}
        numbers, used = np.flatnonzero(keep), {}
        for name in pair_sets:
            used[name] = {}
            for site, x in clean.activations.items():
                if name in ("random", "scale_rotate"):
                    self.pairs[site, name] = drawn.take(keep), numbers
                    used[name][str(site)] = {"asked": asked, "used": len(numbers)}
                else:
                    some, n = matching_pairs(x, clean.usable, clean.length, asked, self.seed, name)
                    self.pairs[site, name] = some, np.arange(len(some))
                    used[name][str(site)] = {"asked": asked, "exist": n, "used": len(some)}
        self.found = {"pair_sets": used, "pairs_dropped": dropped}

    def _chosen(self, site: Site, name: str, among: np.ndarray | None) -> np.ndarray:
        pairs, _ = self.pairs[site, name]
        return among_prompts(pairs.target_prompt, among)

    def count(self, site: Site, among: np.ndarray | None, null: bool = False) -> int:
        """How many `rows` there are; of a randomly initialised model (`null`), about how many."""
        names = [name for s, name in self.pairs if s == site]
        names = null_pair_sets(names) if null else names
        return sum(len(self._chosen(site, name, among)) * len(EDITS[name]) for name in names)

    def rows(self, site: Site, among: np.ndarray | None) -> EditedRows:
        """The rows at a site whose targets are in the prompts `among` (None: all), pair set by pair set, pair by pair."""
        parts = [self._of_set(site, name, among) for s, name in self.pairs if s == site]
        tables, vectors, clean = zip(*((p.table, p.vectors, p.clean) for p in parts), strict=True)
        return EditedRows(pd.concat(tables, ignore_index=True), torch.cat(vectors), torch.cat(clean))

    def _of_set(self, site: Site, name: str, among: np.ndarray | None) -> EditedRows:
        pairs, numbers = self.pairs[site, name]
        chosen = self._chosen(site, name, among)
        noise = self._tangents(site, name, len(pairs), chosen)
        pairs, numbers, n = pairs.take(chosen), numbers[chosen], len(EDITS[name])
        x = self.clean.at(site, pairs.target_prompt, pairs.target_position)
        a = None if name == "scale_rotate" else self.clean.at(site, pairs.source_prompt, pairs.source_position)
        edited = torch.stack([_edit(edit, x, a, *noise) for edit in EDITS[name]], dim=1)
        table = pd.DataFrame(
            {
                "pair_set": name,
                "pair": numbers.repeat(n),
                "edit": list(EDITS[name]) * len(pairs),
                "target_prompt": pairs.target_prompt.repeat(n),
                "target_position": pairs.target_position.repeat(n),
                "source_prompt": -1 if a is None else pairs.source_prompt.repeat(n),
                "source_position": -1 if a is None else pairs.source_position.repeat(n),
                "target_norm": column(norm(x).squeeze(-1), n),
                "source_norm": np.nan if a is None else column(norm(a).squeeze(-1), n),
                "norm_of_median": self.clean.pair_norm_of_median(pairs).repeat(n),
                "cosine": np.nan if a is None else column(cosine(x, a), n),
                **dose_columns(x, edited),
            }
        )
        if self.clean.model.norm_kind == "LayerNorm":
            table["norm_read"] = column(norm_read("LayerNorm", x.float()).squeeze(-1), n)
        return EditedRows(table, edited.flatten(0, 1), x[:, None].expand_as(edited).flatten(0, 1))

    def _tangents(self, site: Site, name: str, n_pairs: int, chosen: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Two Gaussian vectors and one difference of two random tokens' activations for each pair."""
        stream = generator(self.seed, "direction_norm", name, site)
        shape = torch.empty(n_pairs, self.clean.model.d_model)
        isotropic, second = random_like(shape, stream), random_like(shape, stream)
        between = self.clean.between(site, n_pairs, stream, chosen)
        which = torch.from_numpy(chosen)
        return isotropic[which].to(between.device), second[which].to(between.device), between


def _edit(name: str, x: Tensor, a: Tensor | None, isotropic: Tensor, second: Tensor, between: Tensor) -> Tensor:
    if a is None:
        if name == "random_direction":
            return swap_direction(x, isotropic)
        kind, factor = name.rsplit("_", 1)
        if kind == "scale":
            return rescale(x, float(factor))
        return rotate_by_distance(x, second, abs(float(factor) - 1) * norm(x))
    if name == "self":
        return swap_direction(x, x)
    if name == "direction":
        return swap_direction(x, a)
    if name == "norm":
        return swap_norm(x, a)
    if name == "full":
        return replace(x, a)
    if name == "placebo_norm":
        return rotate_by_distance(x, second, (norm(a) - norm(x)).abs())
    return matched_placebo(x, swap_direction(x, a), isotropic if name == "placebo_direction" else between)

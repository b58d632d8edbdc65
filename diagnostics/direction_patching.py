"""Does the model read an activation's direction or its norm? Direction and norm patches between tokens of different prompts.

Source of the patches: arXiv:2606.15054. In-context patching, doses, matched placebos, untrained networks, direct effects and
the statistics are ours.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from diagnostics.depth_plans import DepthPlan
from diagnostics.direction_depth import PLANS
from diagnostics.direction_summary import NOTE, SCALES, first_numbers, short_frame, summaries, summary_frame
from diagnostics.headlines import Headline
from diagnostics.progress import Progressing
from diagnostics.results import Result
from diagnostics.sampling import Pairs, cross_prompt_pairs, generator, matching_pairs
from diagnostics.study import (
    TRAINED,
    Clean,
    Rows,
    Settings,
    among_prompts,
    chosen_contexts,
    chosen_sites,
    column,
    dose_columns,
    run_study,
)
from interventions.edits import (
    cosine,
    matched_placebo,
    norm,
    random_like,
    replace,
    rescale,
    rotate_by_distance,
    swap_direction,
    swap_norm,
)
from interventions.errors import ResultError
from interventions.models import wrap
from interventions.rows import Horizon
from interventions.sites import Site
from interventions.texts import Prompts

PAIR_SETS = ("random", "same_norm", "high_cosine", "scale_rotate")
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


@dataclass(frozen=True)
class DirectionNorm(Result):
    """What patching direction, norm and their placebos did, row by row, and how it was made.

    The table has a line for each model × layer × point × context × pair × edit; its columns are those of `COLUMNS`.
    """

    NAME: ClassVar[str] = "direction_norm"
    TITLE: ClassVar[str] = "Direction and norm"
    QUESTION: ClassVar[str] = "Does the model read an activation's direction or its norm?"
    CALL: ClassVar[str] = "direction_norm"
    NOTE: ClassVar[str] = NOTE
    DEPTH: ClassVar[Mapping[str, DepthPlan]] = PLANS
    NULL_MODELS: ClassVar[bool] = True

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """Statistics of each model × layer × point × context × pair set, with delete-one-prompt jackknife intervals.

        Intervals from fewer than 20 prompts are too narrow; `n_prompts` says how many stand behind each.
        """
        return summaries(self.frame, float(np.log(self.provenance["vocab"])))

    @property
    def defaults(self) -> dict[str, Any]:
        """Random pairs, the model itself, the first site's point."""
        return {"pair_set": "random", "model": TRAINED, "point": self.points[0]}

    def summary(self, pair_set: str = "random") -> pd.DataFrame:
        """One row per model, layer, point and context: mean KL (nats) and dose ‖Δx‖/‖x‖ of the patches, ratios, intervals."""
        return summary_frame([group for group in self.groups if group["pair_set"] == pair_set])

    def headlines(self) -> Iterable[Headline]:
        """In the first context, at the middle block."""
        nulls = [g for label in self.null_models for g in self.select(model=label)]
        return first_numbers(self.select(context=self.provenance["context"][0]), nulls)

    def left_out(self) -> list[str]:
        """What is missing, conditioned pair sets with fewer pairs than asked for too; a line each."""
        few = [
            f"{name} {found['used']} of {found['asked']} at {site}"
            for name, by_site in self.provenance["drawn"][TRAINED]["pair_sets"].items()
            for site, found in by_site.items()
            if "exist" in found and found["used"] < found["asked"]
        ]
        said = [f"fewer pairs than asked: {'; '.join(few)}"] if few else []
        return [*said, *super().left_out()]

    def plot(self, point: str | None = None) -> Any:
        """The figure: KL by depth above, ratios below, of one point (default: the first). Returns a matplotlib Figure."""
        from diagnostics.direction_plots import plot_direction_norm

        point = point or self.points[0]
        nulls = [self.select(model=label, point=point) for label in self.null_models]
        return plot_direction_norm(self.select(point=point), nulls, self.provenance, point)

    def figures(self) -> dict[str, Any]:
        """A figure for each point."""
        if "random" not in self.provenance["pair_sets"]:
            return {}
        return {self.NAME + ("" if i == 0 else f"_{point}"): self.plot(point) for i, point in enumerate(self.points)}

    def tables(self) -> dict[str, pd.DataFrame]:
        """KL, doses and ratios of the random pairs by depth, a table for each point."""
        return {point: self._short(point) for point in self.points}

    def _short(self, point: str) -> pd.DataFrame:
        nulls = {label: self.select(model=label, point=point) for label in self.null_models}
        return short_frame(self.select(point=point), nulls)


COLUMNS = (
    "model", "layer", "point", "context", "pair_set", "pair", "edit", "target_prompt", "target_position", "source_prompt",
    "source_position", "target_norm", "source_norm", "norm_of_median", "cosine", "delta_norm", "delta_angle", "kl", "js",
    "clean_entropy", "top1_changed", "kl_direct",
)  # fmt: skip
"""Of the table. model: `trained`, or `random 0` … for untrained networks. pair: index within its pair set, the same pair
everywhere for `random` and `scale_rotate`; source columns are −1 and empty for `scale_rotate`. Norms and delta_norm = ‖Δx‖
are L2 norms; norm_of_median: the larger of the pair's ‖x‖ over the site's median, the largest over sites, which is what
the sink filter looks at; delta_angle is in radians, kl, js, clean_entropy and kl_direct in nats. With a horizon above 1 these
are sums over the positions read (top1_changed: at any of them), and `kl_at_0` … hold each position's KL. Models with
LayerNorm have `norm_read` = ‖x − mean(x)‖ of the target too."""


@torch.no_grad()
def direction_norm(
    model: Any,
    prompts: Prompts | Sequence[Sequence[int]] | Sequence[str],
    *,
    layers: Sequence[int] | None = None,
    sites: Sequence[Site] | None = None,
    pairs: int = 500,
    context: str = "in_place",
    horizon: Horizon = 1,
    sink_filter: float | None = 10.0,
    seed: int = 0,
    pair_sets: Sequence[str] = PAIR_SETS,
    null_seeds: int = 0,
    batch_rows: int | None = None,
    path: str = "auto",
    folder: str | Path | None = None,
    overwrite: bool = False,
    progress: Progressing = None,
) -> DirectionNorm:
    """Patch direction and norm between tokens of different prompts, beside matched placebos.

        direction  (x_A/‖x_A‖)·‖x_B‖        norm  (x_B/‖x_B‖)·‖x_A‖        effect  KL(clean ‖ intervened) at B, in nats

    model: anything `wrap` takes. prompts: `tokenize`'s, token ids, or texts for the model's tokenizer. layers: block
    indices, patched at resid_post (default six, from first to last), or sites: any. pairs: token pairs of each set, drawn
    once by seeded hash and the same at every depth; a pair with a token at position 0, a special token, a sink (‖x‖ >
    sink_filter·median at any of the sites), a norm of 0 or a non-finite activation is dropped and counted, never redrawn.
    context: `in_place`, `single_token` or `both`. horizon: positions read from B on (see `measure`). null_seeds: untrained
    networks of the same configuration, whose random pairs go through the same. path: see `measure`. folder: where finished
    work units are kept, so that an interrupted call goes on from there (None: in memory); overwrite: replace those of other
    settings. progress: called with (rows done, rows in all).

    Raises `SiteError` for a site that does not exist, `TextError` for prompts that do not serve, `ResultError` when no
    pair is left. Source: arXiv:2606.15054; in context, placebos, doses, nulls and intervals are ours.
    """
    model = wrap(model)
    places = chosen_sites(model, layers, sites)
    if wrong := [x for x in pair_sets if x not in PAIR_SETS]:
        raise ResultError(f"no {wrong[0]!r}; known: {', '.join(PAIR_SETS)}")
    if not pair_sets:
        raise ResultError(f"no pair set; give at least one of {', '.join(PAIR_SETS)}")
    if pairs < 1:
        raise ResultError(f"{pairs} pairs asked for; ask for at least one")
    settings = Settings(
        sites=places,
        contexts=chosen_contexts(context),
        horizon=horizon,
        sink_filter=sink_filter,
        seed=seed,
        null_seeds=null_seeds,
        batch_rows=batch_rows,
        path=path,
    )
    study = run_study(
        DirectionNorm.NAME,
        model,
        prompts,
        lambda clean: _Design(clean, pairs, list(pair_sets) if clean.model is model else _null_sets(list(pair_sets))),
        settings,
        {"pairs_asked": pairs, "pair_sets": list(pair_sets)},
        {"pair_set": PAIR_SETS, "pair": (), "edit": list(dict.fromkeys(e for edits in EDITS.values() for e in edits))},
        folder=folder,
        overwrite=overwrite,
        progress=progress,
    )
    return DirectionNorm(study.frame, study.tokens, study.provenance)


def _null_sets(pair_sets: list[str]) -> list[str]:
    """What untrained networks go through: the random pairs, unless others alone were asked for."""
    return ["random"] if "random" in pair_sets else pair_sets


class _Design:
    """Which pairs there are at each site, and their vectors: the same whatever order they are asked for in."""

    def __init__(self, clean: Clean, asked: int, pair_sets: list[str]):
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
        """How many `rows` there are, or, about, for an untrained network."""
        names = [name for s, name in self.pairs if s == site]
        names = _null_sets(names) if null else names
        return sum(len(self._chosen(site, name, among)) * len(EDITS[name]) for name in names)

    def rows(self, site: Site, among: np.ndarray | None) -> Rows:
        """The rows at a site whose targets are in the prompts `among` (None: all), pair set by pair set, pair by pair."""
        parts = [self._of_set(site, name, among) for s, name in self.pairs if s == site]
        tables, vectors, clean = zip(*((p.table, p.vectors, p.clean) for p in parts), strict=True)
        return Rows(pd.concat(tables, ignore_index=True), torch.cat(vectors), torch.cat(clean))

    def _of_set(self, site: Site, name: str, among: np.ndarray | None) -> Rows:
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
            wide = x.float()
            table["norm_read"] = column((wide - wide.mean(-1, keepdim=True)).norm(dim=-1), n)
        return Rows(table, edited.flatten(0, 1), x[:, None].expand_as(edited).flatten(0, 1))

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

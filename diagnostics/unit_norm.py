"""What if tokens lost their norm? Activations forced to norm 1 after one block, alone or all together, by depth."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch

from diagnostics import statistics
from diagnostics.depth_plans import DepthPlan
from diagnostics.headlines import Group, Headline, middle, null_range
from diagnostics.progress import Progressing
from diagnostics.results import Result
from diagnostics.sampling import generator, hash_keys
from diagnostics.study import (
    TRAINED,
    Clean,
    Rows,
    Settings,
    Whole,
    among_prompts,
    column,
    dose_columns,
    run_study,
)
from diagnostics.unit_norm_depth import PLANS
from interventions.edits import norm, random_like, rescale, rotate_by_distance, swap_direction
from interventions.errors import ResultError
from interventions.models import wrap
from interventions.sites import Site
from interventions.texts import Prompts

ALONE = ("self", "unit_norm", "rotation")
"""Edits of one token: `self` (the noise floor); `unit_norm` x/‖x‖; `rotation`: x turned along a random tangent by the same distance."""
TOGETHER = ("unit_norm_everywhere", "rotation_everywhere")
"""The same for all tokens of the prompt at once, the first one too; read at the token."""


@dataclass(frozen=True)
class UnitNorm(Result):
    """What forcing norm 1 did, token by token, and how it was made.

    The table has a line for each model × layer × token × edit.
    """

    NAME: ClassVar[str] = "unit_norm"
    TITLE: ClassVar[str] = "Unit norm"
    QUESTION: ClassVar[str] = "What is lost when activations keep their direction and all have norm 1?"
    CALL: ClassVar[str] = "unit_norm_sweep"
    DEPTH: ClassVar[Mapping[str, DepthPlan]] = PLANS
    NULL_MODELS: ClassVar[bool] = True
    NOTE: ClassVar[str] = (
        "Mean KL in nats, 95 % jackknife intervals; rotation: by the same distance, norm kept; everywhere: all tokens at once."
    )

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """Mean KL (nats) of each model × layer × edit, and of unit_norm over rotation, with jackknife intervals."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few prompts: n_prompts stands beside each interval
            return [_group(key, rows) for key, rows in self.frame.groupby(["model", "layer"], sort=False)]

    @property
    def defaults(self) -> dict[str, Any]:
        """The model itself."""
        return {"model": TRAINED}

    def headlines(self) -> Iterable[Headline]:
        """At the middle block, beside untrained networks."""
        nulls = [g for label in self.null_models for g in self.select(model=label)]
        return _first_numbers(self.select(), nulls)

    def plot(self) -> Any:
        """KL by depth. Returns a matplotlib Figure."""
        from diagnostics.unit_norm_plots import plot_unit_norm

        nulls = [self.select(model=label) for label in self.provenance["null_models"]]
        return plot_unit_norm(self.select(), nulls, self.provenance)


def _first_numbers(groups: Sequence[Group], nulls: Sequence[Group]) -> Iterator[Headline]:
    for g in middle(groups):
        for name in (name for name in g if " ÷ " in name):
            known = null_range([n[name] for n in nulls if n["layer"] == g["layer"]])
            against = f"1: no more than turning as far; {known}".strip("; ")
            yield Headline(f"KL of {name.replace('_', ' ')}, block {g['layer']}", str(g[name]), against)


def _group(key: Any, rows: pd.DataFrame) -> dict[str, Any]:
    floor = statistics.noise_floor(rows.kl[rows.edit == "self"].to_numpy(float))
    kl = rows.pivot(index="token", columns="edit", values="kl").astype(float)
    own = rows.drop_duplicates("token").set_index("token").loc[kl.index, "target_prompt"].to_numpy(int)
    group: dict[str, Any] = {"model": key[0], "layer": int(key[1]), "n_tokens": len(kl), "noise_floor": floor}
    group["mean_dose"] = float((rows.delta_norm / rows.target_norm)[rows.edit == "unit_norm"].mean())
    for edit in (*ALONE[1:], *TOGETHER):
        there = kl.get(edit, pd.Series(np.nan, kl.index)).notna().to_numpy()
        values = kl[edit].to_numpy()[there] if there.any() else np.zeros(0)
        group[edit] = statistics.mean(values, own[there], transform="log" if values.sum() > 0 else None)
    for one, other in (ALONE[1:], TOGETHER):
        both = kl.reindex(columns=[one, other]).notna().all(axis=1).to_numpy()
        a, b = kl.reindex(columns=[one, other]).to_numpy()[both].T
        group[f"{one} ÷ {other}"] = statistics.ratio_of_means(a, b, floor, own[both])
    return group


@torch.no_grad()
def unit_norm_sweep(
    model: Any,
    prompts: Prompts | Sequence[Sequence[int]] | Sequence[str],
    *,
    layers: Sequence[int] | None = None,
    tokens: int = 500,
    sink_filter: float | None = 10.0,
    seed: int = 0,
    null_seeds: int = 0,
    batch_rows: int | None = None,
    path: str = "auto",
    folder: str | Path | None = None,
    overwrite: bool = False,
    progress: Progressing = None,
) -> UnitNorm:
    """Force activations to norm 1 at `resid_post` of some blocks: each token alone, and all tokens of its prompt at once.

        unit_norm  x/‖x‖        rotation  x turned by the same distance |‖x‖ − 1|, its norm kept

    layers: block indices (default: all). tokens: where the effect is read, in place, the same at every depth; other
    arguments as in `direction_norm`. Source: arXiv:2606.15054; the rotation that moves x as far, tokens alone, untrained
    networks and intervals are ours.
    """
    model = wrap(model)
    if tokens < 1:
        raise ResultError(f"{tokens} tokens asked for; ask for at least one")
    sites = tuple(Site(layer) for layer in dict.fromkeys(range(model.n_layers) if layers is None else layers))
    settings = Settings(
        sites=sites, sink_filter=sink_filter, seed=seed, null_seeds=null_seeds, batch_rows=batch_rows, path=path
    )
    study = run_study(
        UnitNorm.NAME,
        model,
        prompts,
        lambda clean: _Design(clean, tokens),
        settings,
        {"tokens_asked": tokens},
        {"token": (), "edit": (*ALONE, *TOGETHER)},
        folder=folder,
        overwrite=overwrite,
        progress=progress,
    )
    return UnitNorm(study.frame, study.tokens, study.provenance)


class _Design:
    """Tokens, drawn once; filters drop them, and are counted."""

    def __init__(self, clean: Clean, asked: int):
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

    def rows(self, site: Site, among: np.ndarray | None) -> Rows:
        """The rows at a site whose tokens are in the prompts `among` (None: all), token by token; then those edited together."""
        chosen = self._chosen(among)
        prompt, position = self.prompt[chosen], self.position[chosen]
        x = self.clean.at(site, prompt, position)
        stream = generator(self.clean.settings.seed, "unit_norm", site)
        drawn = random_like(torch.empty(len(self.token), x.shape[1]), stream)[torch.from_numpy(chosen)]
        edited = torch.stack([self._edit(name, x, drawn.to(x.device)) for name in ALONE], dim=1)
        table = self._lines(chosen, list(ALONE), x) | dose_columns(x, edited)
        flat = edited.flatten(0, 1), x[:, None].expand_as(edited).flatten(0, 1)
        return Rows(pd.DataFrame(table), *flat, whole=self._together(site, chosen, x) if len(chosen) else None)

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

    def _together(self, site: Site, chosen: np.ndarray, x: torch.Tensor) -> Whole:
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
        return Whole(pd.DataFrame(table), run, np.tile(some, 2), vectors.flatten(0, 1))

    def _edit(self, name: str, x: torch.Tensor, towards: torch.Tensor) -> torch.Tensor:
        if name == "self":
            return swap_direction(x, x)
        if name == "unit_norm":
            return rescale(x, 1 / norm(x))
        return rotate_by_distance(x, towards, (norm(x) - 1).abs())

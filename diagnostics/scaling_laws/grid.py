"""The grid of SAEs: every width with every k, and ablations of the recipe at some cells, to be trained on one stream."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from interventions.errors import MechdiagError
from interventions.sites import Site
from sae_models.architectures import named
from sae_models.training.from_model import SAESpec
from sae_models.training.trainer import Recipe

BASE = "base"
ABLATIONS: Mapping[str, Mapping[str, float]] = {"no AuxK": {"aux": 0.0}, "Multi-TopK": {"multi": 1 / 8}}
"""What each ablation changes in the recipe; both from arXiv:2406.04093."""


def specifications(
    site: Site,
    widths: Sequence[int],
    ks: Sequence[int],
    *,
    recipe: Recipe,
    cells: Sequence[tuple[int, int]] = (),
    seeds: Sequence[int] = (0, 1, 2),
) -> dict[str, SAESpec]:
    """TopK SAEs by folder: every width and k with the first seed; at each of `cells` (width, k) every seed of the base and of each ablation.

    Raises `MechdiagError` for a cell outside the grid and an empty or repeated list.
    """
    for what, given in {"widths": widths, "ks": ks, "cells": cells, "seeds": seeds}.items():
        if len(set(given)) < len(given) or (what != "cells" and not given):
            raise MechdiagError(f"{what} {list(given)}; expected at least one, each once")
    if odd := [cell for cell in cells if cell[0] not in widths or cell[1] not in ks]:
        raise MechdiagError(f"no cell {odd[0]} in a grid of widths {list(widths)} and k {list(ks)}; name a cell of it")
    asked = [(d_sae, k, BASE, seeds[0]) for d_sae in widths for k in ks]
    asked += [(*cell, BASE, seed) for cell in cells for seed in seeds[1:]]
    asked += [(*cell, name, seed) for cell in cells for name in ABLATIONS for seed in seeds]
    return {
        _folder(site, *one): SAESpec(
            site, named("standard:topk"), replace(recipe, d_sae=d_sae, k=k, seed=seed, **ABLATIONS.get(name, {}))
        )
        for one in asked
        for d_sae, k, name, seed in (one,)
    }


def _folder(site: Site, d_sae: int, k: int, condition: str, seed: int) -> str:
    """`15/standard-topk-d1152-k32`, `15/standard-topk-no-auxk-d1152-k32-seed1`."""
    where = str(site.layer) if site.point == "resid_post" else str(site)
    what = "" if condition == BASE else "-" + re.sub(r"\W+", "-", condition.lower())
    return f"{where}/standard-topk{what}-d{d_sae}-k{k}" + (f"-seed{seed}" if seed else "")

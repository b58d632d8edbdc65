"""`unit_norm_sweep`: activations are forced to norm 1 after one block, alone or all together, by depth."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diagnostics.results.calls import recorded
from diagnostics.running.clean import RunSettings
from diagnostics.running.single_edits import run_single_edits
from diagnostics.unit_norm.design import ALONE, TOGETHER, UnitNormDesign
from diagnostics.unit_norm.result import UnitNorm
from interventions.errors import ResultError
from interventions.models.wrapping import wrap
from interventions.progress import Progressing
from interventions.sites import Site, several
from interventions.texts.prompts import Prompts


@recorded
@torch.no_grad()
def unit_norm_sweep(
    model: Any,
    prompts: Prompts | Sequence[Sequence[int]] | Sequence[str],
    *,
    layers: int | Sequence[int] | None = None,
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
    arguments as in `direction_norm`. Source: arXiv:2606.15054; the rotation that moves x as far, tokens alone, randomly
    initialised models and intervals are ours.
    """
    model = wrap(model)
    if tokens < 1:
        raise ResultError(f"{tokens} tokens asked for; ask for at least one")
    sites = tuple(Site(layer) for layer in dict.fromkeys(range(model.n_layers) if layers is None else several(layers)))
    settings = RunSettings(
        sites=sites, sink_filter=sink_filter, seed=seed, null_seeds=null_seeds, batch_rows=batch_rows, path=path
    )
    return run_single_edits(
        UnitNorm, model, prompts, lambda clean: UnitNormDesign(clean, tokens), settings, {"tokens_asked": tokens},
        {"token": (), "edit": (*ALONE, *TOGETHER)},
        folder=folder, overwrite=overwrite, progress=progress,
    )  # fmt: skip

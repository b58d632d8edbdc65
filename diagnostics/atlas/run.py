"""`causal_atlas`: every (token, active latent) of a text is ablated once, exactly.

The table holds KL and direct KL beside activation, size, angle and gradient attributions. It is a data set on which others can score
methods of their own; `COLUMNS` of `work` is its schema.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diagnostics.atlas.result import CausalAtlas
from diagnostics.atlas.work import METRICS, AtlasRunner, merged
from diagnostics.results.calls import recorded
from diagnostics.running.clean import RunSettings
from diagnostics.running.provenance import run_identity, run_provenance
from diagnostics.running.units import run_units
from diagnostics.statistics.tables import of_saes
from interventions.errors import ResultError
from interventions.models.wrapping import wrap
from interventions.progress import Progressing
from interventions.texts.prompts import Prompts, prompts_for
from sae_models.dictionaries import dictionaries_of


@recorded
@torch.no_grad()
def causal_atlas(
    model: Any,
    prompts: Prompts | Sequence[Sequence[int]] | Sequence[str],
    saes: Any,
    *,
    sink_filter: float | None = 10.0,
    path_share: float = 0.1,
    steps: int = 6,
    samples: int = 4,
    placebo_share: float = 0.05,
    seed: int = 0,
    batch_rows: int | None = None,
    path: str = "auto",
    folder: str | Path | None = None,
    overwrite: bool = False,
    progress: Progressing = None,
) -> CausalAtlas:
    """Subtract z_i·d_i, the SAE's error kept, for every active latent at every usable token, and measure what the model does.

    saes: an SAE (anything that `as_sae` takes), or several by name, each at the site it belongs to; latents of either sign. Unusable
    tokens (position 0, special tokens, sinks: ‖x‖ > sink_filter × the site's median) are left out and counted.
    path_share: share of the tokens, drawn by hash, that also get `integrated` (steps points), `fisher` (samples next tokens), and, for
    each active latent, `second_order` and `fisher_n`, which cost 2.4 times the ablation; placebo_share: share of the rows that get a matched
    placebo, along the difference of two other tokens' activations. Where replay is not exact, gradients are nan, and effects and second
    order come from full forward passes. Work is cut into units of eight prompts × SAE, kept in `folder` as they are done.

    Raises `BelongingError` for an SAE of another model, width or site, `ResultError` for invalid settings.
    """
    model = wrap(model)
    prompts = prompts_for(model, prompts)
    if not 0 <= path_share <= 1 or not 0 <= placebo_share <= 1 or steps < 1 or samples < 1:
        raise ResultError(
            f"path_share {path_share}, placebo_share {placebo_share}, steps {steps}, samples {samples}; expected shares from 0 to "
            "1, and at least one of the others"
        )
    dictionaries = dictionaries_of(saes, model, None)
    if plain := [d.name for d in dictionaries if d.sae is None]:
        raise ResultError(f"{plain[0]!r} are directions; an atlas needs SAEs, which say where latents are active")
    settings = RunSettings(
        sites=tuple(dict.fromkeys(d.site for d in dictionaries)),
        sink_filter=sink_filter, seed=seed, batch_rows=batch_rows, path=path, metrics=METRICS,
    )  # fmt: skip
    settings.check(model)
    own = {
        "saes": {d.name: d.provenance() for d in dictionaries},
        "sink_filter": sink_filter,
        "path_share": path_share,
        "steps": steps,
        "samples": samples,
        "placebo_share": placebo_share,
        "seed": seed,
        "batch_rows": batch_rows,
        "asked_path": path,
    }
    runner = AtlasRunner(model, prompts, dictionaries, settings, own)
    identity = run_identity(CausalAtlas.NAME, model, prompts, own | {"sites": [str(site) for site in settings.sites]})
    done = run_units(runner.units(), folder, runner, identity=identity, overwrite=overwrite, progress=progress)
    frame = of_saes([unit.frame for unit in done], [d.name for d in dictionaries])
    said = own | {"rows": len(frame)} | merged(done, dictionaries)
    return CausalAtlas(frame, prompts.tokens, run_provenance(CausalAtlas.NAME, model, prompts, settings.sites, said))

"""`dictionary_effects`: every latent of whole SAEs removed at tokens drawn for it, each removal beside its matched placebo."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from diagnostics.results.calls import recorded
from diagnostics.running.clean import RunSettings
from diagnostics.running.place import placed_at
from diagnostics.running.provenance import hashed, run_identity, run_provenance
from diagnostics.running.units import Units
from diagnostics.whole_dictionary.columns import LATENTS
from diagnostics.whole_dictionary.result import DictionaryEffects, whole_table
from diagnostics.whole_dictionary.scan import kept, scanned
from diagnostics.whole_dictionary.tokens import mean_coefficients, named_tokens
from diagnostics.whole_dictionary.verdicts import latent_statistics
from diagnostics.whole_dictionary.work import METRICS, EffectsRunner, merged
from interventions.errors import ResultError
from interventions.models.wrapping import wrap
from interventions.progress import Progressing
from interventions.recording import record
from interventions.texts.prompts import Prompts, prompts_for
from sae_models.dictionaries import dictionaries_of


@recorded
@torch.no_grad()
def dictionary_effects(
    model: Any,
    prompts: Prompts | Sequence[Sequence[int]] | Sequence[str],
    saes: Any,
    *,
    tokens_per_latent: int = 100,
    scan_tokens: int | None = 300_000,
    sink_filter: float | None = 10.0,
    seed: int = 0,
    batch_rows: int | None = None,
    path: str = "auto",
    folder: str | Path | None = None,
    overwrite: bool = False,
    progress: Progressing = None,
) -> DictionaryEffects:
    """Subtract z_i·d_i, the SAE's error kept, for every latent of whole SAEs at up to `tokens_per_latent` tokens, beside its placebo.

    saes: an SAE (anything that `as_sae` takes), or several by name, each at the site it belongs to; all are read in one pass over the
    first prompts that hold `scan_tokens` tokens (None: all), which ends with the deepest site. Unusable tokens (position 0, special
    tokens, sinks: ‖x‖ > sink_filter × the site's median) are left out and counted. Of a latent's active tokens as many come from each
    quarter of its |z|, and a prompt's second token only where first ones do not suffice. Rows and verdicts: `columns`, `verdicts`.
    In `folder` the scan is kept, made once whatever the number of workers or parts, and the rows of 64 prompts × SAE as they are done.

    Raises `BelongingError` for an SAE of another model, width or site, `ResultError` for invalid settings, where no latent is
    active at a usable token, and where no effect is finite.
    """
    model = wrap(model)
    prompts = first_tokens(prompts_for(model, prompts), scan_tokens)
    if tokens_per_latent < 1:
        raise ResultError(f"{tokens_per_latent} tokens a latent; expected 1 or more")
    dictionaries = dictionaries_of(saes, model, None)
    if plain := [d.name for d in dictionaries if d.sae is None]:
        raise ResultError(f"{plain[0]!r} are directions; this needs SAEs, which say where latents are active")
    settings = RunSettings(
        sites=tuple(dict.fromkeys(d.site for d in dictionaries)),
        sink_filter=sink_filter, seed=seed, batch_rows=batch_rows, path=path, metrics=METRICS,
    )  # fmt: skip
    settings.check(model)
    own = {
        "saes": {d.name: d.provenance() for d in dictionaries},
        "tokens_per_latent": tokens_per_latent,
        "sink_filter": sink_filter,
        "seed": seed,
        "batch_rows": batch_rows,
        "asked_path": path,
    }
    identity = run_identity(
        DictionaryEffects.NAME, model, prompts, own | {"sites": [str(site) for site in settings.sites]}
    )
    how = {"sink_filter": sink_filter, "tokens_per_latent": tokens_per_latent, "seed": seed}
    with Units(folder, identity, overwrite) as claimed, placed_at(claimed.place):
        work = None if claimed.folder is None else claimed.folder / "units"
        scans = kept(work, hashed(claimed.identity)[:16], lambda: scanned(model, prompts, dictionaries, **how))
        if not any(len(scan.prompt) for scan in scans.values()):
            left = {name: scan.left_out for name, scan in scans.items()}
            raise ResultError(
                f"no latent is active at a usable token; left out: {left}; give more text, or another SAE"
            )
        runner = EffectsRunner(model, prompts, dictionaries, scans, settings)
        done = claimed.run(runner.units(), runner, progress)
    frame = whole_table([unit.frame for unit in done], [d.name for d in dictionaries])
    notes = merged(done, dictionaries, scans)
    if frame.empty:
        dropped = sum(of["rows_not_finite"] for of in notes["dictionary"].values())
        raise ResultError(
            f"none of {dropped:,} rows has a finite effect; look at the model's logits, or load it in another dtype"
        )
    clean, tables = record(model, prompts.tokens[:1]), []
    for d in dictionaries:
        rows = frame.loc[(frame.sae == d.name).to_numpy()]
        floor = notes["dictionary"][d.name]["noise_floor"] or 0.0
        table = latent_statistics(rows, scans[d.name], floor, tokens_per_latent)
        table = table.assign(sae=d.name, layer=d.site.layer, point=d.site.point)
        tokens = named_tokens(clean, d.directions, mean_coefficients(rows, len(d)))
        tables.append(pd.concat([table, tokens], axis=1)[list(LATENTS)])
    said = own | {"rows": len(frame)} | notes
    provenance = run_provenance(DictionaryEffects.NAME, model, prompts, settings.sites, said)
    return DictionaryEffects(frame, prompts.tokens, provenance, pd.concat(tables, ignore_index=True))


def first_tokens(prompts: Prompts, most: int | None) -> Prompts:
    """The first prompts that hold no more than so many tokens in all. Raises `ResultError` where the first holds more."""
    ends = np.cumsum([len(tokens) for tokens in prompts.tokens])
    if most is None or ends[-1] <= most:
        return prompts
    n = int(np.searchsorted(ends, most, side="right"))
    if not n:
        raise ResultError(f"{most} tokens to scan, but the first prompt has {ends[0]}; expected as many or more")
    tokens = prompts.tokens[:n]
    about = prompts.provenance | {"tokens_sha256": hashed(tokens), "prompts_beyond_scan": len(prompts.tokens) - n}
    return replace(prompts, tokens=tokens, special=prompts.special[:n], texts=prompts.texts[:n], provenance=about)

"""`direction_norm`: direction and norm patches between tokens of different prompts.

Source of the patches: arXiv:2606.15054. In-context patching, doses, matched placebos, randomly initialised models, direct effects
and the statistics are ours.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diagnostics.direction_vs_norm.choices import PAIR_SETS
from diagnostics.direction_vs_norm.design import EDITS, PatchDesign, null_pair_sets
from diagnostics.direction_vs_norm.result import DirectionNorm
from diagnostics.results.calls import recorded
from diagnostics.running.clean import CleanActivations, RunSettings, chosen_contexts, chosen_sites
from diagnostics.running.single_edits import run_single_edits
from interventions.errors import ResultError
from interventions.models.wrapping import wrap
from interventions.progress import Progressing
from interventions.replaying.rows import Horizon
from interventions.sites import SiteLike, several
from interventions.texts.prompts import Prompts


@recorded
@torch.no_grad()
def direction_norm(
    model: Any,
    prompts: Prompts | Sequence[Sequence[int]] | Sequence[str],
    *,
    layers: int | Sequence[int] | None = None,
    sites: SiteLike | Sequence[SiteLike] | None = None,
    pairs: int = 500,
    context: str = "in_place",
    horizon: Horizon = 1,
    sink_filter: float | None = 10.0,
    seed: int = 0,
    pair_sets: str | Sequence[str] = PAIR_SETS,
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
    context: `in_place`, `single_token` or `both`. horizon: positions read from B on (see `measure`). null_seeds: randomly
    initialised models of the same configuration, whose random pairs go through the same. path: see `measure`. folder: where finished
    work units are kept, so that an interrupted call goes on from there (None: in memory); overwrite: replace those of other
    settings. progress: called with (rows done, rows in all).

    Raises `SiteError` for a site that does not exist, `TextError` for invalid prompts, `ResultError` when no
    pair is left. Source: arXiv:2606.15054; in context, placebos, doses, nulls and intervals are ours.
    """
    model = wrap(model)
    places, pair_sets = chosen_sites(model, layers, sites), several(pair_sets)
    if wrong := [x for x in pair_sets if x not in PAIR_SETS]:
        raise ResultError(f"no pair set {wrong[0]!r}; known: {', '.join(PAIR_SETS)}")
    if not pair_sets:
        raise ResultError(f"no pair set; give at least one of {', '.join(PAIR_SETS)}")
    if pairs < 1:
        raise ResultError(f"{pairs} pairs asked for; ask for at least one")
    settings = RunSettings(
        sites=places, contexts=chosen_contexts(context), horizon=horizon, sink_filter=sink_filter, seed=seed, null_seeds=null_seeds,
        batch_rows=batch_rows, path=path,
    )  # fmt: skip

    def design(clean: CleanActivations) -> PatchDesign:
        return PatchDesign(clean, pairs, list(pair_sets) if clean.model is model else null_pair_sets(list(pair_sets)))

    order = {
        "pair_set": PAIR_SETS,
        "pair": (),
        "edit": list(dict.fromkeys(e for edits in EDITS.values() for e in edits)),
    }
    return run_single_edits(
        DirectionNorm, model, prompts, design, settings, {"pairs_asked": pairs, "pair_sets": list(pair_sets)}, order,
        folder=folder, overwrite=overwrite, progress=progress,
    )  # fmt: skip

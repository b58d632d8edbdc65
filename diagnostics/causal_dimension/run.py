"""`causal_dimensionality`: how many directions of an activation does the model above the site read?"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diagnostics.causal_dimension.result import CausalDimension
from diagnostics.causal_dimension.work import DimensionRunner, joined, split
from diagnostics.results.calls import recorded
from diagnostics.running.clean import RunSettings, chosen_sites
from diagnostics.running.provenance import run_identity, run_provenance
from diagnostics.running.units import run_table
from interventions.errors import ResultError
from interventions.models.wrapping import wrap
from interventions.progress import Progressing
from interventions.sites import POINTS, SiteLike, several
from interventions.texts.prompts import Prompts, prompts_for
from sae_models.dictionaries import dictionaries_of

SPANS = (16, 64, 256)
"""Numbers of decoder rows, where none are given: of these, those below d_model."""


@recorded
@torch.no_grad()
def causal_dimensionality(
    model: Any,
    prompts: Prompts | Sequence[Sequence[int]] | Sequence[str],
    *,
    layers: int | Sequence[int] | None = None,
    sites: SiteLike | Sequence[SiteLike] | None = None,
    tokens: int = 60,
    directions: int | None = None,
    saes: Any = None,
    spans: int | Sequence[int] | None = None,
    sink_filter: float | None = 10.0,
    seed: int = 0,
    null_seeds: int = 0,
    batch_rows: int | None = None,
    path: str = "auto",
    folder: str | Path | None = None,
    overwrite: bool = False,
    progress: Progressing = None,
) -> CausalDimension:
    """The effective rank κ of G = E[JᵀMJ], by depth: J the Jacobian of the next-token log-probabilities in the activation.

        κ = exp(−Σ q log q),   q = λ / Σ λ the normalised eigenvalues of G,   E over tokens, J at the token's own position

    M: `fisher`, diag(p) − ppᵀ, so that ½ ΔᵀGΔ is the mean KL (nats) of a small change Δ; `logits`, the vocabulary-centred logits
    without weights. Beside κ: participation ratio, directions for 50, 80 and 90 % of the trace. Controls: randomly initialised
    models (null_seeds), the same tokens' matrices each turned by a random rotation of its own, the covariance of the activations.

    layers or sites: `resid_post` of these blocks (default: six), or any sites of width d_model. tokens: drawn once, the same at every
    site; each costs d_model rows of `second_order`. directions: None, all; a number: a random subspace of so many, for wide models (no
    rotated control then; see `spectra` for what a sketch estimates). saes: SAEs at these sites: what share of the trace lies in spans
    of so many decoder rows (spans; default 16, 64, 256). Other arguments as in `direction_norm`.
    Raises `SiteError` for sites that the model lacks, `ResultError` for other settings and where no token is left, what
    `dictionaries_of` raises. Source: question and κ of arXiv:2605.08740 (our reconstruction); metrics, controls and intervals are ours.
    """
    model = wrap(model)
    prompts = prompts_for(model, prompts)
    chosen = chosen_sites(model, layers, sites)
    if inside := [str(site) for site in chosen if site.point not in POINTS]:
        raise ResultError(f"site {inside[0]} lies inside a block; expected one of {', '.join(POINTS)}")
    if tokens < 2:
        raise ResultError(f"{tokens} tokens asked for; ask for 2 or more")
    if directions is not None and not 2 <= directions <= model.d_model:
        raise ResultError(f"{directions} directions; expected 2 to d_model = {model.d_model}, or None for all")
    counts = sorted(set(several(spans))) if spans else [k for k in SPANS if k < model.d_model]
    if any(k < 1 or k > model.d_model for k in counts):
        raise ResultError(f"spans {counts}; expected numbers of decoder rows from 1 to d_model = {model.d_model}")
    dictionaries = [] if saes is None else dictionaries_of(saes, model, None)
    if dictionaries and directions is not None:
        raise ResultError("shares of the trace need every direction; leave out saes, or directions")
    if elsewhere := [d for d in dictionaries if d.site not in chosen or d.sae is None]:
        raise ResultError(
            f"{elsewhere[0].name} is at {elsewhere[0].site}; expected SAEs at {', '.join(map(str, chosen))}, or that site in layers"
        )
    settings = RunSettings(
        sites=chosen, sink_filter=sink_filter, seed=seed, null_seeds=null_seeds, batch_rows=batch_rows, path=path
    )
    settings.check(model)
    own = {"tokens_asked": tokens, "directions": directions, "spans": counts}
    described = {"saes": {d.name: d.provenance() for d in dictionaries}}
    runner = DimensionRunner(model, prompts, settings, tokens, directions, dictionaries, counts)
    frame, notes = run_table(
        runner.units(), folder, runner, joined,
        identity=run_identity(CausalDimension.NAME, model, prompts, {"settings": own | settings.identity()} | described),
        overwrite=overwrite, progress=progress,
    )  # fmt: skip
    tables = split(frame)
    said = {
        "context": ["in_place"], "horizon": 1, "sink_filter": sink_filter, "seed": seed, "d_model": model.d_model, **described, **own,
        "rows": len(tables["dimensions"]), **notes,
    }  # fmt: skip
    provenance = run_provenance(CausalDimension.NAME, model, prompts, chosen, said, runner.labels[1:])
    return CausalDimension(tables["dimensions"], prompts.tokens, provenance, tables["spectrum"], tables["spans"])

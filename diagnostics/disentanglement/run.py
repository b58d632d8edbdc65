"""`disentangle`: one attribute of an entity exchanged through a few latents, and whether the others stay."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from diagnostics.disentanglement.choices import KS
from diagnostics.disentanglement.facts import Facts, known_facts, load_facts
from diagnostics.disentanglement.result import Disentanglement
from diagnostics.disentanglement.work import DisentanglementRunner, Settings, merged
from diagnostics.results.calls import recorded
from diagnostics.running.provenance import run_identity, run_provenance
from diagnostics.running.units import run_table
from interventions.errors import ResultError
from interventions.models.anatomy import check_site
from interventions.models.wrapping import wrap
from interventions.progress import Progressing
from interventions.sites import POINTS, SiteLike, several
from sae_models.dictionaries import dictionaries_of

MIN_KNOWN = 4
"""entities, so that each half has a pair"""


@recorded
@torch.no_grad()
def disentangle(
    model: Any,
    saes: Any,
    facts: Facts | str | Path | None = None,
    questions: str | Path | None = None,
    *,
    site: SiteLike | None = None,
    ks: int | Sequence[int] = KS,
    pairs: int = 40,
    learn: int = 0,
    seed: int = 0,
    batch_rows: int | None = None,
    path: str = "auto",
    folder: str | Path | None = None,
    overwrite: bool = False,
    progress: Progressing = None,
) -> Disentanglement:
    """Exchange k latents between two entities at the entity's last token: does the target attribute change, and nothing else?

        x_base + Σ_S (z_i(x_source) − z_i(x_base)) d_i        S: k latents chosen for the target on other entities
                                                              (the SAE's error stays)
        cause      share of pairs whose most likely token becomes the source's value of the target
        isolation  share of the other attributes whose most likely token stays the base's value
        score      (cause + isolation)/2;   nothing exchanged: ½, all exchanged: about ½

    saes: one or several by name, each at the site it belongs to (`site`: where it must). facts, questions: CSV files as `load_facts`
    takes them, or `Facts` (default: packaged, countries). Only entities of which the model knows every attribute in a context count
    (`known_facts`), and only pairs that differ in every attribute. The entities are halved; what is chosen on one half is measured on
    `pairs` pairs of the other, in turn. Chosen: the k largest by credit for the target's logit difference less that for the others'
    (`attributed`, `ordered`; gradients half way between base and source). Beside them, at the same k: random latents that differ
    between the two, scaled to the same ‖Δx‖; principal components of the activations, chosen in the same way; the subspace that the target's gradients
    read (`read_subspace`); all latents; and x itself. learn: steps of gradient descent for two learned exchanges, the published ones: a mask of latents
    (`learned_mask`) and a subspace (`learned_subspace`); 0: none. folder: where finished units are kept.

    Source: RAVEL, arXiv:2402.17700, and its form in SAEBench, arXiv:2503.09532. There the mask is learned on
    thousands of pairs, the error is dropped, and entities may share values of other attributes, which then cannot change; facts, questions,
    choice by credit, controls and intervals are ours.
    Raises `TextError` for facts and questions that cannot be read, `ResultError` for other settings and where too little is known,
    `BelongingError`, `SiteError` for an SAE of another width, model or site.
    """
    model = wrap(model)
    ks = tuple(sorted(set(several(ks))))
    if not ks or ks[0] < 1 or pairs < 1 or learn < 0:
        raise ResultError(f"ks {list(ks)}, {pairs} pairs, {learn} steps; expected numbers of 1 or more (0 steps: none)")
    dictionaries = dictionaries_of(saes, model, site)
    if plain := [d.name for d in dictionaries if d.sae is None]:
        raise ResultError(f"{plain[0]!r} is a set of directions; latents of an SAE are exchanged here")
    for d in dictionaries:
        if d.site.point not in POINTS:
            raise ResultError(f"{d.name} is at {d.site}, inside a block; expected one of {', '.join(POINTS)}")
        check_site(model, d.site)
    facts = facts if isinstance(facts, Facts) else load_facts(facts, questions)
    known = known_facts(model, facts)
    if (n := len(set(known.entity.tolist()))) < MIN_KNOWN:
        raise ResultError(
            f"the model knows every attribute of {n} entities; expected {MIN_KNOWN} or more: {known.count['known']}"
        )
    settings = Settings(ks, pairs, learn, seed, path, batch_rows)
    runner = DisentanglementRunner(model, known, dictionaries, settings)
    own = {"ks": list(ks), "pairs_asked": pairs, "learn": learn, "seed": seed}
    described = {"saes": {d.name: d.provenance() for d in dictionaries}}
    frame, notes = run_table(
        runner.units(), folder, runner, merged,
        identity=run_identity(
            Disentanglement.NAME, model, {"facts": facts.sha256}, {**own, **described, "path": path, "batch_rows": batch_rows}
        ),
        overwrite=overwrite, progress=progress,
    )  # fmt: skip
    order = {name: i for i, name in enumerate(("", *described["saes"]))}
    frame = frame.sort_values("sae", key=lambda s: s.map(order), kind="stable", ignore_index=True)
    text = {
        "name": facts.source,
        "sha256": facts.sha256,
        "attributes": list(facts.attributes),
        "contexts": list(facts.questions),
    }
    said = {
        **own, **described, "pairs": [len(some) for some in runner.pairs], "known": known.count, "rows": len(frame), **notes,
    }  # fmt: skip
    provenance = run_provenance(Disentanglement.NAME, model, {"facts": text}, runner.sites, said)
    return Disentanglement(pd.DataFrame(frame), known.tokens, provenance)

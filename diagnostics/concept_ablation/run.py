"""`feature_ablation`: a concept's top N latents are ablated, and intended and collateral effects measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from diagnostics.concept_ablation.activations import ConceptSettings
from diagnostics.concept_ablation.choices import ARMS, COUNTS, RANKINGS
from diagnostics.concept_ablation.concepts import ConceptTexts, described_texts
from diagnostics.concept_ablation.curves import EVERY
from diagnostics.concept_ablation.result import COLUMNS, FeatureAblation
from diagnostics.concept_ablation.work import AblationRunner
from diagnostics.results.calls import recorded
from diagnostics.running.notes import how_measured, summed
from diagnostics.running.provenance import run_identity, run_provenance
from diagnostics.running.units import UnitResult, run_table
from interventions.errors import ResultError
from interventions.models.wrapping import wrap
from interventions.progress import Progressing
from interventions.sites import several
from interventions.spliced import PATHS
from sae_models.dictionaries import dictionaries_of


@recorded
@torch.no_grad()
def feature_ablation(
    model: Any,
    texts: ConceptTexts | Mapping[str, ConceptTexts],
    saes: Any,
    *,
    counts: int | Sequence[int] = COUNTS,
    arms: str | Sequence[str] = ARMS[:3],
    rankings: str | Sequence[str] = RANKINGS[:1],
    reads: int | None = 8,
    sink_filter: float | None = 10.0,
    seed: int = 0,
    batch_tokens: int | None = None,
    path: str = "auto",
    folder: str | Path | None = None,
    overwrite: bool = False,
    progress: Progressing = None,
) -> FeatureAblation:
    """Ablate the top N latents of each concept wherever they fire, and measure what was meant beside what was not.

        x′ = x − Σ_{i in top N} z_i·d_i          at every token that counts; the SAE's error stays

        form    intended effect                                          collateral effect
        kl      mean KL(clean ‖ ablated) on texts with the concept       the same on texts without it
        logit   fall of the target tokens' vocabulary-centred logit,     root mean square change of all other tokens' centred
                on texts with the concept                                logits, at the same tokens
        probe   fall of the class' probe on texts with the concept       mean absolute change of the probes of the other classes,
                                                                         each on the texts of its own class

    texts: concepts of one data set, or of several by name (`concepts.labelled_concepts`, `token_concepts`, `given_concepts`): half of
    their texts rank latents and train probes, the other half measure. saes: anything that `as_sae` takes, one or several by name,
    each at its own site. counts: N; where fewer latents are active on the concept's texts, these (column `n_latents`). arms: some of
    `ARMS`, by default all but `keep`, which edits every token. rankings: some of `RANKINGS`. reads: tokens of a text at which effects are read, drawn by seeded hash (None: all that
    count; where a concept has positions, these in its own texts). Neither edited, counted nor read: position 0, special tokens, and
    sinks, ‖x‖ > sink_filter × the site's median at any of the sites. batch_tokens, path: as in `spliced`. folder: where finished units
    (data × SAE × concept × ranking) are kept; None: in memory. progress: called with (change, text) pairs done and their number.

    Raises `ResultError` for invalid settings, `BelongingError` for an SAE of another model or width, `TextError` for
    concepts without usable texts, `ReplayError` for the attribution of a model whose blocks cannot be run alone.
    Source: arXiv:2606.15054 (concept ablation, targeted probe perturbation); KL and logit forms, placebos, matched random latents,
    sufficiency and comparison at equal intended effect are ours.
    """
    model = wrap(model)
    given = {texts.name: texts} if isinstance(texts, ConceptTexts) else dict(texts)
    arms, rankings = several(arms), several(rankings)
    for what, asked, known in (("arms", arms, ARMS), ("rankings", rankings, RANKINGS)):
        if not asked or not set(asked) <= set(known) or len(set(asked)) < len(asked):
            raise ResultError(f"{what} {list(asked)}; expected some of {', '.join(known)}, each once")
    if path not in PATHS or (reads is not None and reads < 1) or not given:
        raise ResultError(
            f"path {path!r}, {reads} reads, {len(given)} data sets; expected one of {', '.join(PATHS)}, and 1 or more"
        )
    if EVERY in given:
        raise ResultError(
            f"a data set is called {EVERY!r}, which stands for the mean over concepts; give it another name"
        )
    counts = tuple(sorted(set(map(int, several(counts)))))
    if not counts or counts[0] < 1:
        raise ResultError(f"counts {list(counts)}; expected numbers of latents, 1 or more")
    dictionaries = dictionaries_of(saes, model, None)
    settings = ConceptSettings(counts, arms, rankings, reads, sink_filter or None, seed, batch_tokens, path)
    own = {
        "saes": {d.name: d.provenance() for d in dictionaries},
        **{k: v for k, v in vars(settings).items() if k != "batch_tokens"},
    }
    runner = AblationRunner(model, given, dictionaries, settings)
    hashes = {name: some.sha256 for name, some in given.items()}
    frame, notes = run_table(
        runner.units(), folder, runner, _merged, identity=run_identity(FeatureAblation.NAME, model, hashes, {"settings": own}),
        overwrite=overwrite, progress=progress,
    )  # fmt: skip
    split = "half of the texts of a class rank latents and train probes, the others measure: whole groups, in an order by seeded hash"
    described = {name: described_texts(some, model.tokenizer) for name, some in given.items()}
    said = own | {"split": split, "rows": len(frame)} | notes
    provenance = run_provenance(FeatureAblation.NAME, model, described, [d.site for d in dictionaries], said)
    tokens = [ids for some in given.values() for ids in some.tokens]
    return FeatureAblation(frame.loc[:, list(COLUMNS)], tokens, provenance)


def _merged(done: Sequence[UnitResult]) -> dict[str, Any]:
    """Notes of all units as one: what was left out, which path ran, how exact it was, accuracy of probes."""
    places = [f"{one.unit['data']}, {one.notes['site']}" for one in done]
    how = how_measured(zip(places, (one.notes for one in done), strict=True))
    return {
        "dropped": {reason: n for reason, n in summed(one.notes["dropped"] for one in done).items() if n},
        **{name: sum(one.notes[name] for one in done) for name in ("texts_passed", "texts_untouched")},
        "path": how["path"],
        "why_hooks": how["why_hooks"],
        "path_delta": how["replay_delta"],
        "probe_accuracy": {place: one.notes["probe_accuracy"] for place, one in zip(places, done, strict=True)},
        "tokens_left_out": {one.unit["data"]: one.notes["tokens_left_out"] for one in done},
        "latents": {one.unit.name: one.notes["latents"] for one in done},
    }

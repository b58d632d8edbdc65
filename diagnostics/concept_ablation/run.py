"""Does ablating a concept's latents take away the concept and nothing else? Intended against collateral effects of the top N."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch

from diagnostics.concept_ablation.activations import ConceptSettings
from diagnostics.concept_ablation.concepts import ConceptTexts, described_texts
from diagnostics.concept_ablation.conditions import ARMS
from diagnostics.concept_ablation.curves import EVERY
from diagnostics.concept_ablation.ranking import RANKINGS
from diagnostics.concept_ablation.result import COLUMNS, FeatureAblation
from diagnostics.concept_ablation.work import AblationRunner
from diagnostics.results.calls import recorded
from diagnostics.running.units import Units
from interventions.errors import ResultError
from interventions.models.wrapping import wrap
from interventions.progress import Progressing
from interventions.provenance import model_identity, model_provenance
from interventions.spliced import PATHS
from sae_models.dictionaries import dictionaries_of

COUNTS = (1, 2, 5, 10, 20, 50, 100, 500)
"""N. Source: arXiv:2606.15054."""


@recorded
def feature_ablation(
    model: Any,
    texts: ConceptTexts | Mapping[str, ConceptTexts],
    saes: Any,
    *,
    counts: Sequence[int] = COUNTS,
    arms: Sequence[str] = ARMS[:3],
    rankings: Sequence[str] = RANKINGS[:1],
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

    Raises `ResultError` for settings that do not serve, `BelongingError` for an SAE of another model or width, `TextError` for
    concepts whose texts do not serve, `ReplayError` for the attribution of a model whose blocks cannot be run alone.
    Source: arXiv:2606.15054 (concept ablation, targeted probe perturbation); KL and logit forms, placebos, matched random latents,
    sufficiency and comparison at equal intended effect are ours.
    """
    model = wrap(model)
    given = {texts.name: texts} if isinstance(texts, ConceptTexts) else dict(texts)
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
    counts = tuple(sorted(set(map(int, counts))))
    if not counts or counts[0] < 1:
        raise ResultError(f"counts {list(counts)}; expected numbers of latents, 1 or more")
    probes = dictionaries_of(saes, model, None)
    settings = ConceptSettings(
        counts, tuple(arms), tuple(rankings), reads, sink_filter or None, seed, batch_tokens, path
    )
    described = {probe.name: probe.provenance() for probe in probes}
    own = {
        "saes": described,
        **{k: v for k, v in vars(settings).items() if k != "batch_tokens"},
    }
    runner = AblationRunner(model, given, probes, settings)
    hashes = {name: some.sha256 for name, some in given.items()}
    identity = {"diagnostic": FeatureAblation.NAME, "settings": own, "texts": hashes, **model_identity(model)}
    with torch.no_grad(), Units(folder, identity, overwrite) as units:
        done = units.run(runner.units(), runner, progress)
    frame = pd.concat([d.frame for d in done if len(d.frame)] or [done[0].frame], ignore_index=True)
    if frame.empty:
        raise ResultError("no line is left: no text that measures has a token that counts; give longer texts")
    frame = cast(pd.DataFrame, frame[list(COLUMNS)])
    provenance = {
        "diagnostic": FeatureAblation.NAME,
        **model_provenance(model),
        "sites": [str(site) for site in dict.fromkeys(p.site for p in probes)],
        **own,
        "split": "half of the texts of a class rank latents and train probes, the others measure: whole groups, in an order by seeded hash",
        "texts": {name: described_texts(some, model.tokenizer) for name, some in given.items()},
        "rows": len(frame),
        **_merged(done),
        "null_models": [],
    }
    tokens = [ids for some in given.values() for ids in some.tokens]
    return FeatureAblation(frame, tokens, provenance)


def _merged(done: Sequence[Any]) -> dict[str, Any]:
    """Notes of all units as one: what was left out, which path ran, how exact it was, accuracy of probes."""
    dropped: dict[str, int] = {}
    counts = {"texts_passed": 0, "texts_untouched": 0}
    paths: dict[str, set[str]] = {}
    probes: dict[str, dict[str, float]] = {}
    latents: dict[str, Any] = {}
    for unit in done:
        notes = unit.notes
        for reason, n in notes["dropped"].items():
            dropped[reason] = dropped.get(reason, 0) + n
        for name in counts:
            counts[name] += notes[name]
        paths.setdefault(f"{unit.unit['data']}, {notes['site']}", set()).add(notes["path"])
        probes[f"{unit.unit['data']}, {notes['site']}"] = notes["probe_accuracy"]
        latents[unit.unit.name] = notes["latents"]
    known = [unit.notes["path_delta"] for unit in done if unit.notes["path_delta"] is not None]
    return {
        "dropped": {reason: n for reason, n in dropped.items() if n},
        **counts,
        "path": {place: "+".join(sorted(found)) for place, found in paths.items()},
        "why_hooks": sorted({unit.notes["why_hooks"] for unit in done} - {None}) or None,
        "path_delta": max(known, default=None),
        "probe_accuracy": probes,
        "tokens_left_out": {unit.unit["data"]: unit.notes["tokens_left_out"] for unit in done},
        "latents": latents,
    }

"""Does ablating a concept's latents take away the concept and nothing else? Intended against collateral effects of the top N."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, cast

import pandas as pd
import torch

from diagnostics import ablation_tables
from diagnostics.ablation_arms import ARMS
from diagnostics.ablation_curves import EVERY, KEEP, Curve
from diagnostics.ablation_runs import Runner
from diagnostics.ablation_summary import FORMS, curves, first_numbers, mean_over_concepts, summaries
from diagnostics.concept_activations import Settings
from diagnostics.concepts import ConceptTexts
from diagnostics.equal_effects import EqualEffect, equal_effects
from diagnostics.frames import lines_of
from diagnostics.headlines import Headline
from diagnostics.latent_logits import token_text
from diagnostics.latent_ranking import RANKINGS
from diagnostics.probes import probes_of
from diagnostics.progress import Progressing
from diagnostics.results import Result, model_identity, model_provenance
from diagnostics.sae_sites import PATHS
from diagnostics.units import Units
from interventions.errors import ResultError
from interventions.models import wrap

COUNTS = (1, 2, 5, 10, 20, 50, 100, 500)
"""N. Source: arXiv:2606.15054."""
COLUMNS = (
    "sae", "layer", "point", "data", "concept", "ranking", "arm", "count", "n_latents", "text", "group", "own", "n_tokens", "n_edited",
    "n_reads", "delta_norm", "delta_square", "coherence", "kl", "target_fall", "other_square", "class_probe_clean", "class_probe",
)  # fmt: skip
"""Of the table. count: N; n_latents: how many of them there were; text: index of the text in `tokens`; group: that of the first text
of its group, which is left out with it; own: whether it has the
concept. n_tokens: tokens that count; n_edited: those with Δx ≠ 0; n_reads: tokens at which effects are read,
those left out whose effect is not finite. delta_norm: mean ‖Δx‖ over the edited tokens (0: none); delta_square: mean ‖Δx‖² over all
that count; coherence: ‖Σ Δx‖/Σ ‖Δx‖ over the text (nan: no token edited); Δx as realised, after rounding to the model's dtype. kl: nats; target_fall: of the target tokens' mean
vocabulary-centred logit; other_square: mean squared change of the other tokens' centred logits; each a mean over the reads (nan:
none is left). class_probe: logit of the probe of the text's own class at the text's mean activation (nan where the texts have no
classes)."""


@dataclass(frozen=True)
class FeatureAblation(Result):
    """What ablating the latents of concepts did, text by text, and how it was made.

    The table has a line for each SAE × concept × ranking × arm × N × text that measures; its columns are those of `COLUMNS`.
    """

    NAME: ClassVar[str] = "feature_ablation"
    TITLE: ClassVar[str] = "Feature ablation"
    QUESTION: ClassVar[str] = "Do a concept's latents take away the concept and nothing else?"
    NOTE: ClassVar[str] = ablation_tables.NOTE

    @property
    def concepts(self) -> list[tuple[str, str]]:
        """(data, concept) in the order in which they were given."""
        return [(data, name) for data, found in self.provenance["texts"].items() for name in found["concepts"]]

    @property
    def forms(self) -> list[str]:
        """The forms of intended and collateral effect that this result has."""
        return [form for form in FORMS if form != "probe" or self.frame["class_probe"].notna().any()]

    @cached_property
    def curves(self) -> list[Curve]:
        """Intended and collateral effect at each N, of each SAE × concept × ranking × arm × form."""
        return curves(self.frame, self.forms)

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """A line for each point of each curve: effects, selectivity, ratio, with intervals, and doses."""
        return summaries(self.frame, self.curves)

    def equal_effects(self, form: str = "kl", share: float = 0.5) -> list[EqualEffect]:
        """Collateral effect of each SAE and concept at one intended effect: see `equal_effects.equal_effects`; none without `selected`."""
        return equal_effects([c for c in self.curves if c.form == form], share)

    def means(self, form: str = "probe") -> list[Curve]:
        """Curves of the mean over concepts, of each SAE × ranking × arm."""
        return mean_over_concepts([c for c in self.curves if c.form == form])

    def as_dict(self) -> dict[str, Any]:
        """Summary, collateral effects at equal intended effect, and provenance, as they stand in the JSON file."""
        equal = {form: [e.as_dict() for e in self.equal_effects(form)] for form in self.forms}
        return {"summary": self.groups, "at_equal_intended_effect": equal, "provenance": self.provenance}

    def headlines(self) -> Iterable[Headline]:
        """Selectivity of the selected latents, in the first form, beside that of the floors."""
        return first_numbers(self.forms[0], self.means(self.forms[0]))

    def own_caveats(self) -> list[str]:
        """Whether there is a placebo."""
        known = "placebo" in self.provenance.get("arms", ())
        return [] if known else ["no placebo arm: nothing says what a random edit of the same norm and angle does"]

    def left_out(self) -> list[str]:
        """What was measured on, and what is missing; a line each."""
        p = self.provenance
        said = [f"{name}: {ablation_tables.measured(found)}" for name, found in p["texts"].items()]
        untouched = f"{p['texts_untouched']} (edit, text) pairs in which nothing fired: no effect, and no pass"
        return [*said, *super().left_out(), untouched]

    def plot(self, form: str = "kl") -> Any:
        """Collateral against intended effect, a panel a concept, and selectivity at equal intended effect. A matplotlib Figure."""
        from diagnostics.ablation_plots import plot_precision

        curves = [c for c in self.curves if (c.form, c.ranking) == (form, self._shown)]
        equal = [e for e in self.equal_effects(form) if e.ranking == self._shown]
        return plot_precision(curves, equal, self.provenance, form)

    def plot_counts(self) -> Any:
        """By N: the ratio of the probe form, ‖Δx‖², and what is left when only N latents are kept. A matplotlib Figure."""
        from diagnostics.ablation_plots import plot_counts

        form, shown = "probe" if "probe" in self.forms else "kl", self._shown
        means = [c for c in self.means(form) if c.ranking == shown]
        kept = [c for c in self.means("kl") if (c.ranking, c.arm) == (shown, KEEP)]
        doses = lines_of(self.frame, arm="selected", ranking=shown)
        return plot_counts(means, kept, doses, self.provenance, form)

    @property
    def _shown(self) -> str:
        """The ranking that figures show."""
        return self.provenance["rankings"][0]

    def figures(self) -> dict[str, Any]:
        """A figure for each form, and one by N."""
        return {f"{self.NAME}_{form}": self.plot(form) for form in self.forms} | {
            f"{self.NAME}_counts": self.plot_counts()
        }

    def tables(self) -> dict[str, pd.DataFrame]:
        """Of each form: means over concepts by N, and SAEs at equal intended effect."""
        return ablation_tables.tables(
            self.frame, {form: (self.means(form), self.equal_effects(form)) for form in self.forms}
        )


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
    probes = probes_of(saes, model, None)
    settings = Settings(counts, tuple(arms), tuple(rankings), reads, sink_filter or None, seed, batch_tokens, path)
    described = {probe.name: probe.provenance() for probe in probes}
    own = {
        "saes": described,
        **{k: v for k, v in vars(settings).items() if k != "batch_tokens"},
    }
    runner = Runner(model, given, probes, settings)
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


def described_texts(texts: ConceptTexts, tokenizer: Any) -> dict[str, Any]:
    """Of a data set: how many texts and groups on each side, and each concept's target tokens as strings."""

    def n_groups(some: Sequence[int], ranking: bool) -> int:
        return len({texts.groups[i] for i in texts.side(some, ranking)})

    def words(ids: Sequence[int]) -> list[str]:
        return [str(i) if tokenizer is None else token_text(i, tokenizer) for i in ids]

    concepts = {
        c.name: {
            "ranking": [len(texts.side(c.own, True)), len(texts.side(c.others, True))],
            "measuring": [len(texts.side(c.own, False)), len(texts.side(c.others, False))],
            "ranking_groups": [n_groups(c.own, True), n_groups(c.others, True)],
            "measuring_groups": [n_groups(c.own, False), n_groups(c.others, False)],
            "targets": words(c.targets),
        }
        for c in texts.concepts
    }
    measured = {i for c in texts.concepts for i in texts.side((*c.own, *c.others), False)}
    return {
        **texts.provenance,
        "name": texts.name,
        "texts": len(texts.tokens),
        "groups": len(set(texts.groups)),
        "measured": {"texts": len(measured), "groups": len({texts.groups[i] for i in measured})},
        "concepts": concepts,
        "sha256": texts.sha256,
    }


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

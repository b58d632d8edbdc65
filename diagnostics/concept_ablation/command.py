"""Ablate the latents of concepts wherever they fire: what was meant beside what was not, at equal intended effect."""

from dataclasses import dataclass

from diagnostics.commands import command
from diagnostics.commands.inputs import short_names
from diagnostics.commands.sae_inputs import SAEChoice
from diagnostics.concept_ablation.concepts import labelled_concepts
from diagnostics.concept_ablation.conditions import ARMS
from diagnostics.concept_ablation.ranking import RANKINGS
from diagnostics.concept_ablation.result import FeatureAblation
from diagnostics.concept_ablation.run import COUNTS, feature_ablation
from interventions.errors import MechdiagError
from interventions.files import claim_run
from interventions.spliced import PATHS
from interventions.texts.labelled import load_labelled


@dataclass(frozen=True, kw_only=True)
class ConceptAblationOptions(command.Resumable, SAEChoice):
    """Does ablating a concept's latents take away the concept and nothing else?

    Ranks the latents of each concept (a class of labelled texts) on half of the texts, subtracts the top N wherever they fire, and
    measures intended and collateral effects on the other half: KL, target logits, probes of the classes. Compared with random active
    latents, with placebos of the same norm and angle, and on request with keeping only the top N. Writes a table (Parquet), its
    tokens, a summary with provenance (JSON) and figures into --out.

    Examples:
      scripts/ablate_features.py --data language code --out results/features
      scripts/ablate_features.py --data mine.csv --saes cosine --arms selected random placebo keep \\
          --out results/mine
    """

    data: tuple[str, ...] = ("language", "code")
    """labelled texts: topics, toxicity, sentiment, language, code (packaged), or .csv and .jsonl files with text and label (and group,
    for texts that must stand on one side of the split)"""
    concepts: tuple[str, ...] = ()
    """classes that are asked about (default: all); the other classes still serve as texts without the concept"""
    counts: tuple[int, ...] = COUNTS
    """N: so many of the best latents are ablated"""
    arms: tuple[str, ...] = ARMS[:3]
    """selected, random (active latents of like expected dose, by lot), placebo (same norm and angle, one direction a text), keep (only the
    top N kept: also without any, and at every token)"""
    rankings: tuple[str, ...] = RANKINGS[:1]
    """mean_difference, probe (its weight x mean difference), attribution (of the target logit)"""
    per_class: int = 48
    """texts of each class; half of them rank latents and train probes, half measure"""
    max_length: int = 48
    """tokens a text is cut at"""
    reads: int = 8
    """tokens of a text at which effects are read, drawn by lot (0: all)"""
    sink_filter: float = 10.0
    """leave out tokens with ||x|| above this many times the site's median (0: keep them)"""
    batch_tokens: int | None = None
    """tokens in one forward pass (default: 384 on the CPU, 8192 elsewhere)"""
    path: str = "auto"
    """auto (the blocks above a site, checked against full forward passes), blocks, or hooks (full forward passes)"""
    seed: int = 0
    """of texts, their split, reads, random latents and placebos"""

    def check(self) -> None:
        """What can be wrong without a model. Raises `MechdiagError`."""
        for what, asked, known in (("arms", self.arms, ARMS), ("rankings", self.rankings, RANKINGS)):
            wrong = [name for name in asked if name not in known]
            if wrong or not asked:
                raise MechdiagError(f"--{what} {' '.join(wrong)}; known: {', '.join(known)}")
        if self.path not in PATHS:
            raise MechdiagError(f"unknown path {self.path!r}; known: {', '.join(PATHS)}")
        if not self.saes or not self.data or not self.counts or min(self.counts) < 1:
            raise MechdiagError(
                f"--saes {list(self.saes)}, --data {list(self.data)}, --counts {list(self.counts)}; expected some of each, counts from 1"
            )
        if self.per_class < 4 or self.reads < 0 or self.sink_filter < 0:
            raise MechdiagError(
                f"--per-class {self.per_class}, --reads {self.reads}, --sink-filter {self.sink_filter}; expected 4 texts or more, and "
                "numbers from 0"
            )
        self.check_model()
        claim_run(self.out, FeatureAblation.files(), self.overwrite)


def main(settings: ConceptAblationOptions) -> command.Document:
    """Everything that can be wrong with the input is looked at before the model runs."""
    settings.check()
    saes = settings.load_saes()
    labelled = {
        name: load_labelled(where, per_class=4 * settings.per_class, seed=settings.seed)
        for name, where in zip(short_names(settings.data), settings.data, strict=True)
    }
    known = {name for some in labelled.values() for name in some.labels}
    if unknown := [name for name in settings.concepts if name not in known]:
        raise MechdiagError(f"--concepts {' '.join(unknown)}; the texts have: {', '.join(sorted(known))}")
    model = settings.load_model()
    texts = {}
    for name, some in labelled.items():
        wanted = [c for c in some.classes if not settings.concepts or c in settings.concepts]
        if wanted:
            texts[name] = labelled_concepts(
                some,
                model.tokenizer,
                classes=wanted,
                per_class=settings.per_class,
                max_length=settings.max_length,
                seed=settings.seed,
            )
    with settings.progress("ablating", unit="text") as progress:
        result = feature_ablation(
            model,
            texts,
            saes,
            counts=settings.counts,
            arms=settings.arms,
            rankings=settings.rankings,
            reads=settings.reads or None,
            sink_filter=settings.sink_filter or None,
            seed=settings.seed,
            batch_tokens=settings.batch_tokens,
            path=settings.path,
            folder=settings.out,
            overwrite=settings.overwrite,
            progress=progress,
        )
    return settings.finish(result, settings.out)


def run() -> None:
    """The command line of `scripts/ablate_features.py`."""
    command.run(ConceptAblationOptions, main)

"""Ablate the latents of concepts wherever they fire: intended and collateral effects, at equal intended effect."""

from dataclasses import dataclass
from typing import Annotated

from diagnostics.commands import command
from diagnostics.commands.inputs import SplicePath, labelled_data
from diagnostics.commands.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt, PromptLength, Range
from diagnostics.commands.sae_inputs import SAEOptions
from diagnostics.concept_ablation.choices import ARMS, COUNTS, RANKINGS
from interventions.errors import MechdiagError


@dataclass(frozen=True, kw_only=True)
class ConceptAblationOptions(command.ResumableOptions, SAEOptions):
    """Does ablating a concept's latents remove the concept and nothing else?

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
    for texts that must stay on one side of the split)"""
    concepts: tuple[str, ...] = ()
    """classes to ablate (default: all); the other classes are used as texts without the concept"""
    counts: tuple[PositiveInt, ...] = COUNTS
    """N, the numbers of top latents to ablate"""
    arms: tuple[str, ...] = ARMS[:3]
    """conditions: selected, random (active latents of similar expected dose, at random), placebo (same norm and angle, one direction a
    text), keep (only the top N kept: also without any, and at every token)"""
    rankings: tuple[str, ...] = RANKINGS[:1]
    """mean_difference, probe (its weight x mean difference), attribution (of the target logit)"""
    per_class: Annotated[int, Range(4)] = 48
    """texts of each class; half of them rank latents and train probes, half measure"""
    max_length: PromptLength = 48
    """truncate texts to this many tokens"""
    reads: NonNegativeInt = 8
    """tokens of a text at which effects are measured, at random (0: all)"""
    sink_filter: NonNegativeFloat = 10.0
    """drop tokens with ||x|| above this many times the site's median (0: keep them)"""
    batch_tokens: PositiveInt | None = None
    """tokens in one forward pass (default: 384 on the CPU, 8192 elsewhere)"""
    path: SplicePath = "auto"
    """auto (the blocks above a site, checked against full forward passes), blocks, or hooks (full forward passes)"""
    seed: NonNegativeInt = 0
    """of texts, their split, measured tokens, random latents and placebos"""

    def check(self) -> None:
        """Validate options before loading the model. Raises `MechdiagError`."""
        from diagnostics.concept_ablation.result import FeatureAblation
        from interventions.files import claim_run

        for what, asked, known in (("arms", self.arms, ARMS), ("rankings", self.rankings, RANKINGS)):
            wrong = [name for name in asked if name not in known]
            if wrong or not asked:
                raise MechdiagError(f"--{what} {' '.join(wrong)}; known: {', '.join(known)}")
        for what in ("saes", "data", "counts"):
            if not getattr(self, what):
                raise MechdiagError(f"--{what} is empty; give at least one")
        self.check_model()
        claim_run(self.out, FeatureAblation.files(), self.overwrite)


def main(options: ConceptAblationOptions) -> command.Document:
    """Run the command."""
    from diagnostics.concept_ablation.concepts import labelled_concepts
    from diagnostics.concept_ablation.run import feature_ablation

    options.check()
    saes = options.load_saes()
    data = labelled_data(options.data, 4 * options.per_class, options.seed)
    known = {name for some in data.values() for name in some.labels}
    if unknown := [name for name in options.concepts if name not in known]:
        raise MechdiagError(f"--concepts {' '.join(unknown)}; the texts have: {', '.join(sorted(known))}")
    model = options.load_model()
    how = options.named("per_class", "max_length", "seed")
    texts = {
        name: labelled_concepts(some, model.tokenizer, classes=classes, **how)
        for name, some in data.items()
        if (classes := [c for c in some.classes if not options.concepts or c in options.concepts])
    }
    how = options.named("counts", "arms", "rankings", "sink_filter", "seed", "batch_tokens", "path", "overwrite") | {
        "reads": options.reads or None,
        "folder": options.out,
    }
    return options.measure("ablating", "text", feature_ablation, model, texts, saes, **how)


def run() -> None:
    """The command line of `scripts/ablate_features.py`."""
    command.run(ConceptAblationOptions, main)

"""Ablate the latents of a class, or of a spurious attribute: which probes lose accuracy, and which gain it?"""

from dataclasses import dataclass
from typing import Annotated

from diagnostics.commands import command
from diagnostics.commands.inputs import labelled_data
from diagnostics.commands.ranges import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PromptLength,
    Range,
)
from diagnostics.commands.sae_inputs import SAEOptions
from diagnostics.probe_perturbation.choices import KS
from interventions.errors import MechdiagError


@dataclass(frozen=True, kw_only=True)
class ProbePerturbationOptions(command.ResumableOptions, SAEOptions):
    """Does ablating the latents of a class change the probe of that class, and no other?

    Targeted probe perturbation: ablates the k latents that speak for a class, and compares the fall of its probe's accuracy with that of
    the other classes' probes. Spurious correlation removal: ablates the latents of an attribute that a biased probe leans on. Beside
    both, random latents at the same dose, and the probe's direction projected out. Writes a table and a table of texts (Parquet), their
    tokens, a summary with provenance (JSON) and the figure into --out.

    Examples:
      scripts/probe_perturbation.py --layers 15 --out results/perturbation
      scripts/probe_perturbation.py --data mine.csv:text:label --crossed --out results/mine
    """

    data: tuple[str, ...] = ("topics", "language")
    """sets of three classes or more: packaged (topics holds offensive sentences), or .csv or .jsonl files as in probe_saes.py"""
    crossed: tuple[str, ...] = ("questions",)
    """sets of two attributes, with labels such as english/question: packaged, or files; for spurious correlation removal"""
    ks: tuple[PositiveInt, ...] = KS
    """numbers of latents ablated"""
    seeds: PositiveInt = 3
    """splits into training and held-out texts"""
    per_class: PositiveInt = 100
    """texts of each class, at most"""
    max_length: PromptLength = 128
    """truncate texts to this many tokens"""
    test_share: Annotated[float, Range(0, 1, above=True, below=True)] = 0.3
    """share of the texts held out to test probes, in whole groups"""
    inverse_penalty: PositiveFloat = 1.0
    """C of the logistic regression: the inverse strength of its L2 penalty"""
    sink_filter: NonNegativeFloat = 10.0
    """drop tokens with ||x|| above this many times the site's median (0: keep them)"""
    seed: NonNegativeInt = 0
    """of sampled texts, splits and random latents"""

    def check(self) -> None:
        """Validate options before loading the model. Raises `MechdiagError`."""
        from diagnostics.probe_perturbation.result import ProbePerturbation
        from interventions.files import claim_run

        if not self.saes or not self.ks or not (self.data or self.crossed):
            raise MechdiagError("no SAE, no number of latents, or no data; name at least one of each")
        self.check_model()
        claim_run(self.out, ProbePerturbation.files(), self.overwrite)


def main(options: ProbePerturbationOptions) -> command.Document:
    """Run the command."""
    from diagnostics.probe_perturbation.run import perturb_probes

    options.check()
    saes = options.load_saes()
    texts, crossed = (
        list(labelled_data(some, options.per_class, options.seed).values()) for some in (options.data, options.crossed)
    )
    names = (
        "ks",
        "seeds",
        "per_class",
        "max_length",
        "test_share",
        "inverse_penalty",
        "sink_filter",
        "seed",
        "overwrite",
    )
    how = options.named(*names) | {"crossed": crossed, "folder": options.out}
    return options.measure("ablating", "class", perturb_probes, options.load_model(), texts, saes, **how)


def run() -> None:
    """The command line of `scripts/probe_perturbation.py`."""
    command.run(ProbePerturbationOptions, main)

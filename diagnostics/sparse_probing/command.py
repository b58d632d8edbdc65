"""Sparse probing: how well do k latents of an SAE separate classes of texts?"""

from dataclasses import dataclass
from typing import Annotated

from diagnostics.commands import command
from diagnostics.commands.ranges import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PromptLength,
    Range,
)
from diagnostics.commands.sae_inputs import SAEOptions
from interventions.errors import MechdiagError


@dataclass(frozen=True, kw_only=True)
class ProbingOptions(command.ResumableOptions, SAEOptions):
    """How well do a few latents predict a class?

    Fits logistic probes of each class against the rest on the k latents of largest mean difference, on k random ones, with shuffled
    labels, on all latents and on the raw activations; and finds the best single latent (probe loss). Writes a table and a table of
    texts (Parquet), their tokens, a summary with provenance (JSON) and the figure into --out.

    Examples:
      scripts/probe_saes.py --layers 15 --data language code --out results/probe
      scripts/probe_saes.py --data topics mine.csv:text:label --out results/mine
    """

    data: tuple[str, ...] = ("topics", "sentiment", "language", "code")
    """topics, toxicity, sentiment, language, code (all in packages; topics and toxicity hold offensive sentences), or a .csv or .jsonl
    file with fields text and label (and group, for texts that must stay on one side of a split), or file.csv:text:label and
    file.csv:text:label:group to name them"""
    ks: tuple[PositiveInt, ...] = (1, 2, 5, 20)
    """numbers of latents"""
    seeds: PositiveInt = 3
    """splits into training and held-out texts"""
    shuffles: PositiveInt = 200
    """shuffles of the labels, with selection and fit anew in each: the null of the selected latents"""
    refits: Annotated[int, Range(2)] = 20
    """splits with selection and fit anew, for the interval that includes them"""
    per_class: NonNegativeInt = 150
    """texts of each class, at most (0: as many as the smallest class has)"""
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
        from diagnostics.sparse_probing.result import SparseProbing
        from interventions.files import claim_run

        if not self.saes or not self.data:
            raise MechdiagError("no SAE or no data; name at least one of each")
        self.check_model()
        claim_run(self.out, SparseProbing.files(), self.overwrite)


def main(options: ProbingOptions) -> command.Document:
    """Run the command."""
    from diagnostics.sparse_probing.run import probe_saes
    from interventions.texts.labelled import load_labelled

    options.check()
    saes = options.load_saes()
    per_class = options.per_class or None
    texts = [load_labelled(where, per_class=per_class, seed=options.seed) for where in options.data]
    names = (
        "ks",
        "seeds",
        "shuffles",
        "refits",
        "max_length",
        "test_share",
        "inverse_penalty",
        "sink_filter",
        "seed",
        "overwrite",
    )
    how = options.named(*names) | {"per_class": per_class, "folder": options.out}
    return options.measure("probing", "task", probe_saes, options.load_model(), texts, saes, **how)


def run() -> None:
    """The command line of `scripts/probe_saes.py`."""
    command.run(ProbingOptions, main)

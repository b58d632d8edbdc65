"""Dictionaries of one site compared: matched and unique latents, norm detectors, stability over seeds, alignment and effect."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

from diagnostics.commands import command
from diagnostics.commands.inputs import ReplayPath, labelled_data
from diagnostics.commands.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt, PositiveShare, Range
from diagnostics.commands.sae_inputs import HeldOutTextOptions, SAEOptions, sae_paths
from diagnostics.dictionary_comparison.choices import FOLDS
from interventions.errors import MechdiagError

if TYPE_CHECKING:
    from diagnostics.dictionary_comparison.work import ComparisonPlan
    from interventions.models.causal_model import CausalModel
    from interventions.texts.labelled import Labelled
    from interventions.texts.prompts import Prompts


@dataclass(frozen=True, kw_only=True)
class ComparisonOptions(command.ResumableOptions, SAEOptions, HeldOutTextOptions):
    """Which latents do SAEs share, and how do their unique latents differ?

    Matches latents one to one by activations and decoder rows, beside chance; measures where matched and unique latents fire by
    quartile of the activation's norm, how much gradients grow with the norm, how stable latents are over training seeds, whether
    aligned latents are the stable or the effective ones, and whether a gap in probing comes from latents that the other SAE lacks.
    Writes tables (Parquet), tokens, a summary with provenance (JSON) and figures into --out.

    Examples:
      scripts/compare_saes.py --layers 15 --out results/compared
      scripts/compare_saes.py --causal-latents 200 --data topics language \\
          --out results/compared
    """

    saes: tuple[str, ...] = ("standard", "cosine")
    """two or more of one site: folders, files, names in the zoo, hf:owner/name/folder; or kinds of SAE in the packaged zoo, such as
    cosine, one for each of --layers"""
    data: tuple[str, ...] = ()
    """labelled texts for the split of the probing gap: topics, toxicity, sentiment, language, code, or .csv and .jsonl files"""
    per_class: Annotated[int, Range(FOLDS)] = 200
    """texts of each class of --data, at most"""
    correlation: PositiveShare = 0.7
    """matched latents have at least this correlation of activations"""
    cosine: PositiveShare = 0.7
    """and a cosine of decoder rows above this"""
    duplicate_cosine: PositiveShare = 0.9
    """near-duplicates within an SAE have a cosine of decoder rows above this"""
    min_active: PositiveInt = 10
    """latents active on fewer tokens are counted, but not matched"""
    min_quartile: PositiveInt = 5
    """active tokens that a latent needs in the first and in the fourth quartile of ||x|| for its gradient ratio"""
    hungarian_limit: PositiveInt = 8192
    """size of a connected group of latents up to which the one-to-one matching is optimal; larger groups match mutual best first"""
    causal_latents: NonNegativeInt = 0
    """latents of each SAE to ablate, from bins of log frequency (0: none)"""
    causal_tokens: PositiveInt = 10
    """tokens for each, where it is active"""
    sink_filter: NonNegativeFloat = 10.0
    """drop tokens with ||x|| above this many times the site's median (0: keep them, and first and special tokens)"""
    skip_first: NonNegativeInt = 1
    """first tokens of each prompt to drop along with the sinks"""
    batch_rows: PositiveInt | None = None
    """tokens in one forward pass of ablations (default: 512 on the CPU, on a GPU up to 4096 by its memory); halved when memory runs out"""
    path: ReplayPath = "auto"
    """of ablations: auto (replay, checked against full forward passes), replay, or hooks (full forward passes)"""
    seed: NonNegativeInt = 0
    """of prompts, sampled latents and tokens, placebos and chance levels"""

    def check(self) -> None:
        """Validate options before loading the model. Raises `MechdiagError`."""
        from diagnostics.dictionary_comparison.result import DictionaryComparison
        from interventions.files import claim_run

        self.plan().check(len(sae_paths(self.saes, self.layers, self.model)))
        self.check_model()
        claim_run(self.out, DictionaryComparison.files(), self.overwrite)

    def plan(self) -> ComparisonPlan:
        """The settings of the comparison."""
        from diagnostics.dictionary_comparison.work import ComparisonPlan

        return ComparisonPlan(**self.named(*ComparisonPlan.__dataclass_fields__))


def main(options: ComparisonOptions) -> command.Document:
    """Run the command."""
    from diagnostics.dictionary_comparison.run import compare_dictionaries

    options.check()
    saes = options.load_saes()
    if len(sites := sorted({str(sae.hook_name) for sae in saes.values()})) > 1:
        raise MechdiagError(f"SAEs of {', '.join(sites)}; SAEs are compared at one site: give those of one")
    texts = options.texts(options.prompts)
    data = labelled_data(options.data, options.per_class, options.seed)
    model = options.load_model()
    prompts = options.tokenized(texts, model, options.seed)
    labelled = {name: _tokenized(some, model, options) for name, some in data.items()}
    how = asdict(options.plan()) | options.named("path", "batch_rows", "overwrite") | {"folder": options.out}
    return options.measure("comparing", "unit", compare_dictionaries, model, prompts, saes, labelled=labelled, **how)


def _tokenized(some: Labelled, model: CausalModel, options: ComparisonOptions) -> tuple[Prompts, list[str], list[Any]]:
    """Labelled texts as prompts, with the label and group of each that is kept."""
    from interventions.texts.prompts import tokenize

    found = tokenize(some.texts, model.tokenizer, **options.named("max_length", "chat_template", "seed"))
    found.provenance.update(some.provenance())
    place = {text: i for i, text in enumerate(some.texts)}
    kept = [place[text] for text in found.texts]
    return found, [some.labels[i] for i in kept], [some.groups[i] for i in kept]


def run() -> None:
    """The command line of `scripts/compare_saes.py`."""
    command.run(ComparisonOptions, main)

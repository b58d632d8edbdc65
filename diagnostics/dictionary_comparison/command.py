"""Dictionaries of one site compared: matched and unique latents, norm detectors, stability over seeds, alignment and effect."""

from dataclasses import asdict, dataclass
from typing import Any

from diagnostics.commands import command
from diagnostics.commands.inputs import short_names
from diagnostics.commands.sae_inputs import HeldOutText, SAEChoice, sae_paths
from diagnostics.dictionary_comparison.probing_gap import FOLDS
from diagnostics.dictionary_comparison.result import DictionaryComparison
from diagnostics.dictionary_comparison.run import compare_dictionaries
from diagnostics.dictionary_comparison.work import ComparisonPlan
from interventions.effects import PATHS
from interventions.errors import MechdiagError
from interventions.files import claim_run
from interventions.texts.labelled import load_labelled
from interventions.texts.prompts import tokenize


@dataclass(frozen=True, kw_only=True)
class ComparisonOptions(command.Resumable, SAEChoice, HeldOutText):
    """Which latents do SAEs share, and what sets their own apart?

    Matches latents one to one by activations and decoder rows, beside chance; says where matched and unique latents fire by
    quartile of the activation's norm, how much a gradient grows with it, how stable latents are over training seeds, whether
    aligned latents are the stable or the effective ones, and whether a gap in probing comes from latents that the other has not.
    Writes tables (Parquet), tokens, a summary with provenance (JSON) and figures into --out.

    Examples:
      scripts/compare_saes.py --layers 15 --out results/compared
      scripts/compare_saes.py --causal-latents 200 --data topics language \\
          --out results/compared
    """

    saes: tuple[str, ...] = ("standard", "cosine")
    """two or more of one site: folders, files, names in the zoo, hf:owner/name/folder; or kinds of the packaged zoo, such as cosine, of
    each of --layers"""
    data: tuple[str, ...] = ()
    """labelled texts for the split of the probing gap: topics, toxicity, sentiment, language, code, or .csv and .jsonl files"""
    per_class: int = 200
    """texts of each class of --data, at most"""
    correlation: float = 0.7
    """matched latents have at least this correlation of activations"""
    cosine: float = 0.7
    """and a cosine of decoder rows above this"""
    duplicate_cosine: float = 0.9
    """near-duplicates within an SAE have a cosine of decoder rows above this"""
    min_active: int = 10
    """latents active on fewer tokens are counted, but not matched"""
    min_quartile: int = 5
    """active tokens that a latent needs in the first and in the fourth quartile of ||x|| for its gradient ratio"""
    hungarian_limit: int = 8192
    """latents that hang together up to which the one-to-one matching is the best one; beyond, mutual best first"""
    causal_latents: int = 0
    """latents of each SAE that are ablated, from bins of log frequency (0: none)"""
    causal_tokens: int = 10
    """tokens of each, where it is active"""
    sink_filter: float = 10.0
    """leave out tokens with ||x|| above this many times the site's median (0: keep them, first and special tokens too)"""
    skip_first: int = 1
    """first tokens of each prompt that are left out with the sinks"""
    batch_rows: int | None = None
    """tokens in one forward pass of ablations (default: 512 on the CPU, 4096 elsewhere); halved when memory runs out"""
    path: str = "auto"
    """of ablations: auto (replay, checked against full forward passes), replay, or hooks (full forward passes)"""
    seed: int = 0
    """of prompts, drawn latents and tokens, placebos and chance levels"""

    def check(self) -> None:
        """What can be wrong without a model. Raises `MechdiagError`."""
        self.plan().check(len(sae_paths(self.saes, self.layers, self.model)))
        if self.path not in PATHS:
            raise MechdiagError(f"unknown path {self.path!r}; known: {', '.join(PATHS)}")
        self.check_share()
        if self.n_prompts < 1 or self.max_length < 1 or self.per_class < FOLDS:
            raise MechdiagError(
                f"--n-prompts {self.n_prompts}, --max-length {self.max_length}, --per-class {self.per_class}; expected 1 or more, and "
                f"{FOLDS} texts of a class or more"
            )
        self.check_model()
        claim_run(self.out, DictionaryComparison.files(), self.overwrite)

    def plan(self) -> ComparisonPlan:
        """What the comparison asks for."""
        own: dict[str, Any] = {name: getattr(self, name) for name in ComparisonPlan.__dataclass_fields__}
        own["sink_filter"] = self.sink_filter or None
        return ComparisonPlan(**own)

    def asked(self) -> dict[str, Any]:
        """Keyword arguments of `compare_dictionaries`."""
        own = {name: getattr(self, name) for name in ("path", "batch_rows", "overwrite")}
        return asdict(self.plan()) | own | {"folder": self.out}


def main(settings: ComparisonOptions) -> command.Document:
    """Everything that can be wrong with the input is looked at before the model runs."""
    settings.check()
    saes = settings.load_saes()
    if len(sites := sorted({str(sae.hook_name) for sae in saes.values()})) > 1:
        raise MechdiagError(f"SAEs of {', '.join(sites)}; dictionaries are compared at one site: give those of one")
    texts = settings.texts(settings.prompts)
    data = {
        name: load_labelled(where, per_class=settings.per_class, seed=settings.seed)
        for name, where in zip(short_names(settings.data) if settings.data else [], settings.data, strict=True)
    }
    model = settings.load_model()
    prompts = settings.tokenized(texts, model, settings.seed)
    how = {"max_length": settings.max_length, "chat_template": settings.chat_template, "seed": settings.seed}
    labelled = {}
    for name, some in data.items():
        found, place = tokenize(some.texts, model.tokenizer, **how), {text: i for i, text in enumerate(some.texts)}
        found.provenance.update(some.provenance())
        kept = [place[text] for text in found.texts]
        labelled[name] = (found, [some.labels[i] for i in kept], [some.groups[i] for i in kept])
    with settings.progress("comparing", unit="unit") as progress:
        result = compare_dictionaries(model, prompts, saes, labelled=labelled, progress=progress, **settings.asked())
    return settings.finish(result, settings.out)


def run() -> None:
    """The command line of `scripts/compare_saes.py`."""
    command.run(ComparisonOptions, main)

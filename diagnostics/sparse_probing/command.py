"""Sparse probing: how well do k latents of an SAE tell labelled texts apart?"""

from dataclasses import dataclass

from diagnostics.commands import command
from diagnostics.commands.sae_inputs import SAEChoice
from diagnostics.sparse_probing.result import SparseProbing
from diagnostics.sparse_probing.run import probe_saes
from interventions.errors import MechdiagError
from interventions.files import claim_run
from interventions.texts.labelled import load_labelled


@dataclass(frozen=True, kw_only=True)
class ProbingOptions(command.Resumable, SAEChoice):
    """How much of a class do a few latents hold?

    Fits logistic probes of each class against the rest on the k latents of largest mean difference, on k random ones, with shuffled
    labels, on all latents and on the raw activations; and finds the best single latent (probe loss). Writes a table and a table of
    texts (Parquet), their tokens, a summary with provenance (JSON) and the figure into --out.

    Examples:
      scripts/probe_saes.py --layers 15 --data language code --out results/probe
      scripts/probe_saes.py --data topics mine.csv:text:label --out results/mine
    """

    data: tuple[str, ...] = ("topics", "sentiment", "language", "code")
    """topics, toxicity, sentiment, language, code (all in packages; topics and toxicity hold offensive sentences), or a .csv or .jsonl
    file with fields text and label (and group, for texts that must stand on one side of a split), or file.csv:text:label and
    file.csv:text:label:group to name them"""
    ks: tuple[int, ...] = (1, 2, 5, 20)
    """numbers of latents"""
    seeds: int = 3
    """splits into training and held-out texts"""
    per_class: int = 150
    """texts of each class, at most (0: as many as the smallest class has)"""
    max_length: int = 128
    """tokens a text is cut at"""
    test_share: float = 0.3
    """share of the texts that probes are judged on, in whole groups"""
    inverse_penalty: float = 1.0
    """C of the logistic regression: the inverse strength of its L2 penalty"""
    sink_filter: float = 10.0
    """leave out tokens with ||x|| above this many times the site's median (0: keep them)"""
    seed: int = 0
    """of the draw of texts, of splits and of random latents"""

    def check(self) -> None:
        """What can be wrong without a model. Raises `MechdiagError`."""
        if not self.saes or not self.data:
            raise MechdiagError("no SAE or no data; name at least one of each")
        if self.sink_filter < 0 or self.per_class < 0:
            raise MechdiagError(f"--sink-filter {self.sink_filter}, --per-class {self.per_class}; expected 0 or more")
        self.check_model()
        claim_run(self.out, SparseProbing.files(), self.overwrite)


def main(settings: ProbingOptions) -> command.Document:
    """Everything that can be wrong with the input is looked at before the model runs."""
    settings.check()
    saes = settings.load_saes()
    texts = [load_labelled(x, per_class=settings.per_class or None, seed=settings.seed) for x in settings.data]
    model = settings.load_model()
    with settings.progress("probing", unit="task") as progress:
        result = probe_saes(
            model,
            texts,
            saes,
            ks=settings.ks,
            seeds=settings.seeds,
            per_class=settings.per_class or None,
            max_length=settings.max_length,
            test_share=settings.test_share,
            inverse_penalty=settings.inverse_penalty,
            sink_filter=settings.sink_filter or None,
            seed=settings.seed,
            folder=settings.out,
            overwrite=settings.overwrite,
            progress=progress,
        )
    return settings.finish(result, settings.out)


def run() -> None:
    """The command line of `scripts/probe_saes.py`."""
    command.run(ProbingOptions, main)

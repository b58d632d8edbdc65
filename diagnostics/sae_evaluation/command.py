"""Evaluation of SAEs: reconstruction, sparsity, the model's loss with them spliced in, alignment."""

from dataclasses import dataclass

from diagnostics.commands import command
from diagnostics.commands.inputs import SplicePath, short_names
from diagnostics.commands.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt
from diagnostics.commands.sae_inputs import HeldOutTextOptions, SAEOptions
from interventions.errors import MechdiagError


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(command.OutputOptions, SAEOptions, HeldOutTextOptions):
    """How well do SAEs reconstruct activations, and how does the model behave with them spliced in?

    Measures variance explained, L0, dead latents, KL and CE scores, norms, by quartile of the activation's norm, with and without
    sinks, and the alignment of each latent's encoder and decoder. All SAEs are of one model, each at its own site. Writes a table
    and a table of latents (Parquet), its tokens, a summary with provenance (JSON) and the figures into --out.

    Examples:
      scripts/evaluate_saes.py --saes smollm2-135m/15/standard smollm2-135m/15/cosine --out results/saes
      scripts/evaluate_saes.py --saes results/saes/15/standard --prompts-second sotu --out results/mine
    """

    prompts_second: str = "none"
    """the same on a second text, or none"""
    on_training_text: bool = False
    """read the other paragraphs, those that SAEs were trained on"""
    n_prompts: PositiveInt = 200
    """prompts sampled from each text"""
    splice_prompts: NonNegativeInt = 50
    """number of these, the first, that are also run with each SAE's output spliced into the residual stream (0: all)"""
    sink_filter: NonNegativeFloat = 10.0
    """tokens with ||x|| above this many times the site's median are sinks: all is measured with and without them (0: with them)"""
    skip_first: NonNegativeInt = 1
    """first tokens of each prompt to drop along with the sinks"""
    splice_sinks: bool = False
    """without sinks: let the SAE's output replace them too, uncounted (by default they stay as they are)"""
    path: SplicePath = "auto"
    """auto (the blocks above a site, checked against full forward passes), blocks, or hooks (full forward passes)"""
    seed: NonNegativeInt = 0
    """of the order in which prompts are sampled"""

    def check(self) -> None:
        """Validate options before loading the model. Raises `MechdiagError`."""
        from diagnostics.sae_evaluation.result import SAEEvaluation
        from interventions.files import claim_folder

        if not self.saes:
            raise MechdiagError("--saes is empty; name at least one")
        if self.on_training_text and not self.held_out:
            raise MechdiagError("--on-training-text needs --held-out above 0, the share that was not trained on")
        self.check_model()
        claim_folder(self.out, SAEEvaluation.files(), self.overwrite)

    def corpora(self) -> list[str]:
        """The texts, each once."""
        return list(dict.fromkeys([self.prompts] + [self.prompts_second] * (self.prompts_second != "none")))


def main(options: EvaluationOptions) -> command.Document:
    """Run the command."""
    from diagnostics.sae_evaluation.run import evaluate_saes
    from interventions.texts.held_out import split
    from interventions.texts.prompts import Prompts, load_texts

    options.check()
    saes = options.load_saes()
    texts = {name: load_texts(name) for name in options.corpora()}
    if options.held_out:
        parts = {name: split(text, options.held_out) for name, text in texts.items()}
        texts = {name: part[0 if options.on_training_text else 1] for name, part in parts.items()}
    model = options.load_model()
    prompts: dict[str, Prompts] = {
        name: options.tokenized(text, model, options.seed)
        for name, text in zip(short_names(tuple(texts)), texts.values(), strict=True)
    }
    how = options.named("sink_filter", "skip_first", "splice_sinks", "path")
    how["splice_prompts"] = options.splice_prompts or None
    return options.measure("splicing", "prompt", evaluate_saes, model, prompts, saes, **how)


def run() -> None:
    """The command line of `scripts/evaluate_saes.py`."""
    command.run(EvaluationOptions, main)

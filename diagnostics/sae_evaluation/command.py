"""Sparse autoencoders judged: reconstruction, sparsity, what the model does with them in its stream, alignment."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from diagnostics.commands import command
from diagnostics.commands.inputs import ModelInputs, short_names
from diagnostics.commands.sae_inputs import HeldOutText
from diagnostics.sae_evaluation.result import SAEEvaluation
from diagnostics.sae_evaluation.run import evaluate_saes
from interventions.errors import MechdiagError
from interventions.files import claim_folder
from interventions.models.loading import resolve_device
from interventions.spliced import PATHS
from interventions.texts.held_out import split
from interventions.texts.prompts import Prompts, load_texts
from sae_models.loading import load_sae


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(command.Output, ModelInputs, HeldOutText):
    """How well do SAEs stand for the activations they read?

    Measures variance explained, L0, dead latents, KL and CE scores, norms, by quartile of the activation's norm, with and without
    sinks, and the alignment of each latent's encoder and decoder. All SAEs are of one model, each at its own site. Writes a table
    and a table of latents (Parquet), its tokens, a summary with provenance (JSON) and the figures into --out.

    Examples:
      scripts/evaluate_saes.py smollm2-135m/15/standard smollm2-135m/15/cosine --out results/saes
      scripts/evaluate_saes.py results/saes/15/standard --prompts-second sotu --out results/mine
    """

    saes: Annotated[tuple[str, ...], tyro.conf.Positional]
    """folders or files, names in the zoo, or hf:owner/name/folder"""
    prompts_second: str = "none"
    """the same on another text, or none"""
    on_training_text: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """read the other paragraphs, those that SAEs were trained on"""
    n_prompts: int = 200
    """prompts drawn from each text"""
    splice_prompts: int = 50
    """so many of them, the first, also pass through the model with each SAE's output in its stream (0: all)"""
    sink_filter: float = 10.0
    """tokens with ||x|| above this many times the site's median are sinks: all is measured with and without them (0: with them)"""
    skip_first: int = 1
    """first tokens of each prompt that are left out with the sinks"""
    splice_sinks: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """without sinks: let the SAE's output replace them too, uncounted (they stay as they are otherwise)"""
    path: str = "auto"
    """auto (the blocks above a site, checked against full forward passes), blocks, or hooks (full forward passes)"""
    seed: int = 0
    """of the order in which prompts are drawn"""

    def check(self) -> None:
        """What can be wrong without a model. Raises `MechdiagError`."""
        if not self.saes:
            raise MechdiagError("no SAE; name at least one folder, file or name in the zoo")
        if self.path not in PATHS:
            raise MechdiagError(f"unknown path {self.path!r}; known: {', '.join(PATHS)}")
        self.check_share()
        if self.splice_prompts < 0 or self.sink_filter < 0:
            raise MechdiagError(
                f"--splice-prompts {self.splice_prompts}, --sink-filter {self.sink_filter}; expected numbers from 0"
            )
        if self.on_training_text and not self.held_out:
            raise MechdiagError(
                "--on-training-text leaves out what --held-out keeps; give a share above 0, or leave it out"
            )
        self.check_model()
        claim_folder(self.out, SAEEvaluation.files(), self.overwrite)

    def corpora(self) -> list[str]:
        """The texts asked for, each once."""
        return list(dict.fromkeys([self.prompts] + [self.prompts_second] * (self.prompts_second != "none")))


def main(settings: EvaluationOptions) -> command.Document:
    """Everything that can be wrong with the input is looked at before the model runs."""
    settings.check()
    names, device = short_names(settings.saes), resolve_device(settings.device)
    saes = dict(zip(names, (load_sae(path, device=device) for path in settings.saes), strict=True))
    texts = {name: load_texts(name) for name in settings.corpora()}
    if settings.held_out:
        parts = {name: split(text, settings.held_out) for name, text in texts.items()}
        texts = {name: part[0 if settings.on_training_text else 1] for name, part in parts.items()}
    model = settings.load_model()
    prompts: dict[str, Prompts] = {
        name: settings.tokenized(text, model, settings.seed)
        for name, text in zip(short_names(tuple(texts)), texts.values(), strict=True)
    }
    with settings.progress("splicing", unit="prompt") as progress:
        result = evaluate_saes(
            model,
            prompts,
            saes,
            sink_filter=settings.sink_filter or None,
            skip_first=settings.skip_first,
            splice_prompts=settings.splice_prompts or None,
            splice_sinks=settings.splice_sinks,
            path=settings.path,
            progress=progress,
        )
    return settings.finish(result, settings.out)


def run() -> None:
    """The command line of `scripts/evaluate_saes.py`."""
    command.run(EvaluationOptions, main)

"""Sparse autoencoders of several sites, trained on one pass over a text."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from diagnostics.commands import command
from diagnostics.commands.inputs import ModelInputs
from interventions.errors import MechdiagError
from interventions.sites import POINTS, Site
from interventions.texts.held_out import split
from interventions.texts.prompts import load_texts, tokenize
from sae_models.architectures import named
from sae_models.training.from_model import SAESpec, train_saes
from sae_models.training.trainer import Recipe


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(command.Spoken, ModelInputs):
    """Trains sparse autoencoders on a model's activations: any number of them, at any sites, from one pass over the text.

    The model's pass stops after the deepest site. Interrupted, the same command goes on where the last checkpoint was (on a CPU bit
    for bit).
    Writes each SAE into OUT/<layer>/<name> (SAELens loads those of standard shape), metrics.jsonl and a manifest beside them.

    Examples:
      scripts/train_sae.py --layers 15 --saes standard cosine --out results/saes
      scripts/train_sae.py --layers 7 15 22 --saes aligned:topk --tokens 5000000 \\
          --out results/more
    """

    out: Path
    """folder for the SAEs, their metrics and the checkpoint"""
    saes: tuple[str, ...] = ("standard",)
    """standard, cosine (base + delta), cosine-global, cosine-group4, cosine-feature, cosine-pure, bypass, aligned, tied, …, each
    with :relu, :topk or :batchtopk (the default) behind it"""
    layers: tuple[int, ...] = (15,)
    """blocks, 0-based"""
    sites: tuple[str, ...] = ("resid_post",)
    """where in each block: resid_pre, attn_out, mlp_out, resid_post; or single sites such as 15.mlp_out"""
    seeds: tuple[int, ...] = ()
    """of the first weights, an SAE for each (default: --seed alone)"""
    recipe: Recipe = field(default_factory=lambda: Recipe(d_sae=2304))
    """how each SAE is trained"""
    layer_norm: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """layer-normalise each input first, as in arXiv:2406.04093"""
    tokens: int = 1_000_000
    """tokens of the run; the text is gone through again when it has fewer"""
    batch_tokens: int = 1024
    """tokens a step"""
    buffer_tokens: int = 131_072
    """tokens that are shuffled together (a run of fewer: about as many as it needs)"""
    prompts: str = "boolq"
    """boolq (packaged Wikipedia paragraphs), sotu, a .txt, .jsonl or .csv file, or hf:owner/name[:split:column]"""
    held_out: float = 0.1
    """share of the paragraphs that is kept for evaluation (0: none)"""
    max_length: int = 256
    """tokens a prompt is cut at"""
    sink_filter: float = 10.0
    """drop tokens with ||x|| above this many times the median at some site (0: keep them)"""
    skip_first: int = 1
    """leave out so many first tokens of each prompt: attention sinks sit there"""
    autocast: str = "auto"
    """bfloat16 in the model's pass: auto (where the hardware multiplies matrices of it), bfloat16, none"""
    order_seed: int = 0
    """of the order of the text"""
    log_every: int = 50
    """steps between lines of metrics"""
    checkpoint_every: int | None = None
    """steps between checkpoints (default: a twentieth of the run)"""

    def wanted(self) -> dict[str, SAESpec]:
        """The SAEs asked for, by the folder they go to."""
        points = [name for name in self.sites if name in POINTS]
        places = [Site(layer, point) for point in points for layer in self.layers]
        places += [Site.parse(name) for name in self.sites if name not in POINTS]
        for what, given in (("--saes", self.saes), ("--layers", self.layers), ("--seeds", self.seeds)):
            if len(set(given)) < len(given):
                raise MechdiagError(f"{what} {' '.join(map(str, given))} names one twice; name each once")
        normalise = "layer_norm" if self.layer_norm else "none"
        return {
            folder_of(site, name, seed): SAESpec(
                site, replace(named(name), normalise=normalise), replace(self.recipe, seed=seed)
            )
            for site in places
            for name in self.saes
            for seed in self.seeds or (self.recipe.seed,)
        }


def folder_of(site: Site, name: str, seed: int = 0) -> str:
    """`15/standard`, `15.mlp_out/aligned-topk`, `15/standard-seed1`."""
    where = str(site.layer) if site.point == "resid_post" else str(site)
    return f"{where}/{name.replace(':', '-')}" + (f"-seed{seed}" if seed else "")


def main(settings: TrainingOptions) -> command.Document:
    """Everything that can be wrong with the input is looked at before the model runs."""
    settings.check_model()
    wanted = settings.wanted()
    if not 0 <= settings.held_out < 1:
        raise MechdiagError(f"--held-out {settings.held_out}; expected a share from 0 (none) to below 1")
    texts = load_texts(settings.prompts)
    if settings.held_out:
        texts, _ = split(texts, settings.held_out)
    model = settings.load_model()
    prompts = tokenize(texts, model.tokenizer, max_length=settings.max_length, seed=settings.order_seed)
    with settings.progress(f"training {len(wanted)} SAEs", unit="step") as progress:
        saes = train_saes(
            model,
            prompts,
            wanted,
            tokens=settings.tokens,
            batch_tokens=settings.batch_tokens,
            buffer_tokens=settings.buffer_tokens,
            sink_filter=settings.sink_filter or None,
            skip_first=settings.skip_first,
            autocast=settings.autocast,
            seed=settings.order_seed,
            folder=settings.out,
            log_every=settings.log_every,
            checkpoint_every=settings.checkpoint_every,
            progress=progress,
        )
    found = {name: sae.metadata["training"] for name, sae in saes.items()}
    for name, said in found.items():
        settings.say(f"{name:30} FVE {said['fve']:.3f}   L0 {said['l0']:5.1f}   dead {said['dead']:.1%}")
    settings.say(f"wrote {len(saes)} SAEs into {settings.out}")
    return {"saes": found, "out": str(settings.out), "files": list(saes)}


def run() -> None:
    """The command line of `scripts/train_sae.py`."""
    command.run(TrainingOptions, main)

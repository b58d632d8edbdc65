"""Training of sparse autoencoders at several sites, from one pass over a text."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from diagnostics.commands import command
from diagnostics.commands.inputs import ModelOptions
from diagnostics.commands.ranges import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PromptLength,
    ShareBelowOne,
)
from interventions.errors import MechdiagError, count
from interventions.sites import POINTS, Site
from sae_models.training.recipe import Recipe

if TYPE_CHECKING:
    from sae_models.training.from_model import SAESpec


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(command.CommonOptions, ModelOptions):
    """Trains sparse autoencoders on a model's activations: any number of them, at any sites, from one pass over the text.

    Several values of --d-sae, --k, --l1 or --l0 train a sweep: one SAE for each, on identical batches, in folders such as
    15/standard-k16 or 15/standard-d1152-k16. The model's pass stops after the deepest site. After an interruption the same command goes on from the last checkpoint
    (bit for bit on a CPU). Writes each SAE into OUT/<layer>/<name> (SAELens loads those of standard architecture), and
    metrics.jsonl, its figure (training) and a manifest beside them.

    Examples:
      scripts/train_sae.py --layers 15 --saes standard cosine --out results/saes
      scripts/train_sae.py --layers 15 --saes standard cosine --k 16 32 64 --out results/sweep
      scripts/train_sae.py --layers 15 --saes standard:topk --d-sae 576 1152 2304 --k 16 32 --out results/grid
      scripts/train_sae.py --layers 7 15 22 --saes aligned:topk --tokens 5000000 \\
          --out results/more
      scripts/train_sae.py --plan scripts/plans/polarity.txt --sites 15.mlp_out --out results/more
    """

    out: Path
    """folder for the SAEs, their metrics and the checkpoint"""
    saes: tuple[str, ...] = ("standard",)
    """standard, cosine (base + delta), cosine-global, cosine-group4, cosine-feature, cosine-pure, bypass, aligned, tied, …, each
    followed by a selector: :batchtopk (the default), :topk, :relu, …; jumprelu, abstopk, gated, signed-gated, signed-gated-tied"""
    plan: Path | None = None
    """a text file of SAEs to train together, in place of --saes: each line has options that concern SAEs, such as --saes gated
    --d-sae 2304 --l1 0.1 0.2; lines that begin with # are remarks"""
    name: str = ""
    """of one kind of SAE in its folder, in place of what --saes calls it"""
    layers: tuple[NonNegativeInt, ...] = (15,)
    """blocks, 0-based"""
    sites: tuple[str, ...] = ("resid_post",)
    """where in each block: resid_pre, attn_out, mlp_out, resid_post; or single sites such as 15.mlp_out"""
    seeds: tuple[NonNegativeInt, ...] = ()
    """of the initial weights, one SAE for each (default: --seed alone)"""
    d_sae: tuple[int, ...] = (2304,)
    """number of latents, one SAE for each value"""
    k: tuple[PositiveFloat, ...] = (32.0,)
    """active latents a token (BatchTopK: on average), one SAE for each value; of topk, batchtopk and abstopk"""
    l1: tuple[NonNegativeFloat, ...] = (0.1,)
    """weight of the L1 penalty, one SAE for each value; of relu and gates"""
    l0: tuple[NonNegativeFloat, ...] = (0.001,)
    """weight of the penalty on each active latent, one SAE for each value; of jumprelu"""
    recipe: Recipe = field(default_factory=lambda: Recipe(d_sae=2304))
    """how each SAE is trained"""
    layer_norm: bool = False
    """layer-normalise each input first, as in arXiv:2406.04093"""
    tokens: PositiveInt = 1_000_000
    """training tokens; a shorter text is repeated"""
    batch_tokens: PositiveInt = 1024
    """tokens in one step"""
    buffer_tokens: PositiveInt = 131_072
    """tokens that are shuffled together (a shorter run: about as many as it needs)"""
    prompts: str = "boolq"
    """boolq (packaged Wikipedia paragraphs), sotu, a .txt, .jsonl or .csv file, or hf:owner/name[:split:column]"""
    held_out: ShareBelowOne = 0.1
    """share of the paragraphs to hold out for evaluation (0: none)"""
    max_length: PromptLength = 256
    """truncate prompts to this many tokens"""
    sink_filter: NonNegativeFloat = 10.0
    """drop tokens with ||x|| above this many times the median at any site (0: keep them)"""
    skip_first: NonNegativeInt = 1
    """first tokens of each prompt to drop: they are often attention sinks"""
    autocast: Literal["auto", "bfloat16", "none"] = "auto"
    """bfloat16 in the model's pass: auto (if the hardware multiplies bfloat16 matrices), bfloat16, none"""
    order_seed: NonNegativeInt = 0
    """of the order of the text"""
    log_every: PositiveInt = 50
    """steps between lines of metrics"""
    checkpoint_every: PositiveInt | None = None
    """steps between checkpoints to resume from (default: a twentieth of the run)"""
    workers: PositiveInt | None = None
    """processes that share the SAEs, one thread each, on a GPU each where there are as many; this one runs the model
    (pip install 'mechdiag[ray]')"""
    ray: str | None = None
    """HOST:PORT of a Ray cluster, or auto: run --workers there (default: one on every GPU, or CPU)"""
    keep_every: PositiveInt | None = None
    """steps between copies of each SAE that stay, in its folder's tokens-<n> (default: keep none)"""

    def wanted(self) -> dict[str, SAESpec]:
        """The SAEs to train, by folder."""

        if self.plan is None:
            return self._swept()
        own = [name for name in _OF_SAES if getattr(self, name) != getattr(type(self)(out=self.out), name)]
        if own:
            raise MechdiagError(f"--{own[0].replace('_', '-')} beside --plan; expected it in the lines of {self.plan}")
        found: dict[str, SAESpec] = {}
        for number, line in _lines(self.plan):
            try:
                some = self._planned(shlex.split(line))
            except (MechdiagError, ValueError) as error:
                raise MechdiagError(f"{self.plan}, line {number}: {error}") from error
            if twice := found.keys() & some.keys():
                raise MechdiagError(
                    f"{self.plan}, line {number}: {min(twice)} is there already; give one another --name"
                )
            found |= some
        if not found:
            raise MechdiagError(f"{self.plan} names no SAE; expected lines such as --saes gated --l1 0.1 0.2")
        return found

    def _planned(self, words: list[str]) -> dict[str, SAESpec]:
        """The SAEs of a plan's line."""
        line = command.parsed_line(type(self), [*words, "--out", str(self.out)])
        fixed = type(self)(out=self.out)
        others = [f.name for f in fields(self) if f.name not in _OF_SAES]
        if others := [name for name in others if getattr(line, name) != getattr(fixed, name)]:
            raise MechdiagError(f"--{others[0].replace('_', '-')} concerns the whole run; give it to the command")
        return replace(line, sites=self.sites, layers=self.layers)._swept()

    def _swept(self) -> dict[str, SAESpec]:
        from sae_models.architectures import SELECTORS, named
        from sae_models.training.from_model import SAESpec

        if self.name and len(self.saes) != 1:
            raise MechdiagError(f"--name {self.name} for --saes {' '.join(self.saes)}; expected one kind of SAE")
        points = [name for name in self.sites if name in POINTS]
        places = [Site(layer, point) for point in points for layer in self.layers]
        places += [Site.parse(name) for name in self.sites if name not in POINTS]
        swept = {"--k": self.k, "--l1": self.l1, "--l0": self.l0}
        listed = {"--saes": self.saes, "--layers": self.layers, "--seeds": self.seeds, "--d-sae": self.d_sae}
        for what, given in (listed | swept).items():
            if len(set(given)) < len(given):
                raise MechdiagError(f"{what} {' '.join(map(str, given))} names one twice; name each once")
        normalise = "layer_norm" if self.layer_norm else "none"
        kinds = {name: replace(named(name), normalise=normalise) for name in self.saes}
        sweeps = {name: SELECTORS[kind.selector] for name, kind in kinds.items()}
        for what, given in swept.items():
            if not given or (len(given) > 1 and what[2:] not in sweeps.values()):
                values = f"{what} {' '.join(f'{value:g}' for value in given)}".strip()
                raise MechdiagError(
                    f"{values} for --saes {' '.join(self.saes)}; expected one value, or several and an SAE that they train "
                    "(--k: topk, batchtopk, abstopk; --l1: relu and gates; --l0: jumprelu)"
                )
        if not self.d_sae:
            raise MechdiagError("--d-sae has no value; expected at least one number of latents")
        base = replace(self.recipe, k=self.k[0], l1=self.l1[0], l0=self.l0[0])
        wide = len(self.d_sae) > 1
        return {
            folder_of(
                site, self.name or name, seed, d_sae if wide else None, **({sweep: value} if len(values) > 1 else {})
            ): SAESpec(site, kinds[name], replace(base, seed=seed, d_sae=d_sae, **{sweep: value}))
            for site in places
            for name, sweep in sweeps.items()
            for d_sae in self.d_sae
            for values in (swept[f"--{sweep}"],)
            for value in values
            for seed in self.seeds or (self.recipe.seed,)
        }


_OF_SAES = ("saes", "name", "seeds", "d_sae", "k", "l1", "l0", "recipe", "layer_norm")
"""Options that may differ between the SAEs of a run."""


def _lines(plan: Path) -> list[tuple[int, str]]:
    """The lines of a plan that are no remarks, with their numbers."""
    try:
        lines = plan.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise MechdiagError(
            f"{plan} cannot be read ({error}); expected a text file, a line for each group of SAEs"
        ) from error
    return [(n, line) for n, line in enumerate(lines, 1) if line.strip() and not line.lstrip().startswith("#")]


def folder_of(site: Site, name: str, seed: int = 0, d_sae: int | None = None, **sparsity: float) -> str:
    """`15/standard`, `15.mlp_out/aligned-topk`, `15/standard-seed1`; in a sweep `15/standard-k16`, `15/standard-d1152-k16`,
    `15/standard-relu-l1_0.05`."""
    import numpy as np

    where = str(site.layer) if site.point == "resid_post" else str(site)
    name += "" if d_sae is None else f"-d{d_sae}"
    swept = [f"-{what}{'_' * (what != 'k')}{np.format_float_positional(x, trim='-')}" for what, x in sparsity.items()]
    return f"{where}/{name.replace(':', '-')}{''.join(swept)}" + (f"-seed{seed}" if seed else "")


def main(options: TrainingOptions) -> command.Document:
    """Run the command; options are validated before the model is loaded."""
    from diagnostics.figures.files import save_figures
    from diagnostics.figures.training import plot_training, training_metrics
    from diagnostics.running.workers import workers
    from interventions.files import made, remove_partial
    from interventions.texts.held_out import split
    from interventions.texts.prompts import load_texts, tokenize
    from sae_models.training.from_model import train_saes
    from sae_models.training.runs import RUN

    options.check_model()
    wanted = options.wanted()
    folder = made(options.out)
    figure = folder / "training.png"
    if figure.exists() and not (folder / RUN).exists():
        raise MechdiagError(
            f"{figure} is there, and no {RUN} that says which run drew it; give another folder, or move it"
        )
    texts = load_texts(options.prompts)
    if options.held_out:
        texts, _ = split(texts, options.held_out)
    model = options.load_model()
    prompts = tokenize(texts, model.tokenizer, max_length=options.max_length, seed=options.order_seed)
    names = (
        "tokens",
        "batch_tokens",
        "buffer_tokens",
        "sink_filter",
        "skip_first",
        "autocast",
        "log_every",
        "checkpoint_every",
        "keep_every",
    )
    with (
        workers(options.workers, ray=options.ray) as pool,
        options.progress(f"training {len(wanted)} SAEs", unit="step") as progress,
    ):
        saes = train_saes(
            *(model, prompts, wanted),
            team=None if pool is None else pool.team(),
            seed=options.order_seed,
            folder=options.out,
            progress=progress,
            **options.named(*names),
        )
    found = {name: sae.metadata["training"] for name, sae in saes.items()}
    say_training(options, found)
    remove_partial(options.out)  # of a run that was killed as it drew
    figures = save_figures(options.out, {"training": plot_training(training_metrics(options.out))})
    kept = f" (and as they were every {options.keep_every} steps)" if options.keep_every else ""
    options.say(f"wrote {count(len(saes), 'SAE')}{kept} and {', '.join(figures)} into {options.out}")
    return {"saes": found, "out": str(options.out), "files": [*saes, *figures]}


def say_training(options: command.CommonOptions, found: dict[str, dict[str, float]]) -> None:
    """One line for each trained SAE: variance explained, L0, share of dead latents."""
    for name, said in found.items():
        options.say(f"{name:30} FVE {said['fve']:.3f}   L0 {said['l0']:5.1f}   dead {said['dead']:.1%}")


def run() -> None:
    """The command line of `scripts/train_sae.py`."""
    command.run(TrainingOptions, main)

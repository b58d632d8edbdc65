"""The scaling law of a grid of SAEs in width and active latents, trained on one stream, and the largest width predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diagnostics.commands import command
from diagnostics.commands.inputs import ModelOptions, SplicePath
from diagnostics.commands.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, PromptLength
from diagnostics.commands.sae_inputs import HeldOutTextOptions
from interventions.errors import MechdiagError
from interventions.sites import Site

if TYPE_CHECKING:
    from interventions.models.causal_model import CausalModel
    from sae_models.sae import SAE
    from sae_models.training.from_model import SAESpec


@dataclass(frozen=True, kw_only=True)
class ScalingOptions(command.OutputOptions, ModelOptions, HeldOutTextOptions):
    """How does an SAE's error fall with its width n and its number of active latents k?

    Trains TopK SAEs of every width and k on one stream (or reads those in --saes), and measures their normalised MSE on
    held-out text. Fits L(n, k) = exp(α + β_k log k + β_n log n + γ log k log n) + exp(ζ + η log k) and two simpler forms, with
    intervals over runs and prompts, and predicts the largest width from the others. At --cells also without AuxK and with
    Multi-TopK, paired by seed. Downstream loss also as the compute of the model's own early exits. Training goes on after an
    interruption. Writes the SAEs into OUT/saes, tables (Parquet), a summary with provenance (JSON) and the figure into --out.

    Examples:
      scripts/scaling_laws.py --out results/scaling
      scripts/scaling_laws.py --d-sae 576 1152 2304 --k 16 32 64 --cells 1152x32 --tokens 1000000 --out results/more
      scripts/scaling_laws.py --saes results/grid --out results/law
    """

    saes: tuple[Path, ...] = ()
    """folders of trained SAEs, in place of training: every SAE in them and below them"""
    layer: NonNegativeInt = 15
    """block, 0-based"""
    point: str = "resid_post"
    """where in it: resid_pre, attn_out, mlp_out, resid_post"""
    d_sae: tuple[PositiveInt, ...] = (144, 288, 576, 1152, 2304, 4608)
    """widths n"""
    k: tuple[PositiveInt, ...] = (8, 16, 32, 64)
    """active latents"""
    cells: tuple[str, ...] = ("1152x32", "2304x16")
    """width x k at which the recipe is also ablated; none: --cells without a value"""
    seeds: tuple[NonNegativeInt, ...] = (0, 1, 2)
    """of the first weights: the grid has the first, --cells have all"""
    tokens: PositiveInt = 524_288
    """training tokens"""
    batch_tokens: PositiveInt = 1024
    """tokens in one step"""
    lr: PositiveFloat = 2e-3
    """of Adam"""
    train_length: PromptLength = 256
    """truncate paragraphs to this many tokens in training"""
    splice_prompts: NonNegativeInt = 50
    """prompts, the first, that are also run with each SAE's output spliced into the residual stream (0: all)"""
    no_exits: bool = False
    """leave out the model's early exits"""
    draws: NonNegativeInt = 300
    """refits of each form and interval"""
    sink_filter: NonNegativeFloat = 10.0
    """drop tokens with ||x|| above this many times the site's median (0: keep them)"""
    skip_first: NonNegativeInt = 1
    """first tokens of each prompt to drop along with the sinks"""
    path: SplicePath = "auto"
    """auto (the blocks above a site, checked against full forward passes), blocks, or hooks (full forward passes)"""
    seed: NonNegativeInt = 0
    """of the order in which prompts are sampled, and of refits"""

    def wanted(self) -> dict[str, SAESpec]:
        """The SAEs to train, by folder. Raises `MechdiagError`."""
        from diagnostics.scaling_laws.grid import specifications
        from sae_models.training.trainer import Recipe

        if not self.held_out:
            raise MechdiagError(
                "--held-out 0 leaves no text to measure on that was not trained on; give a share above 0"
            )
        cells = [_cell(word) for word in self.cells]
        recipe = Recipe(d_sae=self.d_sae[0] if self.d_sae else 1, lr=self.lr)
        return specifications(
            Site(self.layer, self.point), self.d_sae, self.k, recipe=recipe, cells=cells, seeds=self.seeds
        )

    def trained(self, model: CausalModel, wanted: Mapping[str, SAESpec]) -> dict[str, SAE]:
        """The SAEs of OUT/saes, trained where they are not yet."""
        from interventions.texts.held_out import split
        from interventions.texts.prompts import load_texts, tokenize
        from sae_models.training.from_model import train_saes

        texts, _ = split(load_texts(self.prompts), self.held_out)
        prompts = tokenize(texts, model.tokenizer, max_length=self.train_length, seed=0)
        how = self.named("tokens", "batch_tokens", "sink_filter", "skip_first")
        with self.progress(f"training {len(wanted)} SAEs", unit="step") as progress:
            return train_saes(model, prompts, wanted, folder=self.out / "saes", progress=progress, **how)


def _cell(word: str) -> tuple[int, int]:
    parts = word.split("x")
    if len(parts) != 2 or not all(part.isascii() and part.isdecimal() for part in parts):
        raise MechdiagError(f"--cells {word}; expected a width and a k, such as 1152x32")
    return int(parts[0]), int(parts[1])


def read_saes(folders: Sequence[Path], device: str | None) -> dict[str, SAE]:
    """Every SAE in some folders and below them, by its place; not those kept during training. Raises `MechdiagError`."""
    from interventions.models.loading import resolve_device
    from sae_models.loading import saved_sae
    from sae_models.saving import CONFIG

    where, found = resolve_device(device), {}
    for folder in folders:
        places = sorted(path.parent for path in folder.rglob(CONFIG) if not path.parent.name.startswith("tokens-"))
        if not places:
            raise MechdiagError(f"no SAE {str(folder)!r}, nor one below it; expected a folder that train_sae.py wrote")
        above = folder if len(folders) == 1 else folder.parent
        found |= {place.relative_to(above).as_posix(): saved_sae(place).to(where) for place in places}
    return found


def main(options: ScalingOptions) -> command.Document:
    """Run the command."""
    from diagnostics.results.result import result_files
    from diagnostics.scaling_laws.result import ScalingLaws
    from diagnostics.scaling_laws.run import sae_scaling_laws
    from interventions.files import claim_folder

    options.check_model()
    claim_folder(options.out, result_files(ScalingLaws), options.overwrite)
    wanted = {} if options.saes else options.wanted()
    given = read_saes(options.saes, options.device) if options.saes else {}
    texts = options.texts(options.prompts)
    model = options.load_model()
    prompts = options.tokenized(texts, model, options.seed)  # before training: it may be too few
    saes = given or options.trained(model, wanted)
    how = options.named("draws", "sink_filter", "skip_first", "path", "seed")
    how |= {"splice_prompts": options.splice_prompts or None, "exits": not options.no_exits}
    return options.measure("splicing", "prompt", sae_scaling_laws, model, prompts, saes, **how)


def run() -> None:
    """The command line of `scripts/scaling_laws.py`."""
    command.run(ScalingOptions, main)

"""The causal atlas: every active latent of every token removed once, exactly, beside the cheap scores that could have told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from diagnostics.atlas.result import CausalAtlas
from diagnostics.atlas.run import causal_atlas
from diagnostics.commands import command
from diagnostics.commands.sae_inputs import SAEInputs
from diagnostics.results.result import load_result
from interventions.errors import MechdiagError
from interventions.files import claim_folder


@dataclass(frozen=True, kw_only=True)
class AtlasOptions(SAEInputs):
    """What does removing each active latent of an SAE at each token do, and which cheap attribution can be trusted?

    Subtracts z_i d_i, the SAE's error kept, for every latent active at every token, and measures KL(clean || ablated) in nats, its
    direct part and the most likely token, beside activation, dose, angle, direct logit attribution, gradient attribution, integrated
    gradients and a sampled Fisher form. Writes the table in shards (Parquet, --out/atlas), its tokens, schema and summary with
    provenance (JSON) and the calibration figure. Interrupted, the same command goes on where it was.

    Examples:
      scripts/atlas.py --layers 15 --out results/atlas
      scripts/atlas.py --results results/atlas7 results/atlas15 --out results/atlases
    """

    results: tuple[Path, ...] = ()
    """folders of finished atlases to be joined into one (of other SAEs, or depths); nothing is ablated then"""

    saes: tuple[str, ...] = ("standard",)
    """folders, files, names in the zoo, hf:owner/name/folder; or kinds of the packaged zoo, such as cosine, of each of --layers"""
    n_prompts: int = 160
    """prompts drawn from the text"""
    path_share: float = 0.1
    """share of the tokens that also get integrated gradients and the sampled Fisher form; scores are compared on these"""
    steps: int = 6
    """points of the path of integrated gradients"""
    samples: int = 4
    """next tokens drawn for the Fisher form"""
    placebo_share: float = 0.05
    """share of the rows that also get a random edit of the same norm and angle"""
    context: Annotated[str, tyro.conf.Suppress] = "in_place"
    null_model: Annotated[str, tyro.conf.Suppress] = "none"
    null_seeds: Annotated[int, tyro.conf.Suppress] = 3

    def check(self, files: tuple[str, ...]) -> None:
        """What can be wrong without a model. Raises `MechdiagError`."""
        if self.context != "in_place" or self.null_model != "none":
            raise MechdiagError("an atlas is of the model in context: leave context and null_model as they are")
        if self.results:
            if self.out.resolve() in {folder.resolve() for folder in self.results}:
                raise MechdiagError(f"--out {self.out} is one of --results; name another folder")
            claim_folder(self.out, (*files, "run.json"), self.overwrite)
        super().check(files)


def main(settings: AtlasOptions) -> command.Document:
    """Everything that can be wrong with the input is looked at before the model runs."""
    settings.check(CausalAtlas.files())
    if settings.results:
        joined = CausalAtlas.joined([load_result(CausalAtlas, folder) for folder in settings.results])
        return settings.finish(joined, settings.out)
    saes = settings.load_saes()
    model, prompts = settings.load()
    with settings.progress("ablating", unit="token") as progress:
        result = causal_atlas(
            model,
            prompts,
            saes,
            sink_filter=settings.sink_filter or None,
            path_share=settings.path_share,
            steps=settings.steps,
            samples=settings.samples,
            placebo_share=settings.placebo_share,
            seed=settings.seed,
            batch_rows=settings.batch_rows,
            path=settings.path,
            folder=settings.out,
            overwrite=settings.overwrite,
            progress=progress,
        )
    return settings.finish(result, settings.out)


def run() -> None:
    """The command line of `scripts/atlas.py`."""
    command.run(AtlasOptions, main)

#!/usr/bin/env python
"""The causal atlas: every active latent of every token removed once, exactly, beside the cheap scores that could have told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from diagnostics import command
from diagnostics.atlas import CausalAtlas, causal_atlas
from diagnostics.results import claim_folder
from diagnostics.sae_inputs import SAEInputs
from interventions.errors import MechdiagError
from interventions.models import resolve_device


@dataclass(frozen=True)
class Settings(SAEInputs):
    """What does removing each active latent of an SAE at each token do, and which cheap attribution can be trusted?

    Subtracts z_i d_i, the SAE's error kept, for every latent active at every token, and measures KL(clean || ablated) in nats, its
    direct part and the most likely token, beside activation, dose, angle, direct logit attribution, gradient attribution, integrated
    gradients and a sampled Fisher form. Writes the table in shards (Parquet, --out/atlas), its tokens, schema and summary with
    provenance (JSON) and the calibration figure. Interrupted, the same command goes on where it was.

    Example: scripts/atlas.py --saes standard --layers 15 --n-prompts 160 --out results/atlas
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


def main(settings: Settings) -> None:
    """Everything that can be wrong with the input is looked at before the model runs."""
    settings.check(CausalAtlas.files())
    if settings.results:
        return _show(CausalAtlas.joined([CausalAtlas.load(folder) for folder in settings.results]), settings.out)
    saes = settings.load_saes(resolve_device(settings.device))
    model, prompts = settings.load()
    with command.Progress("ablating", unit="token") as progress:
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
    _show(result, settings.out)


def _show(result: CausalAtlas, out: Path) -> None:
    print(result.table())
    print(f"wrote {', '.join(result.write(out))} into {out}")


if __name__ == "__main__":
    command.run(Settings, main)

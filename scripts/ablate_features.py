#!/usr/bin/env python
"""Ablate the latents of concepts wherever they fire: what was meant beside what was not, at equal intended effect."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from diagnostics import command
from diagnostics.ablation_arms import ARMS
from diagnostics.concepts import labelled_concepts
from diagnostics.feature_ablations import COUNTS, FeatureAblation, feature_ablation
from diagnostics.inputs import short_names
from diagnostics.latent_ranking import RANKINGS
from diagnostics.results import claim_folder, result_files
from diagnostics.sae_inputs import named_saes
from diagnostics.sae_sites import PATHS
from interventions.errors import MechdiagError
from interventions.labelled import load_labelled
from interventions.models import DEFAULT_MODEL, load_model, resolve_device, resolve_dtype


@dataclass(frozen=True)
class Settings:
    """Does ablating a concept's latents take away the concept and nothing else?

    Ranks the latents of each concept (a class of labelled texts) on half of the texts, subtracts the top N wherever they fire, and
    measures intended and collateral effects on the other half: KL, target logits, probes of the classes. Compared with random active
    latents, with placebos of the same norm and angle, and on request with keeping only the top N. Writes a table (Parquet), its
    tokens, a summary with provenance (JSON) and figures into --out.

    Example: scripts/ablate_features.py --saes standard cosine --layers 15 --data language code --out results/features
    """

    out: Path
    """folder for the results and for finished units of work: the same command goes on where it was interrupted"""
    saes: tuple[str, ...] = ("standard", "cosine")
    """folders, files, names in the zoo, hf:owner/name/folder; or kinds of the packaged zoo, such as cosine, of each of --layers"""
    layers: tuple[int, ...] = (15,)
    """blocks that kinds in --saes are taken of, 0-based; SAEs that are named say themselves where they belong"""
    model: str = DEFAULT_MODEL
    """smollm2-135m (packaged), a folder, or a Hugging Face hub id"""
    data: tuple[str, ...] = ("language", "code")
    """labelled texts: topics, toxicity, sentiment, language, code (packaged), or .csv and .jsonl files with text and label (and group,
    for texts that must stand on one side of the split)"""
    concepts: tuple[str, ...] = ()
    """classes that are asked about (default: all); the other classes still serve as texts without the concept"""
    counts: tuple[int, ...] = COUNTS
    """N: so many of the best latents are ablated"""
    arms: tuple[str, ...] = ARMS[:3]
    """selected, random (active latents of like expected dose, by lot), placebo (same norm and angle, one direction a text), keep (only the
    top N kept: also without any, and at every token)"""
    rankings: tuple[str, ...] = RANKINGS[:1]
    """mean_difference, probe (its weight x mean difference), attribution (of the target logit)"""
    per_class: int = 48
    """texts of each class; half of them rank latents and train probes, half measure"""
    max_length: int = 48
    """tokens a text is cut at"""
    reads: int = 8
    """tokens of a text at which effects are read, drawn by lot (0: all)"""
    sink_filter: float = 10.0
    """leave out tokens with ||x|| above this many times the site's median (0: keep them)"""
    dtype: str = "float32"
    """float32, bfloat16 or float16"""
    device: str | None = None
    """cpu, cuda, cuda:1 (default: cuda where there is one)"""
    batch_tokens: int | None = None
    """tokens in one forward pass (default: 384 on the CPU, 8192 elsewhere)"""
    path: str = "auto"
    """auto (the blocks above a site, checked against full forward passes), blocks, or hooks (full forward passes)"""
    seed: int = 0
    """of texts, their split, reads, random latents and placebos"""
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """replace the results of another run in --out"""

    def check(self) -> None:
        """What can be wrong without a model. Raises `MechdiagError`."""
        for what, asked, known in (("arms", self.arms, ARMS), ("rankings", self.rankings, RANKINGS)):
            wrong = [name for name in asked if name not in known]
            if wrong or not asked:
                raise MechdiagError(f"--{what} {' '.join(wrong)}; known: {', '.join(known)}")
        if self.path not in PATHS:
            raise MechdiagError(f"unknown path {self.path!r}; known: {', '.join(PATHS)}")
        if not self.saes or not self.data or not self.counts or min(self.counts) < 1:
            raise MechdiagError(
                f"--saes {list(self.saes)}, --data {list(self.data)}, --counts {list(self.counts)}; expected some of each, counts from 1"
            )
        if self.per_class < 4 or self.reads < 0 or self.sink_filter < 0:
            raise MechdiagError(
                f"--per-class {self.per_class}, --reads {self.reads}, --sink-filter {self.sink_filter}; expected 4 texts or more, and "
                "numbers from 0"
            )
        resolve_dtype(self.dtype)
        resolve_device(self.device)
        claim_folder(
            self.out, () if (self.out / "run.json").exists() else result_files(FeatureAblation), self.overwrite
        )


def main(settings: Settings) -> None:
    """Everything that can be wrong with the input is looked at before the model runs."""
    settings.check()
    saes = named_saes(settings.saes, settings.layers, settings.model, resolve_device(settings.device))
    labelled = {
        name: load_labelled(where, per_class=4 * settings.per_class, seed=settings.seed)
        for name, where in zip(short_names(settings.data), settings.data, strict=True)
    }
    known = {name for some in labelled.values() for name in some.labels}
    if unknown := [name for name in settings.concepts if name not in known]:
        raise MechdiagError(f"--concepts {' '.join(unknown)}; the texts have: {', '.join(sorted(known))}")
    model = load_model(settings.model, dtype=settings.dtype, device=settings.device)
    if model.tokenizer is None:
        raise MechdiagError(f"model {settings.model!r} has no tokenizer, so it cannot read text; name another")
    texts = {}
    for name, some in labelled.items():
        wanted = [c for c in some.classes if not settings.concepts or c in settings.concepts]
        if wanted:
            texts[name] = labelled_concepts(
                some,
                model.tokenizer,
                classes=wanted,
                per_class=settings.per_class,
                max_length=settings.max_length,
                seed=settings.seed,
            )
    with command.Progress("ablating", unit="text") as progress:
        result = feature_ablation(
            model,
            texts,
            saes,
            counts=settings.counts,
            arms=settings.arms,
            rankings=settings.rankings,
            reads=settings.reads or None,
            sink_filter=settings.sink_filter or None,
            seed=settings.seed,
            batch_tokens=settings.batch_tokens,
            path=settings.path,
            folder=settings.out,
            overwrite=settings.overwrite,
            progress=progress,
        )
    print(result.table())
    print(f"wrote {', '.join(result.write(settings.out))} into {settings.out}")


if __name__ == "__main__":
    command.run(Settings, main)

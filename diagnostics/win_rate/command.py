"""Does KL go with the cosine or with the inner product? The published win rate, its null, its quartiles, and what they are called."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import tyro

from diagnostics.commands import command
from diagnostics.commands.inputs import short_names
from diagnostics.projections.options import ProjectionInputs
from diagnostics.projections.result import ProjectionEffects
from diagnostics.projections.run import projection_effects
from diagnostics.results.result import load_result, result_files
from diagnostics.win_rate.result import WinRateReport
from diagnostics.win_rate.run import win_rate_report
from interventions.errors import MechdiagError
from interventions.files import claim_folder


@dataclass(frozen=True, kw_only=True)
class WinRateOptions(ProjectionInputs):
    """How often does a latent's causal effect correlate more with its cosine than with its inner product?

    Takes the tables of runs of ablate_projections.py (--results), or makes one with the same options, in context and in the one-token
    context. Overall and by quartile of ||x||, beside the same rate of placebos of equal dose, the band that range restriction alone
    predicts, and Simpson labels. Writes tables (Parquet), a summary with provenance (JSON) and two figures into --out.

    Examples:
      scripts/win_rate.py --saes standard cosine --layers 15 --out results/win_rate
      scripts/win_rate.py --results results/projections --out results/win_rate
    """

    results: tuple[Path, ...] = ()
    """folders of ablate_projections.py; without any the ablations are run first, into --out"""
    context: str = "both"
    """in_place (the token's own prompt and position), single_token (the vector as the only token, id 0), or both"""
    signed: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """count r_cos > r_inner as a win, not |r_cos| > |r_inner|"""
    min_tokens: int = 10
    """rows that a latent needs, over all and within a quartile"""
    draws: int = 200
    """tables simulated for the band that range restriction alone predicts"""

    def loaded(self) -> dict[str, ProjectionEffects]:
        """The runs in --results, by the names of their folders. Raises `ResultError`."""
        names = short_names(tuple(map(str, self.results)))
        return {name: load_result(ProjectionEffects, path) for name, path in zip(names, self.results, strict=True)}


def main(settings: WinRateOptions) -> command.Document:
    """Everything that can be wrong with the input is looked at before the model runs."""
    if settings.min_tokens < 3 or settings.draws < 1:
        raise MechdiagError(
            f"--min-tokens {settings.min_tokens}, --draws {settings.draws}; expected 3 or more, and 1 or more"
        )
    if settings.results:
        own = {
            field.name: field.default
            for field in fields(ProjectionInputs)
            if field.name not in ("out", "overwrite", "no_lock", "json", "quiet")
        }
        own["context"] = "both"
        if unused := [name for name, default in own.items() if getattr(settings, name) != default]:
            raise MechdiagError(
                f"--results are judged as they were measured: leave out --{unused[0].replace('_', '-')}"
            )
        claim_folder(settings.out, WinRateReport.files(), settings.overwrite)
        runs = settings.loaded()
    else:
        settings.check((*WinRateReport.files(), *result_files(ProjectionEffects)))
        saes = settings.load_saes()
        model, prompts = settings.load()
        with settings.progress("ablating") as progress:
            run = projection_effects(model, prompts, saes, progress=progress, **settings.asked())
        settings.finish(run, settings.out)
        runs = {settings.out.name: run}
    with settings.progress("fitting", unit="group") as progress:
        report = win_rate_report(
            runs, signed=settings.signed, min_tokens=settings.min_tokens, draws=settings.draws, progress=progress
        )
    return settings.finish(report, settings.out)


def run() -> None:
    """The command line of `scripts/win_rate.py`."""
    command.run(WinRateOptions, main)

"""Does KL follow the cosine or the inner product? The published win rate, its null, and its quartiles with their Simpson labels."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from diagnostics.commands import command
from diagnostics.commands.inputs import Context, short_names
from diagnostics.commands.ranges import PositiveInt, Range
from diagnostics.projections.options import AblationOptions
from interventions.errors import MechdiagError

if TYPE_CHECKING:
    from diagnostics.projections.result import ProjectionEffects


@dataclass(frozen=True, kw_only=True)
class WinRateOptions(AblationOptions):
    """How often does a latent's causal effect correlate more with its cosine than with its inner product?

    Takes the tables of runs of ablate_projections.py (--results), or makes one with the same options, in context and in the one-token
    context. Overall and by quartile of ||x||, beside the same rate of placebos of equal dose, the band that range restriction alone
    predicts, and Simpson labels. Writes tables (Parquet), a summary with provenance (JSON) and two figures into --out.

    Examples:
      scripts/win_rate.py --saes standard cosine --layers 15 --out results/win_rate
      scripts/win_rate.py --results results/projections --out results/win_rate
    """

    results: tuple[Path, ...] = ()
    """finished folders of ablate_projections.py (default: run the ablations first, into --out)"""
    context: Context = "both"
    """in_place (the token's own prompt and position), single_token (the vector as the only token, id 0), or both"""
    signed: bool = False
    """count r_cos > r_inner as a win, not |r_cos| > |r_inner|"""
    min_tokens: Annotated[int, Range(3)] = 10
    """rows that a latent needs, overall and within a quartile"""
    draws: PositiveInt = 200
    """tables simulated for the band that range restriction alone predicts"""

    def loaded(self) -> dict[str, ProjectionEffects]:
        """The runs in --results, by the names of their folders. Raises `ResultError`."""
        from diagnostics.projections.result import ProjectionEffects
        from diagnostics.results.result import load_result

        names = short_names(tuple(map(str, self.results)))
        return {name: load_result(ProjectionEffects, path) for name, path in zip(names, self.results, strict=True)}


def main(options: WinRateOptions) -> command.Document:
    """Run the command."""
    from diagnostics.projections.result import ProjectionEffects
    from diagnostics.projections.run import projection_effects
    from diagnostics.results.result import result_files
    from diagnostics.win_rate.result import WinRateReport
    from diagnostics.win_rate.run import win_rate_report
    from interventions.files import claim_folder

    if options.results:
        _check_unused(options)
        claim_folder(options.out, WinRateReport.files(), options.overwrite)
        runs = options.loaded()
    else:
        options.check((*WinRateReport.files(), *result_files(ProjectionEffects)))
        saes = options.load_saes()
        with_model = (*options.load(), saes)
        with options.progress("ablating") as progress:
            run = projection_effects(*with_model, progress=progress, **options.common())
        options.finish(run, options.out)
        runs = {options.out.name: run}
    how = options.named("signed", "min_tokens", "draws")
    return options.measure("fitting", "group", win_rate_report, runs, **how)


def _check_unused(options: WinRateOptions) -> None:
    """Raise `MechdiagError` for options of the ablations beside --results."""
    output = [field.name for field in fields(command.ResumableOptions)]
    for field in fields(AblationOptions):
        default = "both" if field.name == "context" else field.default
        if field.name not in output and getattr(options, field.name) != default:
            raise MechdiagError(f"--results are already measured; leave out --{field.name.replace('_', '-')}")


def run() -> None:
    """The command line of `scripts/win_rate.py`."""
    command.run(WinRateOptions, main)

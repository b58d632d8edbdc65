"""Draw figures by depth from the results of any command."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from diagnostics.commands import command
from interventions.errors import MechdiagError


@dataclass(frozen=True, kw_only=True)
class DepthFiguresOptions(command.OutputOptions):
    """What changes with depth?

    Draws every figure by depth that the results allow: KL of direction and norm patches beside their placebos, ratios, unit norm, dose
    response, win rate overall and within quartiles, norm exponent, evaluation of SAEs, causal atlas. Results of several models,
    wrappers, texts and SAEs share a panel, one line each; other sites, horizons, doses or samplings get figures of their own. Each
    figure is written as PNG, SVG and PDF, and its values as CSV; the output lists the results that were not drawn.

    Examples:
      scripts/plot_depth.py results --out figures
      scripts/plot_depth.py results/boolq results/sotu --figures direction_norm_ratio --out figures
    """

    results: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """folders of results, searched with their subfolders"""
    figures: tuple[str, ...] = ()
    """direction_norm_kl, direction_norm_ratio, unit_norm, dose_response, win_rate, norm_exponent, sae_evaluation, sae_latents,
    atlas_effects, atlas_scores (default: all that the results allow)"""


def main(options: DepthFiguresOptions) -> command.Document:
    """Run the command."""
    from diagnostics.by_depth.run import depth_figures, found_results
    from diagnostics.saved import PLANS
    from interventions.files import claim_folder

    if not options.results:
        raise MechdiagError("no folder of results; name at least one")
    claim_folder(options.out, [f"{name}.csv" for name in PLANS], options.overwrite)
    found = depth_figures(found_results(options.results), options.figures or None)
    return options.finish(found, options.out)


def run() -> None:
    """The command line of `scripts/plot_depth.py`."""
    command.run(DepthFiguresOptions, main)

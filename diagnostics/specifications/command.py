"""The claims about direction and norm under every combination of text, context, sink filter, metric, comparison and depth."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from diagnostics.commands import command
from diagnostics.commands.inputs import Inputs
from diagnostics.direction_vs_norm.result import DirectionNorm
from diagnostics.direction_vs_norm.run import direction_norm
from diagnostics.results.result import load_result
from diagnostics.running.clean import default_layers
from diagnostics.specifications.run import specification_curve
from interventions.errors import MechdiagError
from interventions.files import claim_folder

FILES = ("specification.parquet", "specification.json")


@dataclass(frozen=True, kw_only=True)
class SpecificationOptions(Inputs):
    """Does "direction matters more than norm, and the more so the deeper" survive the choices behind it?

    Patches direction and norm on every text in --prompts, in both contexts and without a sink filter (kept in --out/TEXT, as
    patch_direction_norm.py would), then forms both claims under every combination of choices. Or takes results of
    patch_direction_norm.py that are already there. Writes a table (Parquet), a summary (JSON) and a figure a claim into --out.

    Examples:
      scripts/specification_curve.py --null-model random --out results/curve
      scripts/specification_curve.py --results results/mine results/other --out results/curve
    """

    results: tuple[Path, ...] = ()
    """folders of patch_direction_norm.py (best run with --sink-filter 0); nothing is patched then"""
    prompts: str = "boolq,sotu"
    """texts with a comma between them; each as in patch_direction_norm.py"""
    context: str = "both"
    """in_place, single_token, or both"""
    sink_filter: float = 0.0
    """0: both choices, with and without; any other value leaves that one alone"""
    pairs: int = 500
    """token pairs of each text, the same at every depth"""


def main(settings: SpecificationOptions) -> command.Document:
    """Everything that can be wrong with the input is looked at before the model runs."""
    if settings.results:
        claim_folder(settings.out, FILES, settings.overwrite)
        _different([folder.name for folder in settings.results], "results")
        found = {folder.name: load_result(DirectionNorm, folder) for folder in settings.results}
    else:
        found = _patched(settings)
    curve = specification_curve(found)
    return settings.finish(curve, settings.out)


def _different(names: list[str], what: str) -> None:
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise MechdiagError(f"two {what} have the name {twice[0]!r}; give each a name of its own")


def _patched(settings: SpecificationOptions) -> dict[str, DirectionNorm]:
    given = settings.prompts.split(",")
    names = [Path(text).stem if "." in text else text.replace(":", "_").replace("/", "_") for text in given]
    _different(names, "texts")
    texts = dict(zip(names, given, strict=True))
    claim_folder(settings.out, (), settings.overwrite)
    begun = all(
        os.path.lexists(settings.out / name / "run.json") for name in names
    )  # then the runs there say whose they are
    claim_folder(settings.out, () if begun else FILES, settings.overwrite)
    runs = {name: replace(settings, out=settings.out / name) for name in texts}
    for run in runs.values():
        run.check(())
    found = {}
    for name, run in runs.items():
        model, prompts = run.load(texts[name])
        sites = run.places(default_layers(model.n_layers))
        with settings.progress(f"patching, {name}") as progress:
            result = direction_norm(
                model, prompts, sites=sites, pairs=run.pairs, pair_sets=("random",), progress=progress, **run.common()
            )
        result.write(run.out, overwrite=settings.overwrite)
        found[name] = result
    return found


def run() -> None:
    """The command line of `scripts/specification_curve.py`."""
    command.run(SpecificationOptions, main)

"""The claims about direction and norm under every combination of text, context, sink filter, metric, comparison and depth."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from diagnostics.commands import command
from diagnostics.commands.inputs import Context, PatchingOptions, check_distinct
from diagnostics.commands.ranges import NonNegativeFloat, PositiveInt

if TYPE_CHECKING:
    from diagnostics.direction_vs_norm.result import DirectionNorm

FILES = ("specification.parquet", "specification.json")


@dataclass(frozen=True, kw_only=True)
class SpecificationOptions(PatchingOptions):
    """Does "direction matters more than norm, and more so at greater depth" hold under other analysis choices?

    Patches direction and norm on every text in --prompts, in both contexts and without a sink filter (kept in --out/TEXT, as
    patch_direction_norm.py would), then tests both claims under every combination of choices. Or takes finished results of
    patch_direction_norm.py. Writes a table (Parquet), a summary (JSON) and one figure for each claim into --out.

    Examples:
      scripts/specification_curve.py --null-model random --out results/curve
      scripts/specification_curve.py --results results/mine results/other --out results/curve
    """

    results: tuple[Path, ...] = ()
    """use these finished folders of patch_direction_norm.py, best run with --sink-filter 0, and patch nothing"""
    prompts: str = "boolq,sotu"
    """texts separated by commas, each as in patch_direction_norm.py"""
    context: Context = "both"
    """in_place, single_token, or both"""
    sink_filter: NonNegativeFloat = 0.0
    """0: both with and without the filter; any other value: with this filter only"""
    pairs: PositiveInt = 500
    """token pairs in each text, the same at every depth"""


def main(options: SpecificationOptions) -> command.Document:
    """Run the command."""
    from diagnostics.direction_vs_norm.result import DirectionNorm
    from diagnostics.results.result import load_result
    from diagnostics.specifications.run import specification_curve
    from interventions.files import claim_folder

    if options.results:
        claim_folder(options.out, FILES, options.overwrite)
        check_distinct([folder.name for folder in options.results], "results")
        found = {folder.name: load_result(DirectionNorm, folder) for folder in options.results}
    else:
        found = _patched(options)
    return options.finish(specification_curve(found), options.out)


def _patched(options: SpecificationOptions) -> dict[str, DirectionNorm]:
    from diagnostics.direction_vs_norm.run import direction_norm
    from diagnostics.running.clean import default_layers
    from diagnostics.running.ends import PartDone
    from interventions.files import claim_folder

    given = options.prompts.split(",")
    names = [Path(text).stem if "." in text else text.replace(":", "_").replace("/", "_") for text in given]
    check_distinct(names, "texts")
    begun = all(os.path.lexists(options.out / name / "run.json") for name in names)  # these say whose run it is
    claim_folder(options.out, () if begun else FILES, options.overwrite)
    runs = {name: replace(options, out=options.out / name) for name in names}
    for run in runs.values():
        run.check(())
    found, part = {}, None
    for (name, run), text in zip(runs.items(), given, strict=True):
        model, prompts = run.load(text)
        sites = run.places(default_layers(model.n_layers))
        with run.progress(f"patching, {name}") as progress:
            how = run.common() | {"pairs": run.pairs, "pair_sets": ("random",)}
            try:
                found[name] = direction_norm(model, prompts, sites=sites, progress=progress, **how)
            except PartDone as kept:  # of this text; the same part of the others is next
                part = kept
                continue
        run.write(found[name], run.out)
    if part is not None:
        raise part
    return found


def run() -> None:
    """The command line of `scripts/specification_curve.py`."""
    command.run(SpecificationOptions, main)

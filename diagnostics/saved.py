"""Results found again: every one that lies in a folder or below it, of whatever kind."""

import os
from collections.abc import Iterator
from pathlib import Path

from diagnostics.atlas import CausalAtlas
from diagnostics.concentration import Concentration
from diagnostics.contests import WinRateReport
from diagnostics.dictionary_comparison import DictionaryComparison
from diagnostics.direction_patching import DirectionNorm
from diagnostics.dosing import DoseResponse
from diagnostics.effect_sparsity import AblationSparsity
from diagnostics.feature_ablations import FeatureAblation
from diagnostics.latent_pairs import Interactions
from diagnostics.projections import ProjectionEffects
from diagnostics.results import Shown
from diagnostics.sae_evaluation import SAEEvaluation
from diagnostics.sparse_probing import SparseProbing
from diagnostics.specification import Specifications
from diagnostics.steering import Steering
from diagnostics.substitution import Substitutions
from diagnostics.unit_norm import UnitNorm
from interventions.errors import ResultError

KINDS: dict[str, type[Shown]] = {
    kind.NAME: kind
    for kind in (
        DirectionNorm, DoseResponse, UnitNorm, Specifications, SAEEvaluation, ProjectionEffects, WinRateReport, CausalAtlas,
        FeatureAblation, SparseProbing, DictionaryComparison, Interactions, Concentration, Steering, Substitutions,
        AblationSparsity,
    )
}  # fmt: skip
"""Every kind of result by the name of its files, in the order in which a report tells them."""
_WORK = "units"


def saved_results(folder: str | Path) -> dict[str, Shown]:
    """Every result in a folder or below it, by its place below the folder; `units/` holds work, no results.

    A result of the folder itself has the folder's name; where one folder holds several kinds, the kind's name follows:
    `win_rate/projections`. Raises `ResultError` for a folder that is not there or holds none, and for one that lacks a file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ResultError(f"no folder {folder}; expected one that holds results")
    found = {}
    for here in _folders(folder):
        kinds = [kind for kind in KINDS.values() if (here / f"{kind.NAME}.json").is_file()]
        place = folder.resolve().name if here == folder else here.relative_to(folder).as_posix()
        for kind in kinds:
            found[place if len(kinds) == 1 else f"{place}/{kind.NAME}"] = kind.load(here)
    if not found:
        begun = "; a run there is unfinished, the same command goes on with it" if unfinished(folder) else ""
        raise ResultError(f"no result in {folder}{begun}. Looked there and below it for {', '.join(KINDS)} (.json)")
    return found


def unfinished(folder: str | Path) -> list[str]:
    """Places below a folder where a run was begun and has no result yet."""
    folder = Path(folder)
    return [
        here.relative_to(folder).as_posix()
        for here in _folders(folder)
        if (here / "run.json").is_file()
        and (here / _WORK).is_dir()
        and not any((here / f"{name}.json").is_file() for name in KINDS)
    ]


def _folders(folder: Path) -> Iterator[Path]:
    """The folder and those below it, in the order of their names; neither hidden ones nor those of units."""
    for here, below, _ in os.walk(folder):
        below[:] = sorted(name for name in below if name != _WORK and not name.startswith("."))
        yield Path(here)

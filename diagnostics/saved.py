"""Every kind of result, and the results found in a folder and below it."""

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from diagnostics.atlas.result import CausalAtlas
from diagnostics.auto_interpretation.result import AutoInterp
from diagnostics.causal_dimension.result import CausalDimension
from diagnostics.coalitions.result import Shapley
from diagnostics.concept_ablation.result import FeatureAblation
from diagnostics.dictionary_comparison.result import DictionaryComparison
from diagnostics.direction_vs_norm.result import DirectionNorm
from diagnostics.disentanglement.result import Disentanglement
from diagnostics.dose.result import DoseResponse
from diagnostics.edges.circuits import Faithfulness
from diagnostics.edges.result import EdgePatching
from diagnostics.figures.by_depth import DepthPlan
from diagnostics.latent_edits.concentration import Concentration
from diagnostics.latent_edits.interactions import Interactions
from diagnostics.latent_edits.polarities import PolarityEffects
from diagnostics.latent_edits.sparsity import AblationSparsity
from diagnostics.latent_edits.steering import Steering
from diagnostics.latent_edits.substitution import Substitutions
from diagnostics.patching.result import ActivationPatching
from diagnostics.polarity.census import BipolarCensus
from diagnostics.polarity.result import Polarity
from diagnostics.probe_perturbation.result import ProbePerturbation
from diagnostics.projections.result import ProjectionEffects
from diagnostics.results.result import BaseResult, load_result, tables_of
from diagnostics.sae_evaluation.result import SAEEvaluation
from diagnostics.scaling_laws.result import ScalingLaws
from diagnostics.sparse_probing.result import SparseProbing
from diagnostics.specifications.result import Specifications
from diagnostics.token_patterns.result import TokenPatterns
from diagnostics.unit_norm.result import UnitNorm
from diagnostics.whole_dictionary.result import DictionaryEffects
from diagnostics.win_rate.result import WinRateReport
from interventions.errors import MechdiagError, ResultError

KINDS: dict[str, type[BaseResult]] = {
    kind.NAME: kind
    for kind in (
        DirectionNorm, DoseResponse, UnitNorm, Specifications, SAEEvaluation, ProjectionEffects, WinRateReport, CausalAtlas,
        DictionaryEffects, FeatureAblation, SparseProbing, DictionaryComparison, ActivationPatching, EdgePatching, Faithfulness, Shapley,
        Interactions, Concentration, Steering, Substitutions,
        AblationSparsity,
        PolarityEffects,
        BipolarCensus,
        Polarity,
        CausalDimension,
        TokenPatterns,
        AutoInterp,
        ScalingLaws,
        Disentanglement,
        ProbePerturbation,
    )
}  # fmt: skip
"""Every kind of result by the name of its files, in the order in which a report tells them."""
PLANS: dict[str, DepthPlan] = {name: plan for kind in KINDS.values() for name, plan in kind.DEPTH.items()}
"""Every figure by depth, by name."""
_WORK = "units"


def saved_results(folder: str | Path) -> dict[str, BaseResult]:
    """Every result in a folder or below it, by its place below the folder; `units/` holds work, no results.

    A result of the folder itself has the folder's name; where one folder holds several kinds, the kind's name follows:
    `win_rate/projections`. A damaged result is left out, with a warning that names it. Raises `ResultError` for a folder that is not
    there and where no result is left.
    """
    found, damaged = sound_and_damaged(folder)
    if not found:
        raise ResultError("; ".join(damaged.values()))
    for place, why in damaged.items():
        warnings.warn(f"{place} is left out: {why}", stacklevel=2)
    return found


def sound_and_damaged(
    folder: str | Path, use: Callable[[BaseResult], object] = tables_of
) -> tuple[dict[str, BaseResult], dict[str, str]]:
    """`saved_results`, and of each damaged result why it cannot be loaded, by its place. use: as in `load_result`.

    Raises `ResultError` for a folder that is not there and for one without a result of either sort.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise ResultError(f"no folder {folder}; expected one that holds results")
    found: dict[str, BaseResult] = {}
    damaged: dict[str, str] = {}
    for here in _folders(folder):
        kinds = [kind for kind in KINDS.values() if os.path.isfile(here / f"{kind.NAME}.json")]
        own = folder.resolve().name if here == folder else here.relative_to(folder).as_posix()
        for kind in kinds:
            place = own if len(kinds) == 1 else f"{own}/{kind.NAME}"
            try:
                found[place] = load_result(kind, here, use)
            except MechdiagError as error:
                damaged[place] = str(error)
    if not (found or damaged):
        begun = "; a run there is unfinished, the same command goes on with it" if unfinished(folder) else ""
        raise ResultError(f"no result in {folder}{begun}. Looked there and below it for {', '.join(KINDS)} (.json)")
    return found, damaged


def unfinished(folder: str | Path) -> list[str]:
    """Places below a folder where a run was begun and has no result yet."""
    folder = Path(folder)
    return [
        here.relative_to(folder).as_posix()
        for here in _folders(folder)
        if os.path.isfile(here / "run.json")
        and os.path.isdir(here / _WORK)
        and not any(os.path.isfile(here / f"{name}.json") for name in KINDS)
    ]


def _folders(folder: Path) -> Iterator[Path]:
    """The folder and those below it, in the order of their names; neither hidden ones nor those of units."""
    for here, below, _ in os.walk(folder):
        below[:] = sorted(name for name in below if name != _WORK and not name.startswith("."))
        yield Path(here)

"""Questions to a model: rows drawn, edits made and measured, compared with matched controls, with intervals."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # at run time each comes with its first use: a command starts without what the others need
    from diagnostics.atlas import CausalAtlas, causal_atlas
    from diagnostics.card_result import LatentCard
    from diagnostics.cards import latent_card, latent_cards
    from diagnostics.concentration import Concentration, causal_concentration
    from diagnostics.contests import WinRateReport, win_rate_report
    from diagnostics.dictionary_comparison import DictionaryComparison, compare_dictionaries
    from diagnostics.direction_patching import DirectionNorm, direction_norm
    from diagnostics.dosing import DoseResponse, dose_response
    from diagnostics.effect_sparsity import AblationSparsity, ablation_sparsity
    from diagnostics.feature_ablations import FeatureAblation, feature_ablation
    from diagnostics.latent_pairs import Interactions, interactions
    from diagnostics.projections import ProjectionEffects, projection_effects
    from diagnostics.report_html import report
    from diagnostics.sae_evaluation import SAEEvaluation, evaluate_saes
    from diagnostics.saved import saved_results
    from diagnostics.sparse_probing import SparseProbing, probe_saes
    from diagnostics.specification import Specifications, specification_curve
    from diagnostics.steering import Steering, latent_steering
    from diagnostics.substitution import Substitutions, atom_substitution
    from diagnostics.unit_norm import UnitNorm, unit_norm_sweep

__all__ = [
    "AblationSparsity",
    "CausalAtlas",
    "Concentration",
    "DictionaryComparison",
    "DirectionNorm",
    "DoseResponse",
    "FeatureAblation",
    "Interactions",
    "LatentCard",
    "ProjectionEffects",
    "SAEEvaluation",
    "SparseProbing",
    "Specifications",
    "Steering",
    "Substitutions",
    "UnitNorm",
    "WinRateReport",
    "ablation_sparsity",
    "atom_substitution",
    "causal_atlas",
    "causal_concentration",
    "compare_dictionaries",
    "direction_norm",
    "dose_response",
    "evaluate_saes",
    "feature_ablation",
    "interactions",
    "latent_card",
    "latent_cards",
    "latent_steering",
    "probe_saes",
    "projection_effects",
    "report",
    "saved_results",
    "specification_curve",
    "unit_norm_sweep",
    "win_rate_report",
]

_HOMES = {
    "AblationSparsity": "effect_sparsity",
    "CausalAtlas": "atlas",
    "Concentration": "concentration",
    "DictionaryComparison": "dictionary_comparison",
    "DirectionNorm": "direction_patching",
    "DoseResponse": "dosing",
    "FeatureAblation": "feature_ablations",
    "Interactions": "latent_pairs",
    "LatentCard": "card_result",
    "ProjectionEffects": "projections",
    "SAEEvaluation": "sae_evaluation",
    "SparseProbing": "sparse_probing",
    "Specifications": "specification",
    "Steering": "steering",
    "Substitutions": "substitution",
    "UnitNorm": "unit_norm",
    "WinRateReport": "contests",
    "ablation_sparsity": "effect_sparsity",
    "atom_substitution": "substitution",
    "causal_atlas": "atlas",
    "causal_concentration": "concentration",
    "compare_dictionaries": "dictionary_comparison",
    "direction_norm": "direction_patching",
    "dose_response": "dosing",
    "evaluate_saes": "sae_evaluation",
    "feature_ablation": "feature_ablations",
    "interactions": "latent_pairs",
    "latent_card": "cards",
    "latent_cards": "cards",
    "latent_steering": "steering",
    "probe_saes": "sparse_probing",
    "projection_effects": "projections",
    "report": "report_html",
    "saved_results": "saved",
    "specification_curve": "specification",
    "unit_norm_sweep": "unit_norm",
    "win_rate_report": "contests",
}
"""The module of each name."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

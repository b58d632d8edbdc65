"""Questions to a model: rows drawn, edits made and measured, compared with matched controls, with intervals that hold."""

from diagnostics.atlas import CausalAtlas, causal_atlas
from diagnostics.cards import LatentCard, latent_card, latent_cards
from diagnostics.concentration import Concentration, causal_concentration
from diagnostics.contests import WinRateReport, win_rate_report
from diagnostics.dictionary_comparison import DictionaryComparison, compare_dictionaries
from diagnostics.direction_patching import DirectionNorm, direction_norm
from diagnostics.dosing import DoseResponse, dose_response
from diagnostics.effect_sparsity import AblationSparsity, ablation_sparsity
from diagnostics.feature_ablations import FeatureAblation, feature_ablation
from diagnostics.latent_pairs import Interactions, interactions
from diagnostics.projections import ProjectionEffects, projection_effects
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
    "feature_ablation",
    "interactions",
    "latent_card",
    "latent_cards",
    "latent_steering",
    "probe_saes",
    "projection_effects",
    "specification_curve",
    "unit_norm_sweep",
    "win_rate_report",
]

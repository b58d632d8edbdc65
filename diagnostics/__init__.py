"""Questions to a model: rows drawn, edits made and measured, compared with matched controls, with intervals."""

from typing import TYPE_CHECKING

from interventions.lazy import handed_on

if TYPE_CHECKING:  # at run time each comes with its first use: a command starts without what the others need
    from diagnostics.atlas.result import CausalAtlas
    from diagnostics.atlas.run import causal_atlas
    from diagnostics.auto_interpretation.result import AutoInterp
    from diagnostics.auto_interpretation.run import autointerp
    from diagnostics.cards.result import LatentCard
    from diagnostics.cards.run import latent_card, latent_cards
    from diagnostics.causal_dimension.result import CausalDimension
    from diagnostics.causal_dimension.run import causal_dimensionality
    from diagnostics.coalitions.result import Shapley
    from diagnostics.coalitions.run import shapley
    from diagnostics.concept_ablation.result import FeatureAblation
    from diagnostics.concept_ablation.run import feature_ablation
    from diagnostics.dictionary_comparison.result import DictionaryComparison
    from diagnostics.dictionary_comparison.run import compare_dictionaries
    from diagnostics.direction_vs_norm.result import DirectionNorm
    from diagnostics.direction_vs_norm.run import direction_norm
    from diagnostics.disentanglement.result import Disentanglement
    from diagnostics.disentanglement.run import disentangle
    from diagnostics.dose.result import DoseResponse
    from diagnostics.dose.run import dose_response
    from diagnostics.edges.circuits import Faithfulness, faithfulness
    from diagnostics.edges.result import EdgePatching
    from diagnostics.edges.run import edge_patching
    from diagnostics.latent_edits.concentration import Concentration, causal_concentration
    from diagnostics.latent_edits.interactions import Interactions, interactions
    from diagnostics.latent_edits.polarities import PolarityEffects, polarity_effects
    from diagnostics.latent_edits.sparsity import AblationSparsity, ablation_sparsity
    from diagnostics.latent_edits.steering import Steering, latent_steering
    from diagnostics.latent_edits.substitution import Substitutions, atom_substitution
    from diagnostics.patching.result import ActivationPatching
    from diagnostics.patching.run import activation_patching
    from diagnostics.polarity.census import BipolarCensus, bipolar_census
    from diagnostics.polarity.result import Polarity
    from diagnostics.polarity.run import polarity_protocols
    from diagnostics.probe_perturbation.result import ProbePerturbation
    from diagnostics.probe_perturbation.run import perturb_probes
    from diagnostics.projections.result import ProjectionEffects
    from diagnostics.projections.run import projection_effects
    from diagnostics.reports.page import report
    from diagnostics.sae_evaluation.result import SAEEvaluation
    from diagnostics.sae_evaluation.run import evaluate_saes
    from diagnostics.saved import saved_results
    from diagnostics.scaling_laws.result import ScalingLaws
    from diagnostics.scaling_laws.run import sae_scaling_laws
    from diagnostics.sparse_probing.result import SparseProbing
    from diagnostics.sparse_probing.run import probe_saes
    from diagnostics.specifications.result import Specifications
    from diagnostics.specifications.run import specification_curve
    from diagnostics.token_patterns.result import TokenPatterns
    from diagnostics.token_patterns.run import n2g
    from diagnostics.unit_norm.result import UnitNorm
    from diagnostics.unit_norm.run import unit_norm_sweep
    from diagnostics.whole_dictionary.result import DictionaryEffects
    from diagnostics.whole_dictionary.run import dictionary_effects
    from diagnostics.win_rate.result import WinRateReport
    from diagnostics.win_rate.run import win_rate_report

__all__ = [
    "AblationSparsity",
    "ActivationPatching",
    "AutoInterp",
    "BipolarCensus",
    "CausalAtlas",
    "CausalDimension",
    "Concentration",
    "DictionaryComparison",
    "DictionaryEffects",
    "DirectionNorm",
    "Disentanglement",
    "DoseResponse",
    "EdgePatching",
    "Faithfulness",
    "FeatureAblation",
    "Interactions",
    "LatentCard",
    "Polarity",
    "PolarityEffects",
    "ProbePerturbation",
    "ProjectionEffects",
    "SAEEvaluation",
    "ScalingLaws",
    "Shapley",
    "SparseProbing",
    "Specifications",
    "Steering",
    "Substitutions",
    "TokenPatterns",
    "UnitNorm",
    "WinRateReport",
    "ablation_sparsity",
    "activation_patching",
    "atom_substitution",
    "autointerp",
    "bipolar_census",
    "causal_atlas",
    "causal_concentration",
    "causal_dimensionality",
    "compare_dictionaries",
    "dictionary_effects",
    "direction_norm",
    "disentangle",
    "dose_response",
    "edge_patching",
    "evaluate_saes",
    "faithfulness",
    "feature_ablation",
    "interactions",
    "latent_card",
    "latent_cards",
    "latent_steering",
    "n2g",
    "perturb_probes",
    "polarity_effects",
    "polarity_protocols",
    "probe_saes",
    "projection_effects",
    "report",
    "sae_scaling_laws",
    "saved_results",
    "shapley",
    "specification_curve",
    "unit_norm_sweep",
    "win_rate_report",
]

_HOMES = {
    "AblationSparsity": "latent_edits.sparsity",
    "ActivationPatching": "patching.result",
    "AutoInterp": "auto_interpretation.result",
    "BipolarCensus": "polarity.census",
    "CausalAtlas": "atlas.result",
    "CausalDimension": "causal_dimension.result",
    "Concentration": "latent_edits.concentration",
    "DictionaryComparison": "dictionary_comparison.result",
    "DictionaryEffects": "whole_dictionary.result",
    "DirectionNorm": "direction_vs_norm.result",
    "Disentanglement": "disentanglement.result",
    "DoseResponse": "dose.result",
    "EdgePatching": "edges.result",
    "Faithfulness": "edges.circuits",
    "FeatureAblation": "concept_ablation.result",
    "Interactions": "latent_edits.interactions",
    "LatentCard": "cards.result",
    "Polarity": "polarity.result",
    "PolarityEffects": "latent_edits.polarities",
    "ProbePerturbation": "probe_perturbation.result",
    "ProjectionEffects": "projections.result",
    "SAEEvaluation": "sae_evaluation.result",
    "ScalingLaws": "scaling_laws.result",
    "Shapley": "coalitions.result",
    "SparseProbing": "sparse_probing.result",
    "Specifications": "specifications.result",
    "Steering": "latent_edits.steering",
    "Substitutions": "latent_edits.substitution",
    "TokenPatterns": "token_patterns.result",
    "UnitNorm": "unit_norm.result",
    "WinRateReport": "win_rate.result",
    "ablation_sparsity": "latent_edits.sparsity",
    "activation_patching": "patching.run",
    "atom_substitution": "latent_edits.substitution",
    "autointerp": "auto_interpretation.run",
    "bipolar_census": "polarity.census",
    "causal_atlas": "atlas.run",
    "causal_concentration": "latent_edits.concentration",
    "causal_dimensionality": "causal_dimension.run",
    "compare_dictionaries": "dictionary_comparison.run",
    "dictionary_effects": "whole_dictionary.run",
    "direction_norm": "direction_vs_norm.run",
    "disentangle": "disentanglement.run",
    "dose_response": "dose.run",
    "edge_patching": "edges.run",
    "evaluate_saes": "sae_evaluation.run",
    "faithfulness": "edges.circuits",
    "feature_ablation": "concept_ablation.run",
    "interactions": "latent_edits.interactions",
    "latent_card": "cards.run",
    "latent_cards": "cards.run",
    "latent_steering": "latent_edits.steering",
    "n2g": "token_patterns.run",
    "perturb_probes": "probe_perturbation.run",
    "polarity_effects": "latent_edits.polarities",
    "polarity_protocols": "polarity.run",
    "probe_saes": "sparse_probing.run",
    "projection_effects": "projections.run",
    "report": "reports.page",
    "sae_scaling_laws": "scaling_laws.run",
    "saved_results": "saved",
    "shapley": "coalitions.run",
    "specification_curve": "specifications.run",
    "unit_norm_sweep": "unit_norm.run",
    "win_rate_report": "win_rate.run",
}
"""The module of each name."""
__getattr__, __dir__ = handed_on(__name__, _HOMES)

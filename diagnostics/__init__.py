"""Questions to a model: rows drawn, edits made and measured, compared with matched controls, with intervals that hold."""

from diagnostics.contests import WinRateReport, win_rate_report
from diagnostics.direction_patching import DirectionNorm, direction_norm
from diagnostics.dosing import DoseResponse, dose_response
from diagnostics.projections import ProjectionEffects, projection_effects
from diagnostics.specification import Specifications, specification_curve
from diagnostics.unit_norm import UnitNorm, unit_norm_sweep

__all__ = [
    "DirectionNorm",
    "DoseResponse",
    "ProjectionEffects",
    "Specifications",
    "UnitNorm",
    "WinRateReport",
    "direction_norm",
    "dose_response",
    "projection_effects",
    "specification_curve",
    "unit_norm_sweep",
    "win_rate_report",
]

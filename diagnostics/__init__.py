"""Questions to a model: rows drawn, edits made and measured, compared with matched controls, with intervals that hold."""

from diagnostics.direction_patching import DirectionNorm, direction_norm
from diagnostics.dosing import DoseResponse, dose_response
from diagnostics.specification import Specifications, specification_curve
from diagnostics.unit_norm import UnitNorm, unit_norm_sweep

__all__ = [
    "DirectionNorm",
    "DoseResponse",
    "Specifications",
    "UnitNorm",
    "direction_norm",
    "dose_response",
    "specification_curve",
    "unit_norm_sweep",
]

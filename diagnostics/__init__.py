"""Questions to a model: rows drawn, edits made and measured, compared with matched controls, with intervals that hold."""

from diagnostics.direction_patching import DirectionNorm, direction_norm

__all__ = ["DirectionNorm", "direction_norm"]

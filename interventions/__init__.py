"""Change one activation of a language model and measure exactly what the model does, thousands of times a second."""

from interventions.effects import Effects, Reference, intervened_logits, measure
from interventions.errors import (
    EditError,
    HookError,
    MechdiagError,
    ModelError,
    ReplayError,
    ResultError,
    SiteError,
    TextError,
)
from interventions.hooks import edit_in_trace, fwd_hook
from interventions.models import CausalModel, load_model, wrap
from interventions.recording import Recording, record
from interventions.sites import Site

__all__ = [
    "CausalModel",
    "EditError",
    "Effects",
    "HookError",
    "MechdiagError",
    "ModelError",
    "Recording",
    "Reference",
    "ReplayError",
    "ResultError",
    "Site",
    "SiteError",
    "TextError",
    "edit_in_trace",
    "fwd_hook",
    "intervened_logits",
    "load_model",
    "measure",
    "record",
    "wrap",
]

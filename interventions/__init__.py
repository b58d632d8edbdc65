"""Change one activation of a language model and measure exactly what the model does, thousands of times a second."""

from typing import TYPE_CHECKING

from interventions.lazy import handed_on

if TYPE_CHECKING:
    from interventions.effects import Effects, intervened_logits, measure, measure_joint
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
    from interventions.models.anatomy import check_site
    from interventions.models.causal_model import CausalModel
    from interventions.models.loading import load_model
    from interventions.models.memory import Budget
    from interventions.models.wrapping import wrap
    from interventions.recording import Recording, record
    from interventions.replaying.hooks import edit_in_trace, fwd_hooks
    from interventions.replaying.joint import Put
    from interventions.replaying.rows import Reference
    from interventions.sites import Site

__all__ = [
    "Budget",
    "CausalModel",
    "EditError",
    "Effects",
    "HookError",
    "MechdiagError",
    "ModelError",
    "Put",
    "Recording",
    "Reference",
    "ReplayError",
    "ResultError",
    "Site",
    "SiteError",
    "TextError",
    "check_site",
    "edit_in_trace",
    "fwd_hooks",
    "intervened_logits",
    "load_model",
    "measure",
    "measure_joint",
    "record",
    "wrap",
]

_HOMES = {
    "Budget": "models.memory",
    "CausalModel": "models.causal_model",
    "EditError": "errors",
    "Effects": "effects",
    "HookError": "errors",
    "MechdiagError": "errors",
    "ModelError": "errors",
    "Put": "replaying.joint",
    "Recording": "recording",
    "Reference": "replaying.rows",
    "ReplayError": "errors",
    "ResultError": "errors",
    "Site": "sites",
    "SiteError": "errors",
    "TextError": "errors",
    "check_site": "models.anatomy",
    "edit_in_trace": "replaying.hooks",
    "fwd_hooks": "replaying.hooks",
    "intervened_logits": "effects",
    "load_model": "models.loading",
    "measure": "effects",
    "measure_joint": "effects",
    "record": "recording",
    "wrap": "models.wrapping",
}
"""The module of each name."""
__getattr__, __dir__ = handed_on(__name__, _HOMES)

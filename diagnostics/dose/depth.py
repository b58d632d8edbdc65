"""Edits of equal length by depth."""

from collections.abc import Iterator

import numpy as np

from diagnostics.dose.summary import shown_dose
from diagnostics.figures.by_depth import DepthPlan, DepthPoint, Groups, Looks, Provenance, ratio_panel
from diagnostics.figures.looks import EDIT_COLOURS, EDIT_LABELS, EDIT_MARKERS
from diagnostics.statistics.measures import CLEAR
from diagnostics.statistics.tables import TRAINED

DOSED: Looks = {name: (EDIT_COLOURS[name], EDIT_MARKERS[name]) for name in EDIT_COLOURS}


def dosed(groups: Groups, provenance: Provenance) -> Iterator[DepthPoint]:
    """At one dose: KL of each edit over that of a random rotation, and direct over total effect."""
    dose = shown_dose(provenance["doses"])
    for g in groups:
        if not np.isclose(g["dose"], dose):
            continue
        for edit in EDIT_LABELS if g["model"] == TRAINED else ("toward_token", "norm_up"):
            found = g["edits"][edit]
            noise = found["median_kl"].value <= CLEAR * g["noise_floor"]
            values = {"direct ÷ total": found["direct_over_total"]}
            if edit != "isotropic":
                values["÷ isotropic"] = g["ratios"][f"{edit} ÷ isotropic"]
            for panel, value in values.items():
                yield DepthPoint(panel, edit, g["layer"], g["point"], value, g["context"], g["model"], noise=noise,
                           settings={"dose": dose})  # fmt: skip


PLANS = {
    "dose_response": DepthPlan(
        dosed,
        "At equal dose: KL ÷ that of rotations towards random directions, and direct ÷ total effect",
        {
            "÷ isotropic": ratio_panel("÷ random rotation"),
            "direct ÷ total": ratio_panel("direct ÷ total effect"),
        },
        "tokens",
        DOSED,
        EDIT_LABELS | {"norm_down": "norm down"},
    ),
}
"""Figures by depth, by name."""

"""Activations of norm 1 by depth."""

from collections.abc import Iterator

from diagnostics.figures.by_depth import KL, DepthPanel, DepthPlan, DepthPoint, Groups, Looks, Provenance, ratio_panel
from diagnostics.figures.looks import EDIT_COLOURS, EDIT_MARKERS
from diagnostics.statistics.measures import CLEAR

UNIT: Looks = {
    name: (EDIT_COLOURS[edit], EDIT_MARKERS[edit])
    for name, edit in (("unit_norm", "norm_up"), ("rotation", "isotropic"))
}


def unit_norms(groups: Groups, provenance: Provenance) -> Iterator[DepthPoint]:
    """KL of forcing norm 1 and of a rotation by the same distance, one token or all; and the one over the other."""
    for g in groups:
        floor = CLEAR * g["noise_floor"]
        for row, end in (("alone", ""), ("everywhere", "_everywhere")):
            for edit in ("unit_norm", "rotation"):
                kl = g[edit + end]
                yield DepthPoint("kl", edit, g["layer"], "resid_post", kl, row, g["model"], noise=kl.value <= floor)
            ratio, noise = g[f"unit_norm{end} ÷ rotation{end}"], g["unit_norm" + end].value <= floor
            yield DepthPoint("ratio", "unit_norm", g["layer"], "resid_post", ratio, row, g["model"], noise=noise)


PLANS = {
    "unit_norm": DepthPlan(
        unit_norms,
        "Activations set to norm 1, or rotated by the same distance",
        {
            "kl": DepthPanel("effect", KL, log=True, lowest=0),
            "ratio": ratio_panel("norm 1 ÷ rotation"),
        },
        "tokens",
        UNIT,
        {"unit_norm": "norm forced to 1", "rotation": "turned by the same distance"},
    ),
}
"""Figures by depth, by name."""

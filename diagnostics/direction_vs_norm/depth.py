"""Direction and norm patches by depth."""

from collections.abc import Iterator, Mapping
from typing import Any

from diagnostics.figures.by_depth import KL, DepthPanel, DepthPlan, DepthPoint, Groups, Looks, Provenance, ratio_panel
from diagnostics.figures.looks import COLOURS, LABELS, MARKERS
from diagnostics.statistics.measures import CLEAR
from diagnostics.statistics.tables import TRAINED

PATCHES: Looks = {name: (COLOURS[name], MARKERS[name]) for name in MARKERS}
CONTEXTS: Looks = {"in_place": (COLOURS["in_place"], "o"), "single_token": (COLOURS["single_token"], "s")}
PATCH_LABELS = {name: label.strip() for name, label in LABELS.items()} | {
    "placebo_token": "direction's placebo, tangent between tokens",
    "placebo_direction": "direction's placebo, isotropic tangent",
    "placebo_norm": "norm's placebo: rotation by the same distance",
}


def patched(groups: Groups, provenance: Provenance) -> Iterator[DepthPoint]:
    """Median KL of each patch and of its placebos; of randomly initialised models, the patches alone."""
    panels = {"direction": ("direction", "placebo_token", "placebo_direction"), "norm": ("norm", "placebo_norm")}
    for g in _random_pairs(groups):
        for panel, edits in panels.items():
            for edit in edits if g["model"] == TRAINED else edits[:1]:
                kl = g["edits"][edit]["median_kl"]
                noise = kl.value <= CLEAR * g["noise_floor"]
                yield DepthPoint(panel, edit, g["layer"], g["point"], kl, g["context"], g["model"], noise=noise)


def patch_ratios(groups: Groups, provenance: Provenance) -> Iterator[DepthPoint]:
    """Direction ÷ norm, and each patch over its placebos: medians over pairs of ratios of KLs."""
    panels = ("direction ÷ norm", "norm ÷ placebo_norm", "direction ÷ placebo_token", "direction ÷ placebo_direction")
    for g in _random_pairs(groups):
        for panel in panels:
            ratio, top = g["ratios"][panel], g["edits"][panel.split(" ÷ ")[0]]["median_kl"].value
            noise = top <= CLEAR * g["noise_floor"]
            yield DepthPoint(
                panel, g["context"], g["layer"], g["point"], ratio["median"].estimate, network=g["model"], noise=noise
            )


def _random_pairs(groups: Groups) -> list[Mapping[str, Any]]:
    return [g for g in groups if g["pair_set"] == "random"]


PLANS = {
    "direction_norm_kl": DepthPlan(
        patched,
        "Median KL of direction and norm patches, beside placebos of the same dose",
        {
            "direction": DepthPanel("direction patch", KL, log=True, lowest=0),
            "norm": DepthPanel("norm patch", KL, log=True, lowest=0),
        },
        "pairs",
        PATCHES,
        PATCH_LABELS,
    ),
    "direction_norm_ratio": DepthPlan(
        patch_ratios,
        "Direction ÷ norm at unequal dose; ÷ placebo at equal dose",
        {
            "direction ÷ norm": ratio_panel("direction ÷ norm, unequal doses"),
            "norm ÷ placebo_norm": ratio_panel("norm ÷ rotation, same distance"),
            "direction ÷ placebo_token": ratio_panel("direction ÷ placebo between tokens"),
            "direction ÷ placebo_direction": ratio_panel("direction ÷ isotropic placebo"),
        },
        "pairs",
        CONTEXTS,
        LABELS,
    ),
}
"""Figures by depth, by name."""

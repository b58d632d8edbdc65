"""Norm exponents by depth."""

from collections.abc import Iterator, Mapping
from typing import Any

from diagnostics.figures.by_depth import DepthPanel, DepthPlan, DepthPoint, Groups, Provenance, plain
from diagnostics.statistics.tables import PLACEBOS, TRAINED


def exponents(groups: Groups, provenance: Provenance) -> Iterator[DepthPoint]:
    """The norm exponent across tokens and of the same token rescaled, each beside its placebos', and what a cosine SAE learned."""
    how = {"sampling": provenance["sampling"], "edit": provenance["reference"]}
    for g in groups:
        trained = g["model"] == TRAINED

        def point(panel: str, value: Any, role: str = "main", g: Mapping[str, Any] = g) -> DepthPoint:
            return DepthPoint(
                panel, g["sae"], g["layer"], g["point"], value, g["context"], g["model"], role, settings=how
            )

        ways = g["exponents"]
        if "observational" in ways:
            yield point("observational", ways["observational"].a)
            yield from (point("observational", ways[name].a, name) for name in PLACEBOS if trained and name in ways)
        if "interventional" in ways:
            beside = ways["interventional"].placebos
            yield point("interventional", ways["interventional"].a)
            yield from (point("interventional", found.placebo, name) for name, found in beside.items() if trained)
            if "placebo_token" in beside:
                yield point("difference", beside["placebo_token"].difference)
        if g["learned_a"] is not None and trained:
            yield point("learned", plain(g["learned_a"]["mean"], g["n_latents"]))


_A = {"label": "norm exponent a", "lines": (0, 1), "limits": (-1.6, 2.6)}
PLANS = {
    "norm_exponent": DepthPlan(
        exponents,
        "Norm exponent of removed directions (0: cosine, 1: inner product)",
        {
            "observational": DepthPanel("across tokens", **_A),
            "interventional": DepthPanel("same token rescaled", **_A),
            "difference": DepthPanel("rescaled less placebo", "difference of a", lines=(0,), limits=(-1.6, 2.6)),
            "learned": DepthPanel("learned by the SAE", **_A),
        },
        "pairs",
        done="ablated",
        placebo="placebos of equal dose",
    ),
}
"""Figures by depth, by name."""

"""Norm exponents by depth."""

from collections.abc import Iterator
from typing import Any

from diagnostics.figures.by_depth import DepthPanel, DepthPlan, DepthPoint, Groups, Provenance, plain
from diagnostics.statistics.tables import TRAINED


def exponents(groups: Groups, provenance: Provenance) -> Iterator[DepthPoint]:
    """The norm exponent: across tokens, of the same token rescaled, of the placebo, and what a cosine SAE learned."""
    how = {"sampling": provenance["sampling"], "edit": provenance["reference"]}
    for g in groups:
        values: dict[str, Any] = {name: way.a for name, way in g["exponents"].items()}
        if g["learned_a"] is not None and g["model"] == TRAINED:
            values["learned"] = plain(g["learned_a"]["mean"], g["n_latents"])
        for panel in ("observational", "placebo_token", "interventional", "learned"):
            if panel in values:
                yield DepthPoint(
                    panel, g["sae"], g["layer"], g["point"], values[panel], g["context"], g["model"], settings=how
                )


_A = {"label": "norm exponent a", "lines": (0, 1), "limits": (-1.6, 2.6)}
PLANS = {
    "norm_exponent": DepthPlan(
        exponents,
        "Norm exponent of the effect of removing a latent's direction (0: cosine, 1: inner product)",
        {
            "observational": DepthPanel("across tokens", **_A),
            "placebo_token": DepthPanel("placebo, across tokens", **_A),
            "interventional": DepthPanel("same token rescaled", **_A),
            "learned": DepthPanel("learned by the SAE", **_A),
        },
        "latent-token pairs",
        bars="95 % Fieller, delete-one-prompt jackknife",
        done="ablated",
        one_scale=True,
    ),
}
"""Figures by depth, by name."""

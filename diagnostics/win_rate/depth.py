"""Win rates by depth."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from diagnostics.figures.by_depth import DepthPanel, DepthPlan, DepthPoint
from diagnostics.statistics.tables import TRAINED
from diagnostics.win_rate.summary import QUARTILES, Contest


def won(contests: Sequence[Contest], runs: Mapping[str, Any]) -> Iterator[DepthPoint]:
    """Win rate of the cosine over the inner product, overall and within quartiles of ‖x‖, and its placebos'. runs: provenance by name."""
    for c in contests:
        place, p = c.place, runs[c.run]
        how = {"sampling": p["sampling"], "edit": c.rates.edit, "a win is": "r > r" if c.rates.signed else "|r| > |r|"}
        how["scores"] = "absolute" if c.rates.absolute else "with their sign"
        for rates in (c.rates.main, *(c.rates.placebos.values() if place["model"] == TRAINED else ())):
            for panel, rate in zip(QUARTILES, (rates.overall, *rates.quartiles), strict=True):
                role = "main" if rates is c.rates.main else rates.edit
                yield DepthPoint(panel, place["sae"], place["layer"], place["point"], rate.estimate, place["context"],
                           place["model"], role, run=c.run, settings=how)  # fmt: skip


def _panel(title: str) -> DepthPanel:
    return DepthPanel(title, "win rate of the cosine", lines=(0.5,), limits=(-0.04, 1.04), whole=True)


PLANS = {
    "win_rate": DepthPlan(
        won,
        "Share of latents whose KL correlates more with the cosine than with the inner product",
        {"all": _panel("all norms")} | {q: _panel(f"quartile {q} of ‖x‖") for q in QUARTILES[1:]},
        "latent-token pairs",
        done="ablated",
        placebo="placebos of the same dose",
    ),
}
"""Figures by depth, by name."""

"""Effects of single latents, and scores that predict them, by depth."""

from collections.abc import Iterator

from diagnostics.atlas.summary import FIRST, LABELS
from diagnostics.figures.by_depth import (
    KL,
    DepthPanel,
    DepthPlan,
    DepthPoint,
    Groups,
    Provenance,
    plain,
    ratio_panel,
)
from diagnostics.figures.looks import REFERENCE, SCORE_LOOKS
from diagnostics.statistics.measures import CLEAR


def removed(groups: Groups, provenance: Provenance) -> Iterator[DepthPoint]:
    """Median KL of removing one latent, its ratio to the placebo's, and the share of all KL in the largest hundredth of rows."""
    for g in groups:
        values = {"kl": g["kl"], "÷ placebo": g["kl_over_placebo"]}
        values["share"] = plain(g["share_of_largest_hundredth"], g["rows"])
        for panel, value in values.items():
            if value is not None:
                noise = panel == "kl" and g["kl"].value <= CLEAR * g["noise_floor"]
                yield DepthPoint(panel, g["sae"], g["layer"], g["point"], value, noise=noise)


def scored(groups: Groups, provenance: Provenance) -> Iterator[DepthPoint]:
    """How well each cheap score finds latents of large effect; a row of panels for each SAE."""
    for g in groups:
        for score, found in g["scores"].items():
            for panel in ("rank", "recall", "false_negatives"):
                yield DepthPoint(panel, score, g["layer"], g["point"], found[panel], g["sae"])
        yield DepthPoint(
            "recall", "chance", g["layer"], g["point"], plain(g["chance_recall"], g["scored_tokens"]), g["sae"]
        )


PLANS = {
    "atlas_effects": DepthPlan(
        removed,
        "One active latent removed: KL, ÷ placebo of the same dose, and share of all KL in the largest hundredth",
        {
            "kl": DepthPanel("one latent removed", KL, log=True, lowest=0),
            "÷ placebo": ratio_panel("÷ its placebo"),
            "share": DepthPanel("largest hundredth", "share of the summed KL", limits=(0, 1), whole=True),
        },
        "ablations",
    ),
    "atlas_scores": DepthPlan(
        scored,
        "How well cheap scores find the latents of large effect",
        {
            "rank": DepthPanel("rank correlation with KL", "Spearman's ρ among a token's latents", lines=(0,)),
            "recall": DepthPanel(
                f"the {FIRST} largest effects found",
                f"share among the {FIRST} largest scores",
                limits=(0, 1),
                whole=True,
            ),
            "false_negatives": DepthPanel(
                "large effects missed", "share scored below the median", limits=(0, 0.6), lines=(0.5,), whole=True
            ),
        },
        "tokens or ablations",
        {**SCORE_LOOKS, "chance": (REFERENCE, "_")},
        {**LABELS, "chance": "chance"},
        rows_are_saes=True,
    ),
}
"""Figures by depth, by name."""

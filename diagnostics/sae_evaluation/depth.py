"""Quality and alignment of SAEs by depth."""

from collections.abc import Iterator

import numpy as np

from diagnostics.figures.by_depth import DepthPanel, DepthPlan, DepthPoint, Groups, Provenance, plain
from diagnostics.sae_evaluation.measures import counted
from diagnostics.sampling.counted import QUARTILES


def evaluated(groups: Groups, provenance: Provenance) -> Iterator[DepthPoint]:
    """Fraction of variance explained, KL score and share of latents that never fire, over all counted tokens."""
    how = {
        "tokens": counted(provenance),
        "spliced sinks": "replaced" if provenance["splice_sinks"] else "left",
    }
    for g in groups:
        if (g["tokens"], g["quartile"]) != (how["tokens"], QUARTILES[0]):
            continue
        values = {"fve": g["fve"], "kl_score": g["kl_score"], "dead_share": plain(g["dead_share"], g["d_sae"])}
        for panel, value in values.items():
            yield DepthPoint(panel, g["sae"], g["layer"], g["point"], value, g["corpus"], settings=how)


def aligned(groups: Groups, alignments: Groups) -> Iterator[DepthPoint]:
    """Alignment <w_i, d_i>, cosine of both, and exponent a_i: mean over live latents ± standard deviation over them."""
    place = {g["sae"]: g for g in groups}
    for line in alignments:
        g = place[line["sae"]]
        for panel in ("alignment", "cosine", "exponent"):
            if np.isfinite(line[panel]):
                value = plain(line[panel], line["live"], line[f"{panel} sd"])
                yield DepthPoint(panel, line["sae"], g["layer"], g["point"], value)


PLANS = {
    "sae_evaluation": DepthPlan(
        evaluated,
        "Reconstruction, effect of splicing it in, and latents that never fire",
        {
            "fve": DepthPanel("variance explained", "fraction of variance explained"),
            "kl_score": DepthPanel("spliced into the stream", "KL score: 1 − KL / KL of zero ablation"),
            "dead_share": DepthPanel("never fires", "share of latents"),
        },
        "tokens",
        done="read by the SAE",
    ),
    "sae_latents": DepthPlan(
        aligned,
        "Encoder and decoder rows of live latents, and exponents of cosine scores",
        {
            "alignment": DepthPanel("alignment", "⟨wᵢ, dᵢ⟩"),
            "cosine": DepthPanel("cosine of encoder and decoder", "cos(wᵢ, dᵢ)"),
            "exponent": DepthPanel("exponent of ‖x_c‖", "exponent aᵢ", lines=(0,)),
        },
        "live latents",
        bars="± one standard deviation over live latents",
        done="read by the SAE",
    ),
}
"""Figures by depth, by name."""

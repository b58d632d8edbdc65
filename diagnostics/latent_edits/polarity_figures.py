"""The figure of what a latent's two polarities do."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from diagnostics.figures.axes import BARS, bar_lengths
from diagnostics.figures.looks import PLACEBO_LABELS, PLACEBO_LOOKS, REFERENCE, looks, styled
from diagnostics.latent_edits.interaction_figures import finish
from diagnostics.statistics.tables import lines_of

ROWS = {
    ("ablation", "alike"): "removed,\none sign",
    ("ablation", "opposite"): "removed,\nboth signs",
    ("steering", "opposite"): "added,\n+d and −d",
}


def plot_polarity_effects(
    frame: pd.DataFrame, groups: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any]
) -> Figure:
    """Mean cosines of the logit changes (left); each latent's mean over pairs of both polarities beside its random direction's (right).

    A row of panels an SAE.
    """
    saes = list(provenance["saes"])
    style = looks(saes)
    with styled():
        figure, axes = plt.subplots(
            len(saes), 2, figsize=(9.2, 2.5 * len(saes) + 1.0), squeeze=False, layout="constrained"
        )
        for (left, right), sae in zip(axes, saes, strict=True):
            for place, (edit, relation) in enumerate(ROWS):
                for shift, kind in zip((-0.22, 0, 0.22), ("latents", *PLACEBO_LOOKS), strict=True):
                    own = [
                        g
                        for g in groups
                        if (g["sae"], g["edit"], g["relation"], g["kind"]) == (sae, edit, relation, kind)
                    ]
                    if own:
                        colour, marker, _ = PLACEBO_LOOKS.get(kind, (*style[sae], "-"))
                        left.errorbar(
                            place + shift, own[0]["cosine"].value, bar_lengths([own[0]["cosine"]]), color=colour, marker=marker,
                            ms=5, lw=0, elinewidth=1.2, capsize=2, label=PLACEBO_LABELS.get(kind, "latents") if not place else None,
                        )  # fmt: skip
            left.axhline(0, color=REFERENCE, lw=0.8)
            left.set_xticks(range(len(ROWS)), list(ROWS.values()))
            left.set(xlim=(-0.5, len(ROWS) - 0.5), ylim=(-1.05, 1.05), ylabel="cosine of the logit changes")
            left.set_title(sae)
            opposite = lines_of(frame, sae=sae, edit="ablation", relation="opposite")
            means = opposite.pivot_table(index="latent", columns="kind", values="cosine", observed=True)
            colour, marker = style[sae]
            right.plot(means["placebo_isotropic"], means["latents"], color=colour, marker=marker, lw=0, ms=4, alpha=0.8)
            low = float(np.nanmin(means.to_numpy(), initial=0)) - 0.05
            high = float(np.nanmax(means.to_numpy(), initial=0)) + 0.05
            right.plot([low, high], [low, high], color=REFERENCE, lw=0.8)
            right.set(xlabel="of a random direction", ylabel="of the latent", xlim=(low, high), ylim=(low, high))
            right.set_title("removed, z > 0 and z < 0: latent by latent")
        axes[0, 0].legend(loc="upper left")
        n = max((g["latents"] for g in groups), default=0)
        words = (
            f"Up to {n} bipolar latents of each SAE, {provenance['tokens_per_latent']} tokens of each polarity. Placebos: one random direction a "
            f"latent, with its z. {BARS}"
        )
        return finish(figure, provenance, words)

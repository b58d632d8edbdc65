"""The figure of a whole dictionary: each latent's KL over its placebo's against how often it fires."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from diagnostics.figures.axes import caption, panels, write_caption
from diagnostics.figures.looks import REFERENCE, VERDICT_LOOKS, legend_label, styled
from diagnostics.statistics.tables import lines_of
from interventions.errors import ResultError


def plot_latents(latents: pd.DataFrame, groups: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any]) -> Figure:
    """A panel for each SAE: median KL ÷ placebo of each latent with a verdict against the share of tokens on which it fires.

    Grey line: no more than the dose. Latents whose ratio is not above 0 are not drawn, nor those without a verdict; the legend counts
    all. Raises `ResultError` without groups.
    """
    if not groups:
        raise ResultError("no SAE in this result, so there is nothing to draw")
    with styled():
        figure, axes = panels(
            len(groups), 4.2, 3.6, 0.5, least=8.4 if len(groups) > 1 else 5.2, sharex=True, sharey=True
        )
        for ax, g in zip(axes.flat, groups, strict=False):
            own, any_shown = lines_of(latents, sae=g["sae"]), False
            for verdict, (colour, marker) in VERDICT_LOOKS.items():
                some = lines_of(own, verdict=verdict)
                y = some.over_placebo.to_numpy(float)
                y = np.where(y > 0, y, np.nan)
                label = legend_label(f"{verdict}: {g['verdicts'][verdict]:,}")
                any_shown |= bool(np.isfinite(y).any())
                ax.plot(some.frequency, y, color=colour, marker=marker, ms=2.5, lw=0, mew=0.5, alpha=0.45, label=label)
            ax.axhline(1, color=REFERENCE, lw=1, zorder=0)
            if any_shown:
                ax.set(xscale="log", yscale="log")
                low, high = ax.get_ylim()
                ax.set_ylim(low, high * (high / low) ** 0.15)  # for the legend
            ax.set(title=f"{g['sae']}, block {g['layer']}")
            ax.set_xlabel("share of tokens on which the latent fires")
            ax.legend(loc="upper center", ncols=2, fontsize=7, markerscale=2)
        for ax in axes[:, 0]:
            ax.set_ylabel("median KL ÷ placebo of the same dose")
        words = f"Each latent removed at up to {provenance['tokens_per_latent']:,} tokens. Grey line: a ratio of 1."
        write_caption(figure, caption(provenance, words))
    return figure

"""The figure of the bipolar census."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from diagnostics.figures.axes import BARS, bar_lengths, caption, legend_entries, sink_rule, write_caption
from diagnostics.figures.looks import PLACEBO_LOOKS, REFERENCE, legend_label, looks, styled
from diagnostics.polarity.census_summary import LATENTS, QUARTERS, RANDOM, by_quarter
from diagnostics.sampling.latents import BIPOLAR_SHARE
from diagnostics.statistics.tables import lines_of, where


def plot_census(frame: pd.DataFrame, groups: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any]) -> Figure:
    """Distribution over latents of the share of their firing with z > 0 (left), and bipolar shares of all latents and by quarter of their mass (right).

    Dashed: random directions that fire as often. SAEs without negative latents are left out.
    """
    saes = [name for name, said in provenance["saes"].items() if said["signed"]]
    style, least = looks(saes), provenance["min_active"]
    with styled():
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.6), layout="constrained")
        for sae in saes:
            colour, marker = style[sae]
            for directions, dash in ((LATENTS, "-"), (RANDOM, PLACEBO_LOOKS["placebo_token"][2])):
                some = lines_of(frame, sae=sae, directions=directions)
                label = legend_label(sae) if directions == LATENTS else None
                often = where(some, some["fired"] >= least)
                share = np.sort(often["positive"].to_numpy(float) / often["fired"].to_numpy(float))
                left.plot(
                    share, (np.arange(len(share)) + 1) / max(1, len(share)), color=colour, ls=dash, lw=1.4, label=label
                )
                how = {"color": colour, "marker": marker, "ms": 4, "mfc": colour if directions == LATENTS else "none"}
                right.plot(np.arange(len(QUARTERS)) + 1, by_quarter(some, least), ls=dash, lw=1.2, **how)
                whole = [g["bipolar"] for g in groups if (g["sae"], g["directions"]) == (sae, directions)]
                right.errorbar(
                    [0] * len(whole),
                    [e.value for e in whole],
                    bar_lengths(whole),
                    lw=0,
                    elinewidth=1.2,
                    capsize=2,
                    **how,
                )
        for edge in (BIPOLAR_SHARE, 1 - BIPOLAR_SHARE):
            left.axvline(edge, color=REFERENCE, lw=0.8)
        left.set(
            xlabel="share of a latent's firing with z > 0",
            ylabel="share of latents",
            xlim=(-0.02, 1.02),
            ylim=(0, 1.02),
        )
        left.set_title("polarity of latents")
        right.set_xticks(range(len(QUARTERS) + 1), ("all", *QUARTERS))
        right.set(xlabel="quarter of latents by activation mass", ylabel="share that is bipolar", ylim=(-0.02, 1.02))
        right.set_title("bipolar latents")
        if saes:
            figure.legend(*legend_entries((left,)), loc="outside upper left", ncols=3)
        words = f"Latents that fire on {least} tokens or more. Dashed: random directions, each firing as often as a latent. Grey: limits of bipolar. {BARS}"
        sinks = sink_rule(provenance, "position 0")
        write_caption(figure, caption(provenance, words, place=", ".join(provenance["sites"]), sinks=sinks))
    return figure

"""Sweeps of sparsity: reconstruction against L0, and the model's behaviour against reconstruction."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diagnostics.figures.axes import BARS, bar_lengths, legend_entries, plain_ticks, write_caption
from diagnostics.figures.by_depth import Groups
from diagnostics.figures.looks import REFERENCE, legend_label, legend_names, looks, styled
from diagnostics.sae_evaluation.figures import evaluation_caption

_PANELS = {
    "l0": ("L0 (active latents a token)", "fve", "fraction of variance explained"),
    "fve": ("fraction of variance explained", "kl_score", "KL score: 1 − KL / KL of zero ablation"),
}


def plot_sweeps(
    curves: Mapping[str, Groups], matched: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any]
) -> Figure:
    """FVE against L0 (left) and KL score against FVE (right) of each family; a row of panels for each site and corpus.

    curves: the groups of each family's members, over all counted tokens of every corpus. matched: lines of `matched`; each one
    without a note is a vertical line at the L0 or FVE compared, and open markers at the interpolated values. Bars: 95 %.
    """
    places = list(dict.fromkeys((g["site"], g["corpus"]) for some in curves.values() for g in some))
    style, entries = looks(list(curves)), legend_names(list(curves))
    with styled():
        figure, axes = plt.subplots(
            len(places), 2, figsize=(8.6, 2.9 * len(places) + 1.0), layout="constrained", squeeze=False
        )
        for row, place in zip(axes, places, strict=True):
            for ax, (axis, (xlabel, measure, ylabel)) in zip(row, _PANELS.items(), strict=True):
                for name, groups in curves.items():
                    own = sorted((g for g in groups if (g["site"], g["corpus"]) == place), key=lambda g: g["l0"].value)
                    if own:
                        _curve(ax, own, axis, measure, entries[name], *style[name])
                for m in matched:
                    if (m["site"], m["corpus"], m["axis"]) == (*place, axis) and not m["note"]:
                        ax.axvline(m["value"], color=REFERENCE, lw=0.8, ls=":")
                        for side in ("reference", "family"):
                            y = m[f"of_{side}"][measure]
                            ax.plot(m["value"], y, marker="o", ms=9, mfc="none", mec=style[m[side]][0], lw=0)
                if axis == "l0":
                    ax.set_xscale("log")
                    plain_ticks(ax.xaxis)
                ax.set_xlabel(xlabel)
                ax.set_ylabel(ylabel)
                ax.set_title(f"{place[0]}, {place[1]}")
        figure.legend(*legend_entries(axes.flat), loc="outside upper left", ncols=4)
        n = max(g["kl"].n_prompts for some in curves.values() for g in some)
        rings = "Rings: values compared at equal L0 (left) and equal FVE (right), dotted. "
        compared = rings if any(not m["note"] for m in matched) else ""
        words = f"A point is an SAE. {compared}KL score: {n} prompts. {BARS}"
        write_caption(figure, evaluation_caption(provenance, words))
    return figure


def _curve(ax: Axes, groups: Groups, axis: str, measure: str, name: str, colour: str, marker: str) -> None:
    x, y = (np.array([g[m].value for g in groups]) for m in (axis, measure))
    ax.plot(x, y, color=colour, lw=1, alpha=0.7)
    bars = bar_lengths([g[measure] for g in groups])
    ax.errorbar(
        x, y, bars, color=colour, marker=marker, ms=4, lw=0, elinewidth=1.1, capsize=2, label=legend_label(name)
    )

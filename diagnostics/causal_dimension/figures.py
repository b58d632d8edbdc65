"""Figures of causal dimensionality: by depth, and shares of the trace in spans of decoder rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diagnostics.causal_dimension.work import PARTS
from diagnostics.figures.axes import (
    BARS,
    Depth,
    caption,
    legend_above,
    null_models,
    panels,
    plain_ticks,
    points,
    write_caption,
)
from diagnostics.figures.by_depth import Groups
from diagnostics.figures.looks import INK, METRIC_LOOKS, NOTE, REFERENCE, SPAN_LOOKS, UNTRAINED, legend_label, styled

METRIC_LABELS = {"fisher": "Fisher metric of p", "logits": "centred logits"}
SPAN_LABELS = {
    "eigenvectors": "its own eigenvectors", "most_active": "most active decoder rows", "principal": "principal components of x",
    "random": "random decoder rows",
}  # fmt: skip


def plot_dimension(groups: Groups, nulls: Sequence[Groups], point: str, provenance: Mapping[str, Any]) -> Figure:
    """κ by depth (left), directions that hold 50, 80 and 90 % of the trace (middle), κ of fewer tokens (right).

    groups: of the trained model; nulls: the same of each randomly initialised model, in grey. Bars are 95 % intervals over prompts.
    """
    depth = Depth(sorted({g["layer"] for g in groups}), point)
    with styled():
        figure, axes = plt.subplots(1, 3, figsize=(12.0, 4.2), layout="constrained", sharey=True)
        for i, (metric, (colour, marker)) in enumerate(METRIC_LOOKS.items()):
            own, shift = _of(groups, metric), (i - 0.5) * depth.step
            label = METRIC_LABELS[metric]
            points(axes[0], depth.at(own), [g["effective_rank"] for g in own], colour, label, marker, shift)
            _line(axes[0], depth, own, "rotated", color=colour, ls=":", lw=1, label=f"{label}, tokens turned at random")
            for j, rows in enumerate(nulls):
                values = [g["effective_rank"].value for g in _of(rows, metric)]
                known = f"untrained: {label}" if j == 0 else None
                axes[0].plot(
                    depth.at(_of(rows, metric)),
                    values,
                    color=UNTRAINED,
                    lw=0.9,
                    ls="-" if i == 0 else "--",
                    label=known,
                    zorder=0,
                )
            for part, shade in zip(PARTS, (0.25, 0.45, 0.7), strict=True):
                _line(axes[2], depth, own, f"at {part}", color=colour, marker=marker, ms=3, lw=0.9, alpha=shade)
            points(axes[2], depth.at(own), [g["effective_rank"] for g in own], colour, label, marker, shift)
        own, (colour, marker) = _of(groups, "fisher"), METRIC_LOOKS["fisher"]
        for name in ("n50", "n80", "n90"):
            points(axes[1], depth.at(own), [g[name] for g in own], colour, name, marker)
            last, how = (depth.at(own)[-1], own[-1][name].value), {"fontsize": 7, "va": "bottom", "ha": "right"}
            axes[1].annotate(f"{name[1:]} %", last, (-4, 4), textcoords="offset points", color=NOTE, **how)
        known = "covariance of the activations"
        _line(axes[0], depth, own, "activations", color=INK, ls="--", lw=0.9, label=known)
        tokens = max(g["tokens"] for g in groups)
        titles = (
            "effective rank κ",
            "directions for 50, 80, 90 % of the trace (Fisher)",
            "κ of 1/8, 1/4, 1/2 (pale) and all tokens",
        )
        for ax, title in zip(axes, titles, strict=True):
            ax.set_yscale("log")
            ax.set_ylim(0.8, 1.5 * provenance["d_model"])  # fewer than one direction, or more than all, mean nothing
            ax.axhline(provenance["d_model"], color=REFERENCE, lw=0.8, zorder=0)
            ax.set_title(title)
            depth.label(ax)
            ax.set_xlabel(f"block, at {point}" + ("" if depth.to_scale else " (not to scale)"))
        axes[0].set_ylabel(f"directions, of {provenance['d_model']} (grey line)")
        plain_ticks(axes[0].yaxis)
        legend_above(figure, axes[0], 3)
        words = f"G = E[JᵀMJ] of {tokens} tokens{_sketched(provenance)}. {BARS}{null_models(provenance)}"
        write_caption(figure, caption(provenance, words))
    return figure


def plot_spans(groups: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any]) -> Figure:
    """The share of the trace of E[JᵀFJ] in the span of k directions: a panel for each SAE."""
    saes = list(dict.fromkeys(g["sae"] for g in groups))
    with styled():
        figure, axes = panels(len(saes), 3.4, 2.9, 1.2, 8.0, sharey=True, sharex=True)
        for ax, sae in zip(axes.flat, saes, strict=False):
            mine = [g for g in groups if g["sae"] == sae and g["matrix"] == "fisher"]
            for kind, (colour, marker, dash) in SPAN_LOOKS.items():
                own = [g for g in mine if g["rows"] == kind]
                k = np.array([g["k"] for g in own], dtype=float)
                points(ax, k, [g["share"] for g in own], colour, SPAN_LABELS[kind], marker, dash=dash, log=False)
            k = np.unique([g["k"] for g in mine]).astype(float)
            ax.plot(k, k / provenance["d_model"], color=REFERENCE, lw=0.8, zorder=0, label="any directions, k/d_model")
            ax.set(xscale="log", ylim=(0, 1.02), xlabel="directions k", ylabel="share of the trace")
            ax.set_title(legend_label(sae))
            plain_ticks(ax.xaxis)
        legend_above(figure, axes[0, 0], 3)
        words = f"E[JᵀFJ] of {max(g['share'].n_rows for g in groups)} prompts' tokens. {BARS}"
        write_caption(figure, caption(provenance, words, place=", ".join(provenance["sites"])))
    return figure


def _of(groups: Groups, metric: str) -> list[Mapping[str, Any]]:
    return [g for g in groups if g["matrix"] == metric]


def _line(ax: Axes, depth: Depth, groups: Sequence[Mapping[str, Any]], name: str, **how: Any) -> None:
    """A number without an interval by depth, where it is there."""
    known = [g for g in groups if np.isfinite(g[name])]
    if known:
        ax.plot(depth.at(known), [g[name] for g in known], zorder=0, **how)


def _sketched(provenance: Mapping[str, Any]) -> str:
    k = provenance["directions"]
    return f", a sketch of {k} directions" if k else ""

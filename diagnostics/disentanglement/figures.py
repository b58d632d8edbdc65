"""The figure of disentanglement."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diagnostics.disentanglement.summary import CHOSEN, EVERY, NOTHING, SWEPT
from diagnostics.figures.axes import caption, legend_entries, panels, plain_ticks, points, write_caption
from diagnostics.figures.looks import EXCHANGE_LABELS, EXCHANGE_LOOKS, INK, NULL, REFERENCE, legend_label, looks, styled


def plot_disentanglement(groups: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any]) -> Figure:
    """Score against k for each site (first row), and cause against isolation (second row). Bars: 95 % intervals over entities.

    Filled: an SAE's chosen latents; dotted, open: random latents at the same dose; dashed: directions that are no SAE's.
    """
    own = [g for g in groups if g["target"] == EVERY]
    sites = list(dict.fromkeys((g["layer"], g["point"]) for g in own))
    style = looks(list(provenance["saes"]))
    with styled():
        figure, axes = panels(2 * len(sites), 4.6, 3.4, 1.1, 9.2)
        for i, (layer, point) in enumerate(sites):
            some = [g for g in own if (g["layer"], g["point"]) == (layer, point)]
            _scores(axes.flat[2 * i], some, style)
            _plane(axes.flat[2 * i + 1], some, style)
            axes.flat[2 * i].set_title(f"block {layer}, {point}: score against k")
            axes.flat[2 * i + 1].set_title("cause against isolation, k rising along a line")
        handles, labels = legend_entries(axes.flat)
        figure.legend(handles, labels, loc="outside upper left", ncols=4)
        known, count = provenance["known"], sum(provenance["pairs"])
        texts = (
            f"{count} pairs of {len(known['names'])} known entities of {known['entities']}, seed {provenance['seed']}"
        )
        words = "Chosen on one half of the entities, measured on the other. Bars: 95 % over entities."
        write_caption(figure, caption(provenance, words, texts=texts, sinks="others left out"))
    return figure


def _look(kind: str, sae: str, style: Mapping[str, tuple[str, str]]) -> tuple[str, str, str, str]:
    """Colour, marker, dashes and label of a kind."""
    if kind in ("latents", "random"):
        colour, marker = style[sae]
        label = legend_label(sae) + (", random latents at its dose" if kind == "random" else "")
        return colour, marker, "-" if kind == "latents" else ":", label
    colour, marker, dash = EXCHANGE_LOOKS[kind]
    return colour, marker, dash, EXCHANGE_LABELS[kind]


def _lines(groups: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for g in groups:
        if g["kind"] in SWEPT and g["k"] != CHOSEN:
            found.setdefault((g["kind"], g["sae"]), []).append(g)
    return {key: sorted(lines, key=lambda g: g["k"]) for key, lines in found.items()}


def _scores(ax: Axes, groups: Sequence[Mapping[str, Any]], style: Mapping[str, tuple[str, str]]) -> None:
    ax.axhline(NOTHING, color=NULL, lw=1, ls="--", label="nothing exchanged")
    for n, ((kind, sae), lines) in enumerate(_lines(groups).items()):
        colour, marker, dash, label = _look(kind, sae, style)
        k = np.array([g["k"] for g in lines], dtype=float) * 1.04 ** (n - 2)
        points(ax, k, [g["score"] for g in lines], colour, label, marker, dash=dash, log=False, thin=kind == "random")
    for g in groups:
        if g["kind"] in ("whole", "das"):
            colour, label = INK if g["kind"] == "whole" else EXCHANGE_LOOKS["das"][0], EXCHANGE_LABELS[g["kind"]]
            ax.axhline(g["score"].value, color=colour, lw=1, ls="-." if g["kind"] == "whole" else ":", label=label)
    ax.set(
        xscale="log",
        xlabel="latents or directions exchanged, k",
        ylabel="score, (cause + isolation)/2",
        ylim=(0.2, 1.0),
    )
    plain_ticks(ax.xaxis)


def _plane(ax: Axes, groups: Sequence[Mapping[str, Any]], style: Mapping[str, tuple[str, str]]) -> None:
    ax.plot([0, 1], [1, 0], color=REFERENCE, lw=0.8, ls="--", zorder=0)
    for (kind, sae), lines in _lines(groups).items():
        colour, marker, dash, _ = _look(kind, sae, style)
        x, y = ([g[name].value for g in lines] for name in ("cause", "isolation"))
        ax.plot(x, y, color=colour, marker=marker, ms=3 if kind == "random" else 5, ls=dash, lw=1)
    marks = {"whole": "*", "all": "s", "mask": "D", "das": "X"}
    for g in groups:
        if g["kind"] in marks:
            colour = style[g["sae"]][0] if g["sae"] else {"whole": INK}.get(g["kind"], EXCHANGE_LOOKS["das"][0])
            own = (legend_label(g["sae"]), EXCHANGE_LABELS[g["kind"]]) if g["sae"] else (EXCHANGE_LABELS[g["kind"]],)
            at, label = (g["cause"].value, g["isolation"].value), f"{', '.join(own)} (right)"
            ax.plot(*at, color=colour, marker=marks[g["kind"]], ms=8, mfc="none", ls="", label=label)
    ax.set(xlabel="cause", ylabel="isolation", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))

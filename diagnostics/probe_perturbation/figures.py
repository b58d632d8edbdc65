"""The figure of probe perturbation."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diagnostics.figures.axes import caption, legend_entries, panels, plain_ticks, points, sink_rule, write_caption
from diagnostics.figures.looks import GRID, REFERENCE, legend_label, looks, styled
from diagnostics.probe_perturbation.summary import EVERY
from diagnostics.probe_perturbation.work import TPP
from diagnostics.statistics.estimate import Estimate, FiellerInterval

_HIGHEST = 1.5
"""SCR beyond is cut off: a ratio with a small gap"""


def plot_perturbation(groups: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any]) -> Figure:
    """TPP against k, a panel a data set, and SCR, a panel a data set and spurious attribute. Bars: 95 % intervals over groups of texts.

    Filled: the latents of largest effect; thin, dotted: random latents at the same dose; horizontal: the probe's direction projected out.
    """
    shown = [g for g in groups if g["protocol"] != TPP or g["ablated"] == EVERY]
    known = [g for g in shown if np.isfinite(g[g["protocol"]].value)]  # without a gap there is no SCR
    cells = list(dict.fromkeys((g["protocol"], g["dataset"], g["ablated"]) for g in known))
    style = looks(list(provenance["saes"]))
    with styled():
        figure, axes = panels(len(cells), 3.6, 2.9, 1.2, 7.2)
        for ax, cell in zip(axes.flat, cells, strict=False):
            protocol, dataset, ablated = cell
            own = [g for g in known if (g["protocol"], g["dataset"], g["ablated"]) == cell]
            _panel(ax, own, protocol, style)
            ax.set_title(f"{dataset}: {'every class' if protocol == TPP else f'{ablated} removed'}")
            ax.set_ylabel("TPP, intended − collateral" if protocol == TPP else "SCR, share of the gap closed")
            if protocol != TPP:
                low, high = ax.get_ylim()
                ax.set_ylim(max(low, -_HIGHEST), min(high, _HIGHEST))
        handles, labels = legend_entries(axes.flat)
        figure.legend(handles, labels, loc="outside upper left", ncols=3)
        p = provenance
        texts = "; ".join(f"{name}: {sum(text['counts'].values())} texts" for name, text in p["texts"].items())
        words = f"Logistic probes, means over ≤ {p['max_length']} tokens. Bars: 95 % over texts, probes fixed; {p['seeds']} splits, seed {p['seed']}."
        write_caption(
            figure, caption(p, words, texts=texts, place=", ".join(p["sites"]), sinks=sink_rule(p, "position 0"))
        )
    return figure


def _panel(ax: Axes, groups: Sequence[Mapping[str, Any]], protocol: str, style: Mapping[str, tuple[str, str]]) -> None:
    ax.axhline(0, color=GRID, lw=0.8, zorder=0)
    for n, (sae, (colour, marker)) in enumerate(style.items()):
        for kind, dash, said in (("selected", "-", ""), ("random", ":", ", random latents at its dose")):
            lines = sorted((g for g in groups if (g["sae"], g["kind"]) == (sae, kind)), key=lambda g: g["k"])
            k = np.array([g["k"] for g in lines], dtype=float) * 1.05 ** (n - 0.5)
            label = legend_label(sae) + said
            points(
                ax,
                k,
                [_drawn(g[protocol]) for g in lines],
                colour,
                label,
                marker,
                dash=dash,
                log=False,
                thin=kind == "random",
            )
        for g in groups:
            if (g["sae"], g["kind"]) == (sae, "direction") and n == 0:
                ax.axhline(
                    g[protocol].value, color=REFERENCE, lw=1, ls="--", label="the probe's direction projected out"
                )
    ax.set(xscale="log", xlabel="latents ablated, k")
    plain_ticks(ax.xaxis)


def _drawn(found: Estimate | FiellerInterval) -> Estimate:
    """With its interval; a set of ratios that is not bounded is drawn without ends."""
    if isinstance(found, Estimate):
        return found
    low, high = (found.low, found.high) if found.kind == "bounded" else (np.nan, np.nan)
    return Estimate(found.value, low, high, np.nan, found.n_rows, found.n_prompts)

"""The figure of protocols A, B and C."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from diagnostics.figures.axes import legend_entries, plain_ticks, write_caption
from diagnostics.figures.looks import POLARITY_LOOKS, REFERENCE, styled
from diagnostics.polarity.summary import AUROC, ONE, dial_of
from diagnostics.statistics.tables import each, where

LABELS = {
    "signed_gated_tied": "signed gate, tied (H)",
    "abstopk": "AbsTopK (H)",
    "gated": "gate (2H)",
    "topk": "TopK (2H)",
    "pca": "principal components",
    "random": "random directions",
}


def plot_polarity(
    frame: pd.DataFrame, anomalies: pd.DataFrame, groups: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any]
) -> Figure:
    """Unexplained variance against L0 (left), AUROC against m (middle), pairs in one latent against pairs/d_model (right).

    Points are seeds, lines join medians over seeds. Solid: the lowest ρ, dotted: the highest.
    """
    rhos = sorted(frame["rho"].unique())
    dashes = {rhos[0]: "-"} | ({rhos[-1]: ":"} if rhos[1:] else {})
    with styled():
        figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 4.2), layout="constrained")
        for rho, dash in dashes.items():
            some = dial_of(frame)
            some = where(some, (some["rho"] == rho).to_numpy())
            for (selector,), own in each(some, ["selector"]):
                look = _look(selector, dash)
                medians = cast(pd.DataFrame, own.groupby("sparsity")[["l0", "error"]].median()).sort_values(by="l0")
                left.plot(medians["l0"], medians["error"], ls=dash, **look, ms=0)
                label = LABELS[selector] if dash == "-" else None
                left.plot(own["l0"], own["error"], **look, lw=0, ms=4 if dash == "-" else 3, alpha=0.8, label=label)
        left.set(
            xscale="log", yscale="log", xlabel="active latents a row (L0)", ylabel="share of variance not explained"
        )
        dotted = f" (dotted: {rhos[-1]:g})" if rhos[1:] else ""
        left.set_title(f"A: polarity dial, ρ = {rhos[0]:g}{dotted}".replace("-", "−"))
        plain_ticks(left.xaxis)
        shown = where(anomalies, (anomalies["score"] == "deviation").to_numpy())
        for (read,), own in each(shown, ["read"]):
            look = _look(read, "-")
            found = [g for g in groups if g["what"] == AUROC and g["sae"] == read]
            middle.plot([g["m"] for g in found], [g["median"] for g in found], ls="-", **look, ms=0)
            middle.plot(own["m"], own["auroc"], **look, lw=0, ms=4, alpha=0.8, label=LABELS[read])
        middle.axhline(0.5, color=REFERENCE, lw=0.8)
        middle.set(xlabel="numbers read (m)", ylabel="AUROC of an unseen polarity", ylim=(0.4, 1.03))
        middle.set_title("B: directional anomalies")
        for rho, dash in dashes.items():
            for selector in ("signed_gated_tied", "abstopk"):
                look = _look(selector, dash)
                found = [g for g in groups if g["what"] == ONE and g["sae"] == selector and g["rho"] == rho]
                found.sort(key=lambda g: g["superposition"])
                at = [g["superposition"] for g in found]
                right.plot(at, [g["median"] for g in found], ls=dash, **look, ms=0)
                own = frame[(frame["selector"] == selector) & (frame["rho"] == rho)]
                own = own[own["sparsity"] == provenance["middle"][selector]]
                right.plot(
                    own["superposition"], own["consolidated"], **look, lw=0, ms=4 if dash == "-" else 3, alpha=0.8
                )
        right.axhline(0, color=REFERENCE, lw=0.8)
        right.set(xlabel="pairs ÷ dimensions", ylabel="share of pairs in one latent", ylim=(-0.03, 1.03))
        right.set_title("C: toy geometry")
        figure.legend(*legend_entries((left, middle)), loc="outside upper left", ncols=6)
        write_caption(figure, _caption(provenance))
    return figure


def _look(name: str, dash: str) -> dict[str, Any]:
    colour, marker = POLARITY_LOOKS[name]
    return {"color": colour, "marker": marker, "mfc": colour if dash == "-" else "none"}


def _caption(p: Mapping[str, Any]) -> str:
    s, seeds = p["settings"], p["seeds"]
    points = f"Points: {seeds} seed{'' if seeds == 1 else 's'} (from {p['seed']}), lines: medians."
    words = f"{points} H latents, one a pair, or 2H, one a polarity. C: signed SAEs alone, middle sparsity; unsigned ones are 0."
    return f"Planted {p['planted']}, {s['active']:g} active a row, {s['steps']} steps of {s['batch']} rows. {words}"

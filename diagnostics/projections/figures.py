"""Figures of projection ablations: norm exponents by depth, KL against dose."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from diagnostics.figures.axes import (
    BARS,
    SAMPLED,
    Depth,
    caption,
    legend_entries,
    null_models,
    panels,
    patched,
    plain_ticks,
    sae_label,
    write_caption,
)
from diagnostics.figures.by_depth import plain
from diagnostics.figures.looks import (
    FLOORS,
    INK,
    KEY,
    LABELS,
    NORMS,
    NOTE,
    OPEN,
    PLACEBO_LOOKS,
    REFERENCE,
    UNTRAINED,
    looks,
    styled,
)
from diagnostics.statistics.estimate import Estimate, FiellerInterval
from diagnostics.statistics.tables import PLACEBOS, TRAINED
from interventions.errors import ResultError

A_LIMITS = (-1.6, 2.6)
"""Of the axis of exponents: what lies beyond is drawn at its edge as an arrow."""
TOKEN_LOOK, ISOTROPIC_LOOK = (PLACEBO_LOOKS[name][0] for name in PLACEBOS)


@dataclass(frozen=True)
class _Series:
    """One kind of exponent in a panel."""

    words: str
    colour: str
    marker: str
    values: Sequence[FiellerInterval | Estimate | None]
    """of each group; None: not measured"""
    fill: bool = True


def _across(own: Sequence[Mapping[str, Any]], colour: str) -> list[_Series]:
    ways = [[g["exponents"].get(name) for g in own] for name in ("observational", "placebo_token")]
    latent, placebo = ([None if way is None else way.a for way in some] for some in ways)
    learned = [None if g["learned_a"] is None else plain(g["learned_a"]["mean"], g["n_latents"]) for g in own]
    return [
        _Series("latents, across tokens", colour, "o", latent),
        _Series("placebos", TOKEN_LOOK, "v", placebo),
        _Series("learned by the SAE", colour, "x", learned),
    ]


def _rescaled(own: Sequence[Mapping[str, Any]], colour: str) -> list[_Series]:
    ways = [g["exponents"].get("interventional") for g in own]
    token, isotropic = ([None if w is None else w.placebos.get(name) for w in ways] for name in PLACEBOS)
    found = [
        _Series("latents, same token rescaled", colour, "D", [None if way is None else way.a for way in ways]),
        _Series("placebos", TOKEN_LOOK, "v", [None if b is None else b.placebo for b in token]),
        _Series("isotropic placebos", ISOTROPIC_LOOK, "^", [None if b is None else b.placebo for b in isotropic]),
        _Series("rescaled: latents less placebos", INK, "s", [None if b is None else b.difference for b in token], fill=False),
    ]  # fmt: skip
    return [series for series in found if any(value is not None for value in series.values)]


def _identified(value: FiellerInterval | Estimate) -> bool:
    """Whether there is something to draw: a bounded set, an interval, or a number that has no error."""
    return value.kind == "bounded" if isinstance(value, FiellerInterval) else bool(np.isfinite(value.value))


def _draw(ax: Axes, at: np.ndarray, series: _Series, limits: tuple[float, float]) -> None:
    """A point with its interval for each group; ends beyond the axis are arrows."""
    (bottom, top), label = limits, series.words
    face = series.colour if series.fill else OPEN
    for x, value in zip(at, series.values, strict=True):
        if value is None:
            continue
        if not _identified(value):
            ax.text(
                x, bottom + 0.02 * (top - bottom), "n. i.", fontsize=6.5, color=series.colour, ha="center", va="bottom"
            )
            continue
        if np.isfinite([value.low, value.high]).all():
            ends = np.clip([value.low, value.high], bottom, top)
            ax.plot([x, x], ends, color=series.colour, lw=1.2)
            for end, beyond, arrow in ((ends[0], value.low < bottom, "v"), (ends[1], value.high > top, "^")):
                marker, size = (arrow, 4) if beyond else ("_", 6)
                ax.plot([x], [end], color=series.colour, marker=marker, ms=size, lw=0)
        if bottom <= value.value <= top:
            ax.plot([x], [value.value], color=series.colour, marker=series.marker, mfc=face, ms=5, lw=0, label=label)
            label = "_"


def _limits(panels: Sequence[Sequence[_Series]], null: Sequence[float]) -> tuple[float, float]:
    """Around all intervals and 0, within `A_LIMITS`."""
    values = [v for panel in panels for series in panel for v in series.values if v is not None and _identified(v)]
    ends = np.array([0.0, *null, *(end for v in values for end in (v.low, v.high))])
    low, high = np.nanmin(ends), np.nanmax(ends)
    margin = 0.08 * max(high - low, 0.1)
    return float(max(low - margin, A_LIMITS[0])), float(min(high + margin, A_LIMITS[1]))


def plot_exponents(
    groups: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any], contexts: Sequence[str]
) -> Figure:
    """The norm exponent a by depth, a panel for each kind of SAE: across tokens, beside the placebo's and the exponent that the SAE
    learned; below, of the same token rescaled, beside the placebos' and less the placebo's.

    groups: of one point, from all models. Bars: 95 % intervals from the delete-one-prompt jackknife, Fieller's for a; n. i.: not
    identified. Grey lines: the latents' a in randomly initialised models. Each context has its row; rescaled activations are not run
    in the one-token context.
    """
    saes, point = list(provenance["saes"]), groups[0]["point"]
    kinds = list(dict.fromkeys(map(sae_label, saes)))
    style = looks(saes)
    rows = [(where, "observational") for where in contexts]
    rows += [(w, "interventional") for w in contexts if any("interventional" in g["exponents"] and g["context"] == w for g in groups)]  # fmt: skip
    with styled():
        size = (9.6, 3.0 * len(rows) + 1.6)
        figure, axes = plt.subplots(
            len(rows), len(kinds), figsize=size, sharey="row", squeeze=False, layout="constrained"
        )
        for row, (where, way) in zip(axes, rows, strict=True):
            here = [g for g in groups if g["context"] == where]
            by = [[g for g in here if g["model"] == TRAINED and sae_label(g["sae"]) == name] for name in kinds]
            series = [
                (_across if way == "observational" else _rescaled)(own, style[own[0]["sae"]][0]) if own else []
                for own in by
            ]
            null = {
                (name, label): [g for g in here if g["model"] == label and sae_label(g["sae"]) == name]
                for name in kinds
                for label in provenance["null_models"]
            }
            grey = {key: [_value(g["exponents"].get(way)) for g in some] for key, some in null.items()}
            limits = (
                A_LIMITS if way == "observational" else _limits(series, [a for some in grey.values() for a in some])
            )
            for ax, name, own, drawn in zip(row, kinds, by, series, strict=True):
                if not own:
                    ax.set_visible(False)
                    continue
                depth = Depth(sorted({g["layer"] for g in own}), point)
                at, step = depth.at(own), 2.2 * depth.step
                for i, some in enumerate(drawn):
                    _draw(ax, at + (i - (len(drawn) - 1) / 2) * step, some, limits)
                for i, label in enumerate(provenance["null_models"]):
                    known = np.clip(grey[name, label], *limits)
                    ax.plot(depth.at(null[name, label]), known, color=UNTRAINED, lw=0.9, marker=".", ms=4, zorder=0,
                            label="latents in randomly initialised models" if i == 0 else None)  # fmt: skip
                for a, words in ((0, "cosine"), (1, "inner product")):
                    if a > limits[1]:
                        continue
                    ax.axhline(a, color=REFERENCE, lw=0.8, ls="--", zorder=0)
                    ax.text(
                        1.0, a, f" {words}", transform=ax.get_yaxis_transform(), fontsize=7, color=NOTE, va="center"
                    )
                ax.set_ylim(*limits)
                said = "" if way == "observational" else ", rescaled"
                ax.set_title(f"{name} SAE, {LABELS[where]}{said}")
                depth.label(ax)
                ax.set_xlabel(f"block, ablated at {depth.point}" if (where, way) == rows[-1] else "")
            row[0].set_ylabel("norm exponent a")
        handles, labels = legend_entries(axes.flat)
        own_colour = (
            "latents, across tokens",
            "learned by the SAE",
            "latents, same token rescaled",
        )  # of each panel's SAE
        handles = [
            Line2D([], [], color=KEY, marker=h.get_marker(), ms=5.5, lw=0) if label in own_colour else h
            for h, label in zip(handles, labels, strict=True)
        ]
        figure.legend(handles, labels, loc="outside upper left", ncols=3)
        n, most = (max(g[count] for g in groups) for count in ("n_latents", "n_pairs"))
        words = (
            f"{n} latents of each SAE ({SAMPLED[provenance['sampling']]}), up to {most:,} (latent, token) pairs, "
            f"{patched(provenance, done='ablated')}. {BARS}{null_models(provenance)}"
        )
        write_caption(figure, caption(provenance, words))
    return figure


def _value(way: Any) -> float:
    return way.a.value if way is not None and way.identified else np.nan


def plot_dose(rows: pd.DataFrame, provenance: Mapping[str, Any], latents: Sequence[int] | None = None) -> Figure:
    """KL against the length of what is removed, for six latents from rare to frequent (or those given), coloured by ‖x‖.

    rows: of one SAE, context and model. Crosses: the placebo along the difference of two other tokens, of the same norm and angle. Raises
    `ResultError` for latents without rows.
    """
    sae, context, edit = rows["sae"].iloc[0], rows["context"].iloc[0], provenance["reference"]
    chosen = list(latents or [])
    if latents is None:
        by = rows.drop_duplicates("latent").sort_values(["frequency", "latent"])
        chosen = [int(by["latent"].iloc[i]) for i in np.unique(np.linspace(0, len(by) - 1, 6).round().astype(int))]
    drawable = rows.edit.isin([edit, "placebo_token"]) & (rows.kl > 0)
    shown = cast(pd.DataFrame, rows.loc[rows.latent.isin(chosen) & drawable])
    if shown.empty:
        raise ResultError(f"no rows of latents {chosen} of {sae}; known: {sorted(set(rows.latent))[:8]} ...")
    colours = LogNorm(shown["norm"].quantile(0.01), shown["norm"].quantile(0.99))
    with styled():
        figure, axes = panels(len(chosen), 9.6 / min(3, len(chosen)), 2.7, 1.2, sharex=True, sharey=True)
        drawn = None
        for ax, latent in zip(axes.flat, chosen, strict=False):
            own = shown.loc[shown.latent == latent]
            placebo, main = (cast(pd.DataFrame, own.loc[own.edit == e]) for e in ("placebo_token", edit))
            ax.scatter(
                placebo.delta_norm,
                placebo.kl,
                color=FLOORS["placebo"][0],
                marker="x",
                s=9,
                lw=0.7,
                label="placebo of the same dose",
            )
            fires = np.nan_to_num(main.activation.to_numpy()) != 0
            for some, shape, words in (
                (~fires, "o", "ablation, latent not active"),
                (fires, "^", "ablation, latent active"),
            ):
                if not some.any():
                    continue
                drawn = ax.scatter(
                    main.delta_norm[some], main.kl[some], c=main["norm"][some], norm=colours, cmap=NORMS, marker=shape,
                    s=20 if shape == "^" else 11, lw=0.3, edgecolor=INK if shape == "^" else "none", label=words,
                )  # fmt: skip
            often = own.frequency.iloc[0]
            ax.set_title(f"latent {latent}" + (f", fires on {100 * often:.2g} %" if np.isfinite(often) else ""))
            ax.set_xscale("log")
            ax.set_yscale("log")
        for ax in axes[:, 0]:
            ax.set_ylabel("KL(clean ‖ ablated), nats")
        for ax in axes[-1]:
            ax.set_xlabel("‖Δx‖, length of what is removed")
        assert drawn is not None
        bar = figure.colorbar(drawn, ax=axes, label="‖x‖", shrink=0.6)
        plain_ticks(bar.ax.yaxis)
        handles, labels = legend_entries(axes.flat)
        figure.legend(handles, labels, loc="outside upper left", ncols=3)
        n = shown.groupby("latent").size().max() // 2
        words = f"{sae}, {LABELS[context]}: {n} tokens a latent ({SAMPLED[provenance['sampling']]}), {patched(provenance, done='ablated')}."
        write_caption(figure, caption(provenance, words))
    return figure

"""Figures of projection ablations: norm exponents by depth, KL against dose, win rates by depth and by quartile of the norm."""

from typing import TYPE_CHECKING, Any, cast

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from diagnostics.plots import Depth, caption, plain_ticks, write_caption
from diagnostics.study import TRAINED
from diagnostics.style import (
    BAND,
    COLOURS,
    FLOORS,
    GRID,
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
from interventions.errors import ResultError

if TYPE_CHECKING:
    from diagnostics.contests import Contest, WinRateReport
    from diagnostics.norm_exponent import Exponent
    from diagnostics.projections import ProjectionEffects

A_LIMITS = (-1.6, 2.6)
"""Of the axis of exponents: what lies beyond is drawn at its edge as an arrow."""
_NAMES = {
    "observational": ("observational: across tokens", "o", "full"),
    "interventional": ("interventional: the same token rescaled", "D", "none"),
    "placebo_token": ("its placebo, observational", "v", "full"),
}


def kind(name: str) -> str:
    """What an SAE is called beside others of its depth: the last part of its name."""
    return name.rsplit("/", 1)[-1]


def _whiskers(
    ax: Axes, x: float, value: float, low: float, high: float, colour: str, marker: str, fill: str, label: str
) -> None:
    """A point with its interval; ends beyond the axis are arrows."""
    bottom, top = A_LIMITS
    face = colour if fill == "full" else OPEN
    ends = np.clip([low, high], bottom, top)
    ax.plot([x, x], ends, color=colour, lw=1.2)
    for end, beyond, sign in ((ends[0], low < bottom, -1), (ends[1], high > top, 1)):
        ax.plot(
            [x], [end], color=colour, marker=("v" if sign < 0 else "^") if beyond else "_", ms=4 if beyond else 6, lw=0
        )
    if bottom <= value <= top:
        ax.plot([x], [value], color=colour, marker=marker, mfc=face, ms=5.5, lw=0, label=label)


def _exponents(ax: Axes, at: np.ndarray, ways: list["Exponent | None"], name: str, colour: str) -> None:
    words, marker, fill = _NAMES[name]
    label: str | None = words
    for x, way in zip(at, ways, strict=True):
        if way is None:
            continue
        if not way.identified:
            ax.text(x, A_LIMITS[0] + 0.05, "n. i.", fontsize=6.5, color=colour, ha="center")
            continue
        _whiskers(ax, float(x), way.a.value, way.a.low, way.a.high, colour, marker, fill, label or "_")
        label = None


def plot_exponents(result: "ProjectionEffects", context: str | None = None) -> Figure:
    """The norm exponent a by depth, a panel for each kind of SAE (and context): across tokens, of the same token rescaled, of the
    placebo, and the exponent that the SAE learned.

    Bars: 95 % Fieller intervals from the delete-one-prompt jackknife; n. i.: not identified. Grey lines: untrained networks.
    """
    contexts = [context] if context else result.provenance["context"]
    kinds = list(dict.fromkeys(kind(name) for name in result.saes))
    style = looks(result.saes)
    with styled():
        figure, axes = plt.subplots(
            len(contexts),
            len(kinds),
            figsize=(9.6, 3.4 * len(contexts) + 1.4),
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for row, where in zip(axes, contexts, strict=True):
            for ax, name in zip(row, kinds, strict=True):
                groups = [g for g in result.select(context=where) if kind(g["sae"]) == name]
                if not groups:
                    ax.set_visible(False)
                    continue
                depth = Depth(sorted({g["layer"] for g in groups}), result.points[0])
                at, step = depth.at(groups), 2.2 * depth.step
                colour = style[groups[0]["sae"]][0]
                for i, way in enumerate(("observational", "placebo_token", "interventional")):
                    of = {
                        "observational": colour,
                        "placebo_token": PLACEBO_LOOKS["placebo_token"][0],
                        "interventional": INK,
                    }[way]
                    _exponents(ax, at + (i - 1) * step, [g["exponents"].get(way) for g in groups], way, of)
                learned = [np.nan if g["learned_a"] is None else g["learned_a"]["mean"] for g in groups]
                if np.isfinite(learned).any():
                    ax.plot(
                        at + 2 * step,
                        learned,
                        color=colour,
                        marker="x",
                        ms=6,
                        mew=1.6,
                        lw=0,
                        label="learned by the SAE",
                    )
                for i, label in enumerate(result.null_models):
                    own = [g for g in result.select(label, context=where) if kind(g["sae"]) == name]
                    ways = [g["exponents"].get("observational") for g in own]
                    a = [way.a.value if way is not None and way.identified else np.nan for way in ways]
                    known = np.clip(a, *A_LIMITS)
                    ax.plot(depth.at(own), known, color=UNTRAINED, lw=0.9, marker=".", ms=4, zorder=0,
                            label="untrained networks, across tokens" if i == 0 else None)  # fmt: skip
                for a, words in ((0, "cosine"), (1, "inner product")):
                    ax.axhline(a, color=REFERENCE, lw=0.8, ls="--", zorder=0)
                    ax.text(
                        1.0, a, f" {words}", transform=ax.get_yaxis_transform(), fontsize=7, color=NOTE, va="center"
                    )
                ax.set_ylim(*A_LIMITS)
                ax.set_title(f"{name} SAE, {LABELS[where]}")
                depth.label(ax)
                ax.set_xlabel(f"block, ablated at {depth.point}")
            row[0].set_ylabel("norm exponent a = β_norm / β_cosine")
        handles, labels = _unique([ax for row in axes for ax in row])
        own_colour = (_NAMES["observational"][0], "learned by the SAE")  # of each panel's SAE
        handles = [
            Line2D([], [], color=KEY, marker=h.get_marker(), ms=5.5, lw=0) if label in own_colour else h
            for h, label in zip(handles, labels, strict=True)
        ]
        figure.legend(handles, labels, loc="outside upper left", ncols=3)
        most = max(g["n_pairs"] for g in result.groups)
        words = (
            f"{max(g['n_latents'] for g in result.groups)} latents of each SAE, up to {most:,} (latent, token) pairs of"
        )
        write_caption(figure, _caption(result, words, nulls=True))
    return figure


def _unique(axes: list[Axes]) -> tuple[list[Any], list[str]]:
    found: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


def _caption(result: "ProjectionEffects", rows: str, nulls: bool = False, bars: bool = True) -> str:
    """The caption of a run, with how latents and tokens were drawn; nulls, bars: whether the figure shows untrained networks, intervals."""
    p: dict[str, Any] = result.provenance if nulls else {**result.provenance, "null_models": []}
    how = {
        "stratified": "stratified by frequency, norm and |cos|",
        "active": "the most frequent latents, at active tokens",
    }
    words = caption(p, f"{how[p['sampling']]}: {rows}", bars=bars)
    return words.replace("patched", "ablated")


def plot_dose(
    result: "ProjectionEffects", sae: str | None = None, latents: Any = None, context: str | None = None
) -> Figure:
    """KL against the length of what is removed, for six latents from rare to frequent (or those given), coloured by ‖x‖.

    Crosses: the placebo along the difference of two other tokens, of the same norm and angle.
    """
    groups = result.select(context=context)
    group = next((g for g in groups if g["sae"] == sae), None) if sae else groups[len(groups) // 2]
    if group is None:
        raise ResultError(f"no SAE {sae!r} in this result; known: {', '.join(result.saes)}")
    rows = result.rows(group)
    if latents is None:
        by = rows.drop_duplicates("latent").sort_values(["frequency", "latent"])
        latents = by.latent.to_numpy()[np.unique(np.linspace(0, len(by) - 1, 6).round().astype(int))]
    drawable = rows.edit.isin([result.main, "placebo_token"]) & (rows.kl > 0)
    shown = cast(pd.DataFrame, rows.loc[rows.latent.isin(list(latents)) & drawable])
    if shown.empty:
        raise ResultError(
            f"no rows of latents {list(latents)} of {group['sae']}; known: {sorted(set(rows.latent))[:8]} ..."
        )
    colours = LogNorm(shown["norm"].quantile(0.01), shown["norm"].quantile(0.99))
    columns = min(3, len(latents))
    with styled():
        figure, axes = plt.subplots(
            -(-len(latents) // columns), columns, figsize=(9.6, 2.7 * -(-len(latents) // columns) + 1.2), sharex=True,
            sharey=True, squeeze=False, layout="constrained",
        )  # fmt: skip
        drawn = None
        for ax, latent in zip(axes.flat, latents, strict=False):
            own = shown.loc[shown.latent == latent]
            placebo, main = (cast(pd.DataFrame, own.loc[own.edit == e]) for e in ("placebo_token", result.main))
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
        for ax in axes.flat[len(latents) :]:
            ax.set_visible(False)
        for ax in axes[:, 0]:
            ax.set_ylabel("KL(clean ‖ ablated), nats")
        for ax in axes[-1]:
            ax.set_xlabel("‖Δx‖, length of what is removed")
        assert drawn is not None
        bar = figure.colorbar(drawn, ax=axes, label="‖x‖", shrink=0.6)
        plain_ticks(bar.ax.yaxis)
        handles, labels = _unique(list(axes.flat))
        figure.legend(handles, labels, loc="outside upper left", ncols=3)
        words = f"{group['sae']}, {LABELS[group['context']]}: {shown.groupby('latent').size().max() // 2} tokens a latent of"
        write_caption(figure, _caption(result, words, bars=False))
    return figure


def _bars(
    ax: Axes, x: float, estimate: Any, colour: str, marker: str, label: str | None, face: str | None = None
) -> None:
    if not np.isfinite(estimate.value):
        return
    ends = np.array([[estimate.value - estimate.low], [estimate.high - estimate.value]])
    bars = np.where(np.isfinite(ends), ends, 0).clip(min=0)
    ax.errorbar([x], [estimate.value], bars, color=colour, marker=marker, mfc=face or colour, ms=5, lw=0, elinewidth=1.2,
                capsize=2, label=label)  # fmt: skip


def _band(ax: Axes, x: float, half: float, ends: list[Any], colour: str, alpha: float, label: str | None) -> None:
    """From the lowest to the highest end of some intervals."""
    low = np.nanmin([e.low if np.isfinite(e.low) else e.value for e in ends])
    high = np.nanmax([e.high if np.isfinite(e.high) else e.value for e in ends])
    if np.isfinite(low) and np.isfinite(high):
        ax.add_patch(
            Rectangle((x - half, low), 2 * half, high - low, color=colour, alpha=alpha, lw=0, zorder=0, label=label)
        )


def plot_win_rate(report: "WinRateReport") -> Figure:
    """Win rate of the cosine over the inner product by depth: a row for each run, a column for each kind of SAE.

    Points: the ablations, bars 95 % delete-one-prompt jackknife intervals. Bands: from the lowest to the highest end of the intervals
    of both placebos, which have the same doses and no meaning.
    """
    kinds = list(dict.fromkeys(kind(c.place["sae"]) for c in report.contests))
    runs = list(report.runs)
    with styled():
        figure, axes = plt.subplots(
            len(runs),
            len(kinds),
            figsize=(9.6, 2.9 * len(runs) + 1.6),
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for row, run in zip(axes, runs, strict=True):
            for ax, name in zip(row, kinds, strict=True):
                own = [
                    c
                    for c in report.contests
                    if c.run == run and kind(c.place["sae"]) == name and c.place["model"] == TRAINED
                ]
                if not own:
                    ax.set_visible(False)
                    continue
                depth = Depth(sorted({c.place["layer"] for c in own}), own[0].place["point"])
                for i, context in enumerate(report.runs[run].provenance["context"]):
                    some = [c for c in own if c.place["context"] == context]
                    shift, colour = (i - 0.5) * 2.4 * depth.step, COLOURS[context]
                    for j, c in enumerate(some):
                        x = depth.place[c.place["layer"]] + shift
                        label = LABELS[context] if j == 0 else None
                        _bars(ax, x, c.rates.main.overall.estimate, colour, "o", label)
                        ends = [rates.overall.estimate for rates in c.rates.placebos.values()]
                        if ends:
                            band = None if label is None else f"placebos, {label}"
                            _band(ax, x, depth.step, ends, colour, 0.22, band)
                for i, null in enumerate(report.runs[run].null_models):
                    same = [c for c in report.contests if (c.run, c.place["model"]) == (run, null)]
                    same = [c for c in same if kind(c.place["sae"]) == name and c.place["context"] == "in_place"]
                    y = [c.rates.main.overall.estimate.value for c in same]
                    x = [depth.place[c.place["layer"]] for c in same]
                    words = "untrained networks, in context" if i == 0 else None
                    ax.plot(x, y, color=UNTRAINED, lw=0.9, marker=".", ms=4, zorder=0, label=words)
                ax.axhline(0.5, color=REFERENCE, lw=0.8, zorder=0)
                ax.set_ylim(-0.04, 1.04)
                many = max(c.rates.main.overall.n_latents for c in own)
                title = f"{name} SAE" if len(runs) == 1 else f"{run}: {name} SAE"
                ax.set_title(f"{title}, up to {many} latents")
                depth.label(ax)
                ax.set_xlabel(f"block, ablated at {depth.point}")
            row[0].set_ylabel("win rate of the cosine")
        figure.legend(*_unique([ax for row in axes for ax in row]), loc="outside upper left", ncols=4)
        write_caption(figure, _caption(report.runs[runs[0]], "the first row: (latent, token) pairs of" if len(runs) > 1 else
                         "(latent, token) pairs of", nulls=True))  # fmt: skip
    return figure


def plot_paradox(report: "WinRateReport", run: str | None = None, context: str | None = None) -> Figure:
    """Win rates overall and within each quartile of ‖x‖, a panel for each SAE and depth, with the band that range restriction alone
    predicts and the placebo's rates; above each panel the Simpson labels of the scores."""
    shown: str = next(iter(report.runs)) if run is None else run
    if shown not in report.runs:
        raise ResultError(f"no run {shown!r} in this report; known: {', '.join(report.runs)}")
    where: str = context or report.runs[shown].provenance["context"][0]
    own = [c for c in report.contests if (c.run, c.place["context"], c.place["model"]) == (shown, where, TRAINED)]
    kinds = list(dict.fromkeys(kind(c.place["sae"]) for c in own))
    layers = sorted({c.place["layer"] for c in own})
    with styled():
        figure, axes = plt.subplots(
            len(kinds), len(layers), figsize=(max(9.6, 3.2 * len(layers)), 2.9 * len(kinds) + 1.5), sharex=True, sharey=True,
            squeeze=False, layout="constrained",
        )  # fmt: skip
        style = looks([c.place["sae"] for c in own])
        for row, name in zip(axes, kinds, strict=True):
            for ax, layer in zip(row, layers, strict=True):
                here = [c for c in own if kind(c.place["sae"]) == name and c.place["layer"] == layer]
                if not here:
                    ax.set_visible(False)
                    continue
                _quartile_panel(ax, here[0], style[here[0].place["sae"]][0])
                ax.set_title(f"{name} SAE, block {layer}\n{_labels(here[0])}", fontsize=8.5)
            row[0].set_ylabel("win rate of the cosine")
        for ax in axes[-1]:
            ax.set_xticks(range(5), ["all", "1", "2", "3", "4"])
            ax.set_xlabel("quartile of ‖x‖")
        figure.legend(*_unique([ax for row in axes for ax in row]), loc="outside upper left", ncols=3)
        words = f"{LABELS[where]}: {max(c.rates.main.overall.n_latents for c in own)} latents of each SAE,"
        write_caption(figure, _caption(report.runs[shown], words))
    return figure


def _quartile_panel(ax: Axes, contest: "Contest", colour: str) -> None:
    labels = contest.simpson
    if labels is not None:
        for i, band in enumerate((labels.overall, *labels.quartiles)):
            if np.isfinite(band.low):
                words = "what one fit for all norms predicts (95 %)" if i == 0 else None
                ax.add_patch(
                    Rectangle((i - 0.36, band.low), 0.72, band.high - band.low, color=BAND, lw=0, zorder=0, label=words)
                )
    main, token = contest.rates.main, contest.rates.placebos.get("placebo_token")
    for i, rate in enumerate((main.overall, *main.quartiles)):
        _bars(
            ax, i - 0.1, rate.estimate, colour, "o", f"ablation, {kind(contest.place['sae'])} SAE" if i == 0 else None
        )
    if token is not None:
        for i, rate in enumerate((token.overall, *token.quartiles)):
            _bars(
                ax,
                i + 0.18,
                rate.estimate,
                PLACEBO_LOOKS["placebo_token"][0],
                "v",
                "its placebo" if i == 0 else None,
                OPEN,
            )
    ax.axhline(0.5, color=REFERENCE, lw=0.8, zorder=0)
    ax.axvline(0.5, color=GRID, lw=0.8, zorder=0)
    ax.set_ylim(-0.04, 1.04)
    ax.set_xlim(-0.5, 4.5)


def _labels(contest: "Contest") -> str:
    labels = contest.simpson
    if labels is None:
        return "no labels"
    names = {"cosine": "cos", "inner": "inner", "activation": "z"}
    known = {names[score]: paradox.label for score, paradox in labels.scores.items() if paradox is not None}
    return ", ".join(f"{name}: {label}" for name, label in known.items())

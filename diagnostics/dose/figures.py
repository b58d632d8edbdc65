"""Figures of dose-response results."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diagnostics.figures.axes import (
    BARS,
    Depth,
    caption,
    legend_above,
    null_models,
    panels,
    patched,
    plain_ticks,
    points,
    write_caption,
)
from diagnostics.figures.by_depth import Groups
from diagnostics.figures.looks import (
    EDIT_COLOURS,
    EDIT_LABELS,
    EDIT_MARKERS,
    GIVEN,
    NOTE,
    REFERENCE,
    UNTRAINED,
    legend_label,
    styled,
)
from interventions.errors import ResultError

_NULL_DASHES = {"toward_token": "-", "norm_up": "--"}
_LOWEST_KL, _LOWEST_RATIO = 1e-7, 1e-3
"""Below, an effect is said in words: an axis that holds it would show nothing else."""


def _colour(edit: str, directions: list[str]) -> str:
    return EDIT_COLOURS.get(edit) or GIVEN[directions.index(edit) % len(GIVEN)]


def _label(edit: str) -> str:
    return EDIT_LABELS.get(edit) or legend_label(f"{edit} (given)")


def _without_effect(ax: Axes, what: list[str], end: str = "") -> None:
    """Says which edits are too small to be drawn."""
    if what:
        ax.text(
            0.98,
            0.02,
            f"{' and '.join(what)}: no effect{end}",
            transform=ax.transAxes,
            ha="right",
            fontsize=7.5,
            color=NOTE,
        )


def _some_layers(groups: Groups, at_most: int = 6) -> list[int]:
    layers = sorted({g["layer"] for g in groups})
    which = np.unique(np.linspace(0, len(layers) - 1, min(at_most, len(layers))).round().astype(int))
    return [layers[i] for i in which]


def plot_dose_response(
    groups: Groups, nulls: Sequence[Groups], provenance: Mapping[str, Any], point: str, context: str
) -> Figure:
    """KL against dose ‖Δx‖/‖x‖, log-log, a panel a layer (six at most): edits of equal length along different directions.

    groups: of one point and context, from the trained model; nulls: the same of each randomly initialised model, in grey. Points are
    medians over tokens, bars 95 % intervals over prompts. Raises `ResultError` without groups.
    """
    if not groups:
        raise ResultError(f"no rows at {point} {context} in this result, which the figure shows")
    layers, directions = _some_layers(groups), list(provenance["directions"])
    columns = min(3, len(layers))
    with styled():
        more = 1.5 if columns == 3 else 2.6
        figure, axes = panels(len(layers), 3.3 + 0.6 / columns, 2.9, more, least=5.5, sharex=True, sharey=True)
        for ax, layer in zip(axes.flat, layers, strict=False):
            _dose_panel(ax, [g for g in groups if g["layer"] == layer], nulls, layer, directions)
        for ax in axes[:, 0]:
            ax.set_ylabel("median KL(clean ‖ intervened), nats")
        for ax in axes[-1]:
            ax.set_xlabel("dose ‖Δx‖ / ‖x‖")
        lowest = [y for ax in axes.flat for line in ax.lines for y in np.atleast_1d(line.get_ydata()) if y > _LOWEST_KL]
        axes.flat[0].set_ylim(bottom=min(lowest, default=_LOWEST_KL) / 2)
        legend_above(figure, axes.flat[0], 3 if columns == 3 else 1)
        write_caption(figure, _caption(groups, provenance, point, context))
    return figure


def _dose_panel(ax: Axes, groups: Groups, nulls: Sequence[Groups], layer: int, directions: list[str]) -> None:
    dose = np.array([g["dose"] for g in groups])
    silent = [
        e
        for e in EDIT_LABELS
        if all(g["edits"][e]["median_kl"].value < 10 * g["noise_floor"] for g in groups[:-1] or groups)
    ]
    below = f" below dose {dose.max():g}" if len(dose) > 1 else ""
    _without_effect(ax, [e.replace("_", " ") for e in silent], below)
    for i, edit in enumerate((*EDIT_LABELS, *directions)):
        estimates = [g["edits"][edit]["median_kl"] for g in groups]
        spread = 1.02 ** (i - 2)  # side by side, so that intervals can be told apart
        effect = np.array([e.value > 10 * g["noise_floor"] for e, g in zip(estimates, groups, strict=True)])
        some = [e for e, keep in zip(estimates, effect, strict=True) if keep]
        points(ax, (dose * spread)[effect], some, _colour(edit, directions), _label(edit), EDIT_MARKERS.get(edit, "P"))
    for edit, dashes in _NULL_DASHES.items():
        for i, rows in enumerate(nulls):
            some = [g for g in rows if g["layer"] == layer]
            kl = np.array([g["edits"][edit]["median_kl"].value for g in some])
            kl = np.where(kl > np.array([10 * g["noise_floor"] for g in some]), kl, np.nan)
            label = f"untrained: {EDIT_LABELS[edit]}" if i == 0 else None
            ax.plot([g["dose"] for g in some], kl, color=UNTRAINED, lw=0.9, ls=dashes, zorder=0, label=label)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xticks(dose, [f"{d:g}" for d in dose])
    ax.minorticks_off()
    ax.set_title(f"block {layer}")


def plot_dose_depth(
    groups: Groups, nulls: Sequence[Groups], provenance: Mapping[str, Any], dose: float, point: str, context: str
) -> Figure:
    """By depth at one dose, medians over tokens. Left: KL of each edit over that of an isotropic rotation. Right: direct over total effect.

    The direct effect is that of the change carried straight to the final norm and unembedding: above 1, later blocks undo
    it; below, they amplify it. Groups, nulls, bars and grey lines: as in `plot_dose_response`. Raises `ResultError` for an unknown dose.
    """
    groups, *nulls = ([g for g in some if np.isclose(g["dose"], dose)] for some in (groups, *nulls))
    if not groups:
        raise ResultError(f"no dose {dose:g} in this result; known: {provenance['doses']}")
    depth, directions = Depth(sorted({g["layer"] for g in groups}), point), list(provenance["directions"])
    with styled():
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.6), layout="constrained")
        for i, edit in enumerate(("toward_token", "between_tokens", "norm_up", "norm_down", *directions)):
            versus = "isotropic" if edit in EDIT_LABELS else f"{edit}_placebo_isotropic"
            shift = (i - 1.5) * depth.step
            for ax, value in (
                (left, lambda g, e=edit, v=versus: g["ratios"][f"{e} ÷ {v}"]),
                (right, lambda g, e=edit: g["edits"][e]["direct_over_total"]),
            ):
                colour, marker = _colour(edit, directions), EDIT_MARKERS.get(edit, "P")
                some = [g for g in groups if g["edits"][edit]["median_kl"].value > 10 * g["noise_floor"]]
                points(ax, depth.at(some), [value(g) for g in some], colour, _label(edit), marker, shift)
                if edit not in _NULL_DASHES:
                    continue
                for j, rows in enumerate(nulls):
                    seen = [g["edits"][edit]["median_kl"].value > 10 * g["noise_floor"] for g in rows]
                    y = np.array([value(g).value if s else np.nan for g, s in zip(rows, seen, strict=True)])
                    y[y < _LOWEST_RATIO] = np.nan
                    label = f"untrained: {EDIT_LABELS[edit]}" if j == 0 else None
                    ax.plot(depth.at(rows), y, color=UNTRAINED, lw=0.9, ls=_NULL_DASHES[edit], zorder=0, label=label)
        top = max(depth.layers)
        silent = [
            e.replace("_", " ")
            for g in groups
            for e in ("norm_up", "norm_down")
            if g["layer"] == top and g["edits"][e]["median_kl"].value <= 10 * g["noise_floor"]
        ]
        _without_effect(left, silent, f" at block {top}")
        left.set_ylabel("KL of the edit ÷ KL of an isotropic rotation")
        left.set_title(f"equal dose, {dose:g} ‖x‖")
        right.set_ylabel("direct effect ÷ total effect")
        right.set_title(f"carried straight to the unembedding, dose {dose:g}")
        for ax in (left, right):
            ax.set_yscale("log")
            plain_ticks(ax.yaxis)
            ax.axhline(1, color=REFERENCE, lw=0.8)
            depth.label(ax)
        legend_above(figure, left, 3)
        write_caption(figure, _caption(groups, provenance, point, context))
    return figure


def _caption(groups: Groups, provenance: Mapping[str, Any], point: str, context: str) -> str:
    n = max(g["n_tokens"] for g in groups)
    words = f"{n} tokens {patched(provenance, point=point, context=context)}. {BARS}{null_models(provenance)}"
    return caption(provenance, words)

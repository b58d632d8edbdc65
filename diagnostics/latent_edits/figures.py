"""Figures of steering sweeps, of atoms put in others' places, and of how widely ablations spread."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from diagnostics.figures.axes import BARS, bar_lengths, plain_ticks
from diagnostics.figures.looks import (
    CONDITION_LOOKS,
    GRID,
    KEY,
    NOTE,
    OPEN,
    OTHER,
    PLACEBO_LABELS,
    PLACEBO_LOOKS,
    REFERENCE,
    legend_label,
    looks,
    styled,
)
from diagnostics.latent_edits.interaction_figures import finish
from diagnostics.statistics.estimate import Estimate
from diagnostics.statistics.tables import each, few_prompts, lines_of, mean_of, median_of

MATCHED = "matched_deletion"
"""The edit that substitution is compared with first."""
LOGARITHMIC = ("kl", "probability")
EDIT_LABELS = {
    "latent": "latent", "channel": "channel", "placebo_token": "placebo,\nbetween tokens", "placebo_isotropic": "placebo,\nisotropic",
}  # fmt: skip


def _points(
    ax: Axes,
    x: np.ndarray,
    estimates: list[Estimate],
    colour: str,
    marker: str,
    dash: str,
    label: str | None,
    filled: bool = True,
) -> None:
    ax.errorbar(
        x, [e.value for e in estimates], bar_lengths(estimates), color=colour, marker=marker, ls=dash, ms=4, lw=1, capsize=1.5, elinewidth=0.8, label=label,
        mfc=colour if filled else OPEN,
    )  # fmt: skip


@few_prompts()
def plot_steering(frame: pd.DataFrame, provenance: Mapping[str, Any]) -> Figure:
    """A row of panels an SAE: KL, the target token's logit and probability, and entropy against ‖Δx‖/‖x‖.

    frame: a line for each latent, token, condition and coefficient c, which adds c·s·d at one token. partner: the latent most often active
    with it; joint: both. Placebos: of the same norm and angle (open: of the joint edit). Target: the token that the latent raises most by
    itself, unless given. Grey line: clean.
    """
    measures = {
        "kl": "median KL(clean ‖ steered), nats",
        "logit_change": "change of the target's logit",
        "probability": "probability of the target",
        "entropy": "entropy, nats",
    }
    with styled():
        saes = list(provenance["saes"])
        figure, axes = plt.subplots(
            len(saes), 4, figsize=(12.5, 2.8 * len(saes) + 1.3), squeeze=False, layout="constrained"
        )
        for row, sae in zip(axes, saes, strict=True):
            some = lines_of(frame, sae=sae)
            for (condition,), lines in each(some, ["condition"]):
                edit, _, kind = str(condition).partition("_")
                colour, marker, dash = PLACEBO_LOOKS.get(kind, CONDITION_LOOKS.get(edit, (OTHER, "o", "-")))
                label = f"{edit}: {PLACEBO_LABELS[kind]}" if kind else edit
                groups = [part for _, part in each(lines, ["coefficient"], sort=True)]
                x = np.array([float(part["delta_norm"].sum() / part["norm"].sum()) for part in groups])
                for ax, measure in zip(row, measures, strict=True):
                    scale = "log" if measure in LOGARITHMIC else None
                    means = [
                        median_of(part, measure) if measure == "kl" else mean_of(part, measure, scale)
                        for part in groups
                    ]
                    _points(ax, x, means, colour, marker, dash, label, filled=edit != "joint" or not kind)
            for ax, (measure, label) in zip(row, measures.items(), strict=True):
                ax.set(xscale="log", ylabel=label)
                if f"clean_{measure}" in some:
                    ax.axhline(float(some[f"clean_{measure}"].mean()), color=GRID, lw=0.8, zorder=0)
            row[0].set_yscale("log")
            row[2].set_yscale("log")
            row[1].axhline(0, color=GRID, lw=0.8, zorder=0)
            row[0].set_title(sae)
        for ax in axes[-1]:
            ax.set_xlabel("mean ‖Δx‖ / mean ‖x‖")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=7.5)
        p = provenance
        unit = "the latent's mean |z| where active" if p["unit"] == "activation" else "‖x‖"
        shown = frame.groupby("sae")["latent"].nunique().max()
        words = (
            f"c·s·d added at one token, c = {', '.join(f'{c:g}' for c in p['coefficients'])} × {unit}; {shown} latents an SAE at the same "
            f"{p['n_tokens']} tokens. Placebos: same norm and angle (open: of joint). Grey: clean. {BARS}"
        )
        return finish(figure, p, words)


def plot_substitution(
    groups: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any], atoms: Sequence[str]
) -> Figure:
    """Share of contests that substitution wins (left), and KL of substitution over that of other edits (right), by atom.

    groups: by SAE and atom; atoms: in order. nearest: the decoder row of largest |cosine|; active: another latent active at the token;
    random: any live latent, which is the null.
    """
    saes = list(provenance["saes"])
    style, atoms = looks(saes), [a for a in atoms if any(g["atom"] == a for g in groups)]
    with styled():
        figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.8), width_ratios=(1, 1.5), layout="constrained")
        step, middle = 0.7 / max(1, len(saes)), (len(saes) - 1) / 2
        shades = {"matched_deletion": ("deletion, equal ‖Δx‖", -0.24), "deletion": ("deletion", -0.08),
                  "placebo_token": ("placebo, between tokens", 0.08), "placebo_isotropic": ("placebo, isotropic", 0.24)}  # fmt: skip
        handles = [
            Line2D([], [], color=KEY, marker=m, mfc=KEY if edit == MATCHED else OPEN, ms=4, lw=0, label=label)
            for (edit, (label, _)), m in zip(shades.items(), "osv^", strict=True)
        ]
        for n, sae in enumerate(saes):
            own = [g for g in groups if g["sae"] == sae]
            places = np.array([atoms.index(g["atom"]) for g in own])
            x = places + (n - middle) * step
            _points(axes[0], x, [g["wins"] for g in own], *style[sae], "none", legend_label(sae))
            for (edit, (_, shift)), marker in zip(shades.items(), "osv^", strict=True):
                at, ratios = places + shift + (n - middle) * 0.05, [g[f"KL / {edit}"] for g in own]
                _points(axes[1], at, ratios, style[sae][0], marker, "none", None, filled=edit == MATCHED)
        axes[0].axhline(0.5, color=REFERENCE, lw=0.8)
        axes[1].axhline(1, color=REFERENCE, lw=0.8)
        axes[0].set(
            ylim=(0, 1),
            ylabel="share of (latent, token)",
            title="substitution changes less than\ndeletion of equal ‖Δx‖",
        )
        axes[1].set(yscale="log", ylabel="median KL of substitution / KL of", title="by how much")
        for ax in axes:
            ax.set_xticks(range(len(atoms)), atoms)
            ax.set_xlim(-0.6, len(atoms) - 0.4)
            ax.set_xlabel("atom in the latent's place")
        axes[0].legend(fontsize=7, loc="lower left")
        plain_ticks(axes[1].yaxis)
        axes[1].set_ylim(top=1.6 * axes[1].get_ylim()[1])
        axes[1].legend(handles=handles, fontsize=7, ncols=4, loc="upper left", columnspacing=1.0, handletextpad=0.2)
        most = max(g["rows"] for g in groups)
        words = (
            "nearest: the decoder row of largest |cosine|; active: another latent active at the token; random: any live one (null). "
            f"Up to {most:,} (latent, token) each. {BARS}"
        )
        return finish(figure, provenance, words)


def plot_sparsity(
    groups: Sequence[Mapping[str, Any]],
    clear: Mapping[tuple[str, str], pd.DataFrame],
    horizons: Mapping[tuple[str, str], pd.DataFrame],
    provenance: Mapping[str, Any],
) -> Figure:
    """Sparsity of effects by edit, a faint point a latent (left); median KL along the horizon (right).

    groups: means by SAE and edit; clear: lines clear of rounding, horizons: KL by position, both by SAE and edit. Logits of T positions from
    the edited one on, less their median over the vocabulary. channel: one coordinate of the residual stream set to its mean. Placebos: of
    the latent's norm and angle. Faint: each latent's mean.
    """
    saes = list(provenance["saes"])
    style = looks(saes)
    with styled():
        figure, axes = plt.subplots(1, 2, figsize=(10.4, 3.9), width_ratios=(1.25, 1), layout="constrained")
        for n, sae in enumerate(saes):
            colour, marker = style[sae]
            shift = (n - (len(saes) - 1) / 2) * 0.7 / max(1, len(saes))
            own_groups = {g["edit"]: g for g in groups if g["sae"] == sae}
            for place, edit in enumerate(EDIT_LABELS):
                if edit not in own_groups:
                    continue
                own_mean = [float(some["sparsity"].mean()) for _, some in each(clear[sae, edit], ["latent"])]
                jitter = np.random.default_rng(0).uniform(-0.05, 0.05, len(own_mean))
                axes[0].plot(place + shift - 0.06 + jitter, own_mean, ".", ms=2.5, color=colour, alpha=0.35)
                _points(
                    axes[0],
                    np.array([place + shift + 0.06]),
                    [own_groups[edit]["sparsity"]],
                    colour,
                    marker,
                    "none",
                    legend_label(sae) if place == 0 else None,
                )
                along = horizons[sae, edit]
                own, _, dash = PLACEBO_LOOKS.get(edit, (colour, "", "-" if edit == "latent" else "-."))
                dash = dash if edit != "channel" else "-."
                label = (
                    legend_label(f"{sae}: {edit}")
                    if edit not in PLACEBO_LOOKS
                    else PLACEBO_LABELS[edit]
                    if n == 0
                    else None
                )
                _line(axes[1], along, own, dash, label, band=edit == "latent")
        axes[0].axhline(2 / np.pi, color=REFERENCE, lw=0.8)
        axes[0].text(3.55, 2 / np.pi, "normal numbers ", va="bottom", ha="right", fontsize=7, color=NOTE)
        axes[0].set_xticks(range(len(EDIT_LABELS)), list(EDIT_LABELS.values()))
        axes[0].set(ylim=(0, 0.8), xlim=(-0.6, 3.6), ylabel="(L1/L2)² / (V·T)")
        axes[0].set_title("share of logits that an edit moves")
        axes[0].legend(fontsize=7, loc="lower right")
        axes[1].set(
            yscale="log", xlabel="positions after the edited one", ylabel="median KL, nats", title="how far it reaches"
        )
        axes[1].set_ylim(top=30 * axes[1].get_ylim()[1])
        axes[1].legend(fontsize=7, loc="upper right", ncols=2)
        lost = sum(g["within rounding"] for g in groups)
        words = (
            f"T = {provenance['horizon']} positions from the edit on. channel: one coordinate set to its mean. Faint: each latent's mean. "
            f"{f'{lost} rows within 10 times the rounding error are left out. ' if lost else ''}{BARS}"
        )
        return finish(figure, provenance, words)


def _line(ax: Axes, along: pd.DataFrame, colour: str, dash: str, label: str | None, band: bool) -> None:
    ax.plot(along["position"], along["value"].clip(lower=1e-12), color=colour, ls=dash, label=label)
    if band:
        ax.fill_between(
            along["position"],
            along["low"].clip(lower=1e-12),
            along["high"].clip(lower=1e-12),
            color=colour,
            alpha=0.15,
            lw=0,
        )

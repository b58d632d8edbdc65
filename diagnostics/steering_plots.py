"""Figures of steering sweeps, of atoms put in others' places, and of how widely ablations spread."""

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from diagnostics.frames import each, lines_of
from diagnostics.interaction_plots import INTERVALS, finish
from diagnostics.interaction_summary import mean_of
from diagnostics.plots import plain_ticks
from diagnostics.statistics import Estimate
from diagnostics.style import (
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

if TYPE_CHECKING:
    from diagnostics.effect_sparsity import AblationSparsity
    from diagnostics.steering import Steering
    from diagnostics.substitution import Substitutions

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
    y = np.array([[e.value, e.low, e.high] for e in estimates])
    bars = np.nan_to_num(np.abs(y[:, 1:].T - y[:, 0]), posinf=0)
    ax.errorbar(
        x, y[:, 0], bars, color=colour, marker=marker, ls=dash, ms=4, lw=1, capsize=1.5, elinewidth=0.8, label=label,
        mfc=colour if filled else OPEN,
    )  # fmt: skip


def plot_steering(result: "Steering") -> Figure:
    """A row of panels an SAE: KL, the target token's logit and probability, and entropy against ‖Δx‖/‖x‖."""
    measures = {
        "kl": "KL(clean ‖ steered), nats",
        "logit_change": "change of the target's logit",
        "probability": "probability of the target",
        "entropy": "entropy, nats",
    }
    with styled():
        saes = result.saes
        figure, axes = plt.subplots(
            len(saes), 4, figsize=(12.5, 2.8 * len(saes) + 1.3), squeeze=False, layout="constrained"
        )
        for row, sae in zip(axes, saes, strict=True):
            some = lines_of(result.frame, sae=sae)
            for (condition,), lines in each(some, ["condition"]):
                edit, _, kind = str(condition).partition("_")
                colour, marker, dash = PLACEBO_LOOKS.get(kind, CONDITION_LOOKS.get(edit, (OTHER, "o", "-")))
                label = f"{edit}: {PLACEBO_LABELS[kind]}" if kind else edit
                groups = [part for _, part in each(lines, ["coefficient"], sort=True)]
                x = np.array([float(part["delta_norm"].sum() / part["norm"].sum()) for part in groups])
                for ax, measure in zip(row, measures, strict=True):
                    scale = "log" if measure in LOGARITHMIC else None
                    means = [mean_of(part, measure, scale) for part in groups]
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
        p = result.provenance
        unit = "the latent's mean |z| where active" if p["unit"] == "activation" else "‖x‖"
        shown = result.frame.groupby("sae")["latent"].nunique().max()
        words = (
            f"c·s·d added at one token, c = {', '.join(f'{c:g}' for c in p['coefficients'])} times {unit}; {shown} latents an SAE, each at the same "
            f"{p['n_tokens']} tokens. partner: the latent most often active with it; joint: both. Placebos: of the same norm and angle (open: "
            f"of the joint edit). Target: the token that the latent raises most by itself, unless given; grey line: clean. {INTERVALS}"
        )
        return finish(figure, p, words)


def plot_substitution(result: "Substitutions") -> Figure:
    """Share of contests that substitution wins (left), and KL of substitution over that of other edits (right), by atom."""
    from diagnostics.substitution import ATOMS, EDITS

    style, atoms = looks(result.saes), [a for a in ATOMS if any(g["atom"] == a for g in result.groups)]
    with styled():
        figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.8), width_ratios=(1, 1.5), layout="constrained")
        step = 0.7 / max(1, len(result.saes))
        shades = {"matched_deletion": ("deletion, equal ‖Δx‖", -0.24), "deletion": ("deletion", -0.08),
                  "placebo_token": ("placebo, between tokens", 0.08), "placebo_isotropic": ("placebo, isotropic", 0.24)}  # fmt: skip
        handles = [
            Line2D([], [], color=KEY, marker=m, mfc=KEY if edit == EDITS[1] else OPEN, ms=4, lw=0, label=label)
            for (edit, (label, _)), m in zip(shades.items(), "osv^", strict=True)
        ]
        for n, sae in enumerate(result.saes):
            groups = [g for g in result.groups if g["sae"] == sae]
            x = np.array([atoms.index(g["atom"]) for g in groups]) + (n - (len(result.saes) - 1) / 2) * step
            _points(axes[0], x, [g["wins"] for g in groups], *style[sae], "none", legend_label(sae))
            for (edit, (_, shift)), marker in zip(shades.items(), "osv^", strict=True):
                at = (
                    np.array([atoms.index(g["atom"]) for g in groups]) + shift + (n - (len(result.saes) - 1) / 2) * 0.05
                )
                _points(
                    axes[1],
                    at,
                    [g[f"KL / {edit}"] for g in groups],
                    style[sae][0],
                    marker,
                    "none",
                    None,
                    filled=edit == EDITS[1],
                )
        axes[0].axhline(0.5, color=REFERENCE, lw=0.8)
        axes[1].axhline(1, color=REFERENCE, lw=0.8)
        axes[0].set(
            ylim=(0, 1),
            ylabel="share of (latent, token)",
            title="substitution changes less than\ndeletion of equal ‖Δx‖",
        )
        axes[1].set(yscale="log", ylabel="KL of substitution / KL of", title="by how much")
        for ax in axes:
            ax.set_xticks(range(len(atoms)), atoms)
            ax.set_xlim(-0.6, len(atoms) - 0.4)
            ax.set_xlabel("atom in the latent's place")
        axes[0].legend(fontsize=7, loc="lower left")
        plain_ticks(axes[1].yaxis)
        axes[1].set_ylim(top=1.6 * axes[1].get_ylim()[1])
        axes[1].legend(handles=handles, fontsize=7, ncols=4, loc="upper left", columnspacing=1.0, handletextpad=0.2)
        most = max(g["rows"] for g in result.groups)
        words = (
            f"nearest: the decoder row of largest |cosine|; active: another latent active at the token; random: any live one, which is the null. "
            f"Up to {most:,} (latent, token) each; ratios of sums. {INTERVALS}"
        )
        return finish(figure, result.provenance, words)


def plot_sparsity(result: "AblationSparsity") -> Figure:
    """Sparsity of effects by edit, a faint point a latent (left); mean KL along the horizon (right)."""
    saes, style = result.saes, looks(result.saes)
    with styled():
        figure, axes = plt.subplots(1, 2, figsize=(10.4, 3.9), width_ratios=(1.25, 1), layout="constrained")
        for n, sae in enumerate(saes):
            colour, marker = style[sae]
            shift = (n - (len(saes) - 1) / 2) * 0.7 / max(1, len(saes))
            groups = {g["edit"]: g for g in result.groups if g["sae"] == sae}
            for place, edit in enumerate(EDIT_LABELS):
                if edit not in groups:
                    continue
                clear = result.clear(sae, edit)[0]
                own_mean = [float(some["sparsity"].mean()) for _, some in each(clear, ["latent"])]
                jitter = np.random.default_rng(0).uniform(-0.05, 0.05, len(own_mean))
                axes[0].plot(place + shift - 0.06 + jitter, own_mean, ".", ms=2.5, color=colour, alpha=0.35)
                _points(
                    axes[0],
                    np.array([place + shift + 0.06]),
                    [groups[edit]["sparsity"]],
                    colour,
                    marker,
                    "none",
                    legend_label(sae) if place == 0 else None,
                )
                along = result.horizon(sae, edit)
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
            yscale="log", xlabel="positions after the edited one", ylabel="mean KL, nats", title="how far it reaches"
        )
        axes[1].set_ylim(top=30 * axes[1].get_ylim()[1])
        axes[1].legend(fontsize=7, loc="upper right", ncols=2)
        lost = sum(g["within rounding"] for g in result.groups)
        words = (
            f"One edit at one position; logits of T = {result.provenance['horizon']} positions from there on, less their median over the "
            f"vocabulary. channel: one coordinate of the stream set to its mean. Placebos: of the latent's norm and angle. Faint: each "
            f"latent's mean. {f'{lost} rows within 10 times the rounding error are left out. ' if lost else ''}{INTERVALS}"
        )
        return finish(figure, result.provenance, words)


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

"""Figures of feature ablations."""

import textwrap
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter, NullLocator

from diagnostics.concept_ablation.curves import EVERY, KEEP, Curve
from diagnostics.concept_ablation.equal_effects import EqualEffect
from diagnostics.concept_ablation.summary import measured
from diagnostics.figures.axes import bar_lengths, caption, panels, sink_rule, write_caption
from diagnostics.figures.by_depth import Provenance
from diagnostics.figures.looks import FLOORS, GRID, KEY, NOTE, OPEN, legend_label, legend_looks, looks, styled
from diagnostics.statistics.estimate import Estimate

AXES = {
    "kl": ("KL on texts with the concept, nats", "KL on texts without it, nats"),
    "logit": ("fall of the target logit", "RMS change of other logits"),
    "probe": ("fall of the concept's probe, logits", "mean |change| of other probes, logits"),
}
LEAST = 0.1
"""Smallest ratio of intended to collateral effect that is drawn; smaller intended effects are noise."""
NAMES = {"selected": "selected latents", "random": "random active latents", "placebo": "matched placebo"}


def plot_precision(curves: Sequence[Curve], equal: Sequence[EqualEffect], provenance: Provenance, form: str) -> Figure:
    """Collateral against intended effect by N, a panel a concept, and selectivity at equal intended effect.

    curves, equal: of one form and ranking. Grey: random latents and placebos (see `ARMS`). Diagonal: equal effects. Open, at the bottom: no
    collateral effect. Last panel: selectivity, intended/(intended + collateral), at half the median over SAEs of the largest intended
    effect; small: concepts, large: their mean. Bars: 95 % delete-one-group (or text) jackknife intervals, none below 10 groups.
    """
    saes = list(provenance["saes"])
    concepts = list(dict.fromkeys((c.data, c.concept) for c in curves))
    style = looks(saes)
    with styled():
        figure, axes = panels(len(concepts) + 1, 3.5, 2.9, 1.3)
        flat = list(axes.flat)
        hidden = 0
        for ax, concept in zip(flat, concepts, strict=False):
            hidden += _curves(ax, [c for c in curves if (c.data, c.concept) == concept], style)
            ax.set_title(concept[1] if len({data for data, _ in concepts}) == 1 else f"{concept[0]}: {concept[1]}")
            ax.set_xlabel(AXES[form][0])
            ax.set_ylabel(AXES[form][1])
        last = flat[len(concepts)]
        missed = _equal(last, equal, saes, style)
        figure.legend(handles=_handles(provenance), loc="outside upper center", ncols=4)
        counts = ", ".join(map(str, provenance["counts"]))
        ranking = curves[0].ranking.replace("_", " ")
        words = f"N = {counts} latents ({ranking}). Last panel: half the median of the SAEs' largest effects. {_bars(provenance)}"
        chosen = [c.value for c in curves if c.arm == "selected"]
        if any(((v[:, 0] > 0) & (v[:, 1] == 0)).any() for v in chosen):
            words += " Open, at the bottom: no collateral effect."
        if missed:
            said = ", ".join(f"{NAMES[arm]} in {n}" for arm, n in missed.items())
            words += f" That effect was not reached, of {len(saes) * len(concepts)} SAEs and concepts, by {said}."
        words += f" Not drawn: {hidden} points not above 0." if hidden else ""
        write_caption(figure, _caption(provenance, words))
    return figure


def _curves(ax: Axes, curves: Sequence[Curve], style: dict[str, tuple[str, str]]) -> int:
    """Draws one concept's curves; returns how many points log axes cannot show."""
    hidden = 0
    ends = []
    for c in sorted(curves, key=lambda c: c.arm == "selected"):
        if c.arm == KEEP:
            continue
        shown, clean = (c.value > 0).all(1), (c.value[:, 0] > 0) & (c.value[:, 1] == 0)
        hidden += int((~shown & ~clean).sum())
        x, y = c.value[shown].T
        if c.arm == "selected" and clean.any():  # at the bottom, whatever its scale
            ax.plot(
                c.value[clean, 0], np.full(int(clean.sum()), 0.02), color=style[c.sae][0], marker=style[c.sae][1], mfc=OPEN,
                ms=4, lw=0, transform=ax.get_xaxis_transform(), clip_on=False,
            )  # fmt: skip
        if c.arm != "selected":
            colour, dashes = FLOORS[c.arm]
            ax.plot(x, y, color=colour, ls=dashes, lw=1)
            ax.plot(x, y, color=style[c.sae][0], lw=0, marker=style[c.sae][1], ms=1.8, alpha=0.6)
        else:
            colour, marker = style[c.sae]
            some = [c.estimate(int(k), 1) for k in np.flatnonzero(shown)]
            ax.errorbar(x, y, bar_lengths(some), color=colour, marker=marker, ms=4, lw=1.2, elinewidth=0.6, capsize=0)
            for k in {0, len(x) - 1} if len(x) else ():
                ax.annotate(
                    str(c.counts[shown][k]), (x[k], y[k]), xytext=(4, -8 if k == 0 else 3), textcoords="offset points", fontsize=6.5, color=colour
                )  # fmt: skip
        ends += [x, y]
    every = np.concatenate(ends) if ends else np.zeros(0)
    if any((c.value[:, 0] > 0).any() for c in curves if c.arm == "selected") or len(every):
        ax.set_xscale("log")
    if len(every):
        ax.set_yscale("log")
        ends = [every.min(), every.max()]
        x_ends, y_ends = ax.get_xlim(), ax.get_ylim()
        ax.plot(ends, ends, color=GRID, lw=0.8, zorder=0)
        ax.set_xlim(x_ends)
        ax.set_ylim(max(y_ends[0], every.min() / 5), y_ends[1])
    for axis in (ax.xaxis, ax.yaxis):
        _label_few(axis)
    return hidden


def _label_few(axis: Axis) -> None:
    """Tick labels of a log axis at 1, 2, 5 where it spans less than two decades, else at powers of ten."""
    if axis.get_scale() != "log":
        return
    low, high = axis.get_view_interval()
    axis.set_minor_formatter(NullFormatter())
    if high / low < 100:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 20 else (1, 3)))
        axis.set_major_formatter(FormatStrFormatter("%.3g"))


def _equal(
    ax: Axes, found: Sequence[EqualEffect], saes: list[str], style: dict[str, tuple[str, str]]
) -> dict[str, int]:
    """Draws selectivity at equal intended effect, concepts small, their mean large; returns how many did not reach it, by condition."""
    shifts = {"selected": 0.0, "random": 0.22, "placebo": 0.38}
    missed = {}
    for arm, shift in shifts.items():
        own = [e for e in found if e.arm == arm]
        if lacking := sum(e.selectivity is None for e in own if e.data != EVERY):
            missed[arm] = lacking
        for e in own:
            if e.selectivity is None or not np.isfinite(e.selectivity.value):
                continue
            colour, marker = style[e.sae] if arm == "selected" else (FLOORS[arm][0], style[e.sae][1])
            x, y = saes.index(e.sae) + shift, e.selectivity.value
            if e.data == EVERY:
                ax.errorbar(
                    [x], [y], bar_lengths([e.selectivity]), color=colour, marker=marker, ms=6 if arm == "selected" else 4, lw=0,
                    elinewidth=1.2, capsize=2,
                )  # fmt: skip
            else:
                ax.plot([x - 0.09], [y], color=colour, marker=marker, ms=2.5, lw=0, alpha=0.6)
    if not found:
        ax.text(0.5, 0.5, "no selected latents", transform=ax.transAxes, ha="center", color=NOTE)
    ax.set_ylim(0, 1)
    ax.set_xlim(-0.5, len(saes) - 0.3)
    crowded = len(saes) > 4
    labels = [sae if crowded else "\n".join(textwrap.wrap(sae.replace("/", " "), 10)) for sae in saes]
    ax.set_xticks(range(len(saes)), labels, fontsize=7.5, rotation=50 if crowded else 0, ha="right" if crowded else "center",
                  rotation_mode="anchor" if crowded else "default")  # fmt: skip
    ax.set_ylabel("selectivity")
    ax.set_title("at equal intended effect")
    return missed


def plot_counts(
    means: Sequence[Curve], kept: Sequence[Curve], doses: pd.DataFrame, provenance: Provenance, form: str
) -> Figure:
    """By N: ratio of intended to collateral effect, dose, and the share recovered when only N latents are kept.

    means: over concepts, of one form and ranking; kept: those of `keep` in the KL form; doses: lines of the selected latents. Bars: 95 % delete-one-group (or text) jackknife intervals, of ratios on the log scale.
    """
    style = looks(list(provenance["saes"]))
    with styled():
        figure, axes = plt.subplots(1, 3 if kept else 2, figsize=(10.5 if kept else 7.5, 4.6), layout="constrained")
        for c in means:
            if c.arm != KEEP:
                some = [c.log_ratio(k) for k in range(len(c.counts))]
                _by_count(axes[0], c, some, style)
        axes[0].axhline(1, color=GRID, lw=0.8, zorder=0)
        axes[0].set_yscale("log")
        low, high = axes[0].get_ylim()
        axes[0].set_ylim(max(low, LEAST), high)
        unseen = sum(e.value < LEAST for c in means if c.arm != KEEP for e in map(c.log_ratio, range(len(c.counts))))
        axes[0].set_ylabel(f"intended / collateral ({form})")
        axes[0].set_title("precision")
        _doses(axes[1], doses, style)
        if kept:
            for c in kept:
                for part, dashes in ((0, "-"), (1, "--")):
                    some = [c.recovered(k, part) for k in range(1, len(c.counts))]
                    _line(axes[2], c.counts[1:], some, *style[c.sae], dashes)
            axes[2].axhline(1, color=GRID, lw=0.8, zorder=0)
            axes[2].set_ylabel("1 − KL / KL with none kept")
            axes[2].set_title("only the top N kept")
        for ax in axes:
            ax.set_xscale("log")
            ax.set_xticks(provenance["counts"], list(map(str, provenance["counts"])), fontsize=7.5)
            ax.xaxis.set_minor_locator(NullLocator())
            ax.set_xlabel("N latents")
        figure.legend(handles=_handles(provenance, sides=True), loc="outside upper center", ncols=4)
        ranking = means[0].ranking.replace("_", " ")
        unseen = f" {unseen} points below {LEAST:g} are not drawn." if unseen else ""
        words = f"Means over concepts, latents by {ranking}. Left: {form} form.{unseen} {_bars(provenance)}"
        write_caption(figure, _caption(provenance, words))
    return figure


def _by_count(ax: Axes, c: Curve, some: list[Estimate], style: dict[str, tuple[str, str]]) -> None:
    if c.arm == "selected":
        _line(ax, c.counts, some, *style[c.sae], "-")
    else:
        colour, dashes = FLOORS[c.arm]
        value = np.array([e.value for e in some])
        ax.plot(c.counts, value, color=colour, ls=dashes, lw=1)
        ax.plot(c.counts, value, color=style[c.sae][0], marker=style[c.sae][1], ms=2, lw=0, alpha=0.6)


def _line(ax: Axes, counts: np.ndarray, some: list[Estimate], colour: str, marker: str, dashes: str) -> None:
    value = np.array([e.value for e in some])
    shown = np.isfinite(value)
    bars = bar_lengths(some)[:, shown]
    ax.errorbar(
        counts[shown], value[shown], bars, color=colour, marker=marker, ms=4, lw=1.2, ls=dashes, elinewidth=0.8,
        mfc=colour if dashes == "-" else OPEN,
    )  # fmt: skip


def _doses(ax: Axes, rows: pd.DataFrame, style: dict[str, tuple[str, str]]) -> None:
    for sae, (colour, marker) in style.items():
        for own, dashes in ((True, "-"), (False, "--")):
            some = rows.loc[(rows["sae"] == sae) & (rows["own"] == own)].groupby("count")["delta_square"].mean()
            ax.plot(
                some.index, some.to_numpy(), color=colour, marker=marker, ms=4, lw=1.2, ls=dashes, mfc=colour if own else OPEN
            )  # fmt: skip
    ax.set_yscale("log")
    ax.set_ylabel("mean ‖Δx‖²")
    ax.set_title("dose")


def _handles(provenance: Provenance, sides: bool = False) -> list[Line2D]:
    found = [
        Line2D([], [], color=colour, marker=marker, ms=4, lw=1.2, label=legend_label(name))
        for name, (colour, marker) in legend_looks(list(provenance["saes"])).items()
    ]
    for arm, (colour, dashes) in FLOORS.items():
        if arm in provenance["arms"]:
            found.append(Line2D([], [], color=colour, ls=dashes, lw=1, label=NAMES[arm]))
    if sides:
        found.append(Line2D([], [], color=KEY, marker="o", ms=4, lw=1.2, label="texts with the concept"))
        found.append(Line2D([], [], color=KEY, marker="o", mfc=OPEN, ls="--", ms=4, lw=1.2, label="texts without it"))
    return found


def _bars(provenance: Provenance) -> str:
    measured = [found["measured"] for found in provenance["texts"].values()]
    grouped = any(found["groups"] < found["texts"] for found in measured)
    return f"Bars: 95 %, delete-one-{'group' if grouped else 'text'} jackknife."


def _caption(provenance: Provenance, words: str) -> str:
    p = provenance
    texts = "; ".join(f"{name}: {measured(found)}" for name, found in p["texts"].items())
    reads = f"{p['reads']} tokens a text" if p["reads"] else "all tokens"
    sinks = sink_rule(p, "position 0, special tokens")
    return caption(p, words, texts=f"{texts}, effects at {reads}", sinks=sinks)

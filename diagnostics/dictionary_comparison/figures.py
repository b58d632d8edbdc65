"""Figures of comparisons of dictionaries."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from diagnostics.dictionary_comparison.summary import quartiles_said
from diagnostics.figures.axes import BARS, caption, panels, text_names, write_caption
from diagnostics.figures.looks import GRID, INK, OPEN, OTHER, REFERENCE, SHARES, legend_label, looks, styled
from diagnostics.statistics.estimate import MISSING

Line = Mapping[str, Any]
MOST = 6
"""Largest number of panels."""


def plot_quartiles(lines: Sequence[Line], provenance: Mapping[str, Any]) -> Figure:
    """Share of firing in each quartile of ‖x‖: matched latents, and those unique to either SAE; a panel a pair of SAEs.

    lines: of each SAE against each other. Pairs of different kinds, the first of each; only where there are none, pairs of seeds; six at most.
    Grey line: 25 %. Bars: 95 % delete-one-prompt jackknife, matches and quartiles held fixed.
    """
    pairs, of = _shown(provenance), {(line["sae"], line["other"]): line for line in lines}
    style = looks(list(provenance["saes"]))
    with styled():
        figure, axes = panels(min(len(pairs), MOST), 3.4, 2.9, 1.3, least=6.8, sharey=True)
        for ax, (a, b) in zip(axes.flat, pairs, strict=False):
            one, other = of[a, b], of[b, a]
            unlike = style[a][0] != style[b][0]
            drawn = (
                (one, "matched", INK, "o", f"matched: {one['matched']:,}"),
                (one, "unique", style[a][0], style[a][1], f"only in {a}: {one['unique']:,}"),
                (other, "unique", style[b][0] if unlike else OTHER, style[b][1], f"only in {b}: {other['unique']:,}"),
            )
            for shift, (line, kind, colour, marker, label) in zip((-0.06, 0, 0.06), drawn, strict=True):
                _quartile_line(ax, line, kind, colour, marker, label, shift)
            ax.axhline(25, color=GRID, lw=0.8, zorder=0)
            ax.set_xticks(range(4), ["Q1", "Q2", "Q3", "Q4"])
            ax.set_xlabel("quartile of ‖x‖")
            ax.legend(loc="upper left", fontsize=7.5, handlelength=1.2)
        top = max(ax.get_ylim()[1] for ax in axes.flat)
        for ax in axes.flat:
            ax.set_ylim(0, 1.35 * top)
        for ax in axes[:, 0]:
            ax.set_ylabel("share of a latent's firing, %")
        words = f"Means over latents. {_rule(provenance)} {BARS}"
        if len(pairs) > MOST:
            words += f" {MOST} of {len(pairs)} pairs are shown."
        write_caption(figure, _caption(provenance, words))
    return figure


def _shown(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The pairs of SAEs for panels."""
    every = list(provenance["saes"])
    mates = [set(names) for names in provenance["seed_groups"].values()]
    first = [n for n in every if not any(n in group and n != min(group, key=every.index) for group in mates)]
    names = first if len(first) > 1 else every
    return [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]


def _quartile_line(ax: Axes, line: Line, kind: str, colour: str, marker: str, label: str, shift: float) -> None:
    if quartiles_said(line, kind) == MISSING:  # there is no such latent: the legend says so
        ax.plot([], [], color=colour, marker=marker, ms=4.5, lw=1.1, label=label)
        return
    found = [line[f"{kind}_q{q}"] for q in range(1, 5)]
    value = 100 * np.array([f["value"] for f in found])
    ends = [[value[i] if f[end] is None else 100 * f[end] for i, f in enumerate(found)] for end in ("low", "high")]
    bars = np.array([value - ends[0], ends[1] - value]).clip(min=0)
    ax.errorbar(
        np.arange(4) + shift, value, bars, color=colour, marker=marker, ms=4.5, lw=1.1, capsize=1.8, label=label
    )


def plot_stability(lines: Sequence[Line], provenance: Mapping[str, Any]) -> Figure:
    """Mean MCS (left) and share of matched latents (right) of each SAE (row) in each other (column); seeds of one kind framed.

    lines: of each SAE against each other. Chance, left: random rows with the other's covariance; right: activations on other prompts'
    tokens. Framed SAEs differ in their training seed alone; seeds are points, without an interval.
    """
    names = list(provenance["saes"])
    n = len(names)
    width = max(8.2, 2 * (1.6 + 0.62 * n))
    with styled():
        figure, axes = plt.subplots(1, 2, figsize=(width, 0.42 * width + 1.2), layout="constrained")
        chance = []
        for ax, column, title in (
            (axes[0], "mcs", "mean of a latent's largest decoder cosine (MCS)"),
            (axes[1], "matched_share", "share of usable latents matched one to one"),
        ):
            table, alike = np.full((n, n), np.nan), np.zeros((n, n), dtype=bool)
            for line in lines:
                place = names.index(line["sae"]), names.index(line["other"])
                table[place] = np.nan if line[column] is None else line[column]
                alike[place] = bool(line["same_seed"])
            ax.imshow(table, vmin=0, vmax=1, cmap=SHARES)
            for (i, j), value in np.ndenumerate(table):
                if np.isfinite(value):
                    colour = OPEN if value > 0.6 else INK
                    ax.text(
                        j,
                        i,
                        f"{value:.2f}{'*' if alike[i, j] else ''}",
                        ha="center",
                        va="center",
                        fontsize=7.5,
                        color=colour,
                    )
            ax.set_xticks(range(n), names, rotation=45, ha="right")
            ax.set_yticks(range(n), names if ax is axes[0] else [""] * n)
            ax.set_title(title, fontsize=9)
            ax.spines[:].set_visible(False)
            ax.tick_params(length=0)
            for group in provenance["seed_groups"].values():
                _frame(ax, sorted(names.index(name) for name in group))
            null = "mcs_null_covariance" if column == "mcs" else "matched_share_null"
            chance.append([line[null] for line in lines if line[null] is not None])
        axes[0].set_ylabel("latents of")
        for ax in axes:
            ax.set_xlabel("looked for in")
        words = f"Chance, left: {_range(chance[0])}; right: {_range(chance[1])}. {_rule(provenance)} Framed: seeds."
        words += " *: trained from one seed." if any(line["same_seed"] for line in lines) else ""
        write_caption(figure, _caption(provenance, words))
    return figure


def _frame(ax: Axes, places: list[int]) -> None:
    if places == list(range(places[0], places[0] + len(places))):
        corner, size = places[0] - 0.5, len(places)
        ax.add_patch(Rectangle((corner, corner), size, size, fill=False, ec=INK, lw=1.2, clip_on=False))
        return
    for i in places:
        for j in places:
            if i != j:
                ax.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, ec=INK, lw=1.2))


def _range(values: list[float]) -> str:
    low, high = (f"{end:.2f}" for end in (min(values, default=np.nan), max(values, default=np.nan)))
    return low if low == high else f"{low} to {high}"


GRADIENTS = {
    "gradient": "squared error by the encoder row wᵢ",
    "sensitivity": "activation by the input",
    "error": "squared error by zᵢ: no factor ‖x_c‖",
    "error_norm": "squared error by zᵢ, times ‖x_c‖",
}


def plot_gradients(frame: pd.DataFrame, lines: Sequence[Line], provenance: Mapping[str, Any]) -> Figure:
    """Distributions over latents of a gradient's mean norm in the fourth quartile of ‖x‖ over that in the first, a panel a gradient.

    See `EntryGradients`. Top: of a token's squared error by the encoder row, whose factor depends on the score (‖x_c‖ for an inner product,
    about ‖x_c‖^a for a cosine), and of the activation by the input. Bottom: the same squared error without a factor of the norm, and with
    ‖x_c‖ for every score. Curves: share of latents above. frame: a row a latent; lines: by SAE.
    """
    names, dashes = list(provenance["saes"]), ("-", "--", ":", "-.")
    style = looks(names)
    colours = [style[name][0] for name in names]
    of = {line["sae"]: line for line in lines}
    every = np.concatenate([frame[f"{kind}_ratio"].dropna().to_numpy(float) for kind in GRADIENTS])
    low, high = (np.quantile(every, q) for q in (0.002, 0.998))
    with styled():
        figure, axes = plt.subplots(2, 2, figsize=(9.2, 7.6), sharex=True, sharey=True, layout="constrained")
        for ax, (kind, title) in zip(axes.flat, GRADIENTS.items(), strict=True):
            for i, (name, colour) in enumerate(zip(names, colours, strict=True)):
                own = frame.loc[frame["sae"] == name, f"{kind}_ratio"].dropna().to_numpy(float)
                if not len(own):
                    continue
                x = np.r_[min(low, 0.5) / 2, np.sort(own), max(high, 3) * 3]
                y = np.r_[100, 100 * (1 - np.arange(len(own)) / len(own)), 0]
                label = legend_label(f"{name}: {_above(of[name][f'{kind}_above_2'])}")
                dash = dashes[colours[:i].count(colour) & 3]
                ax.step(x, y, where="pre", color=colour, ls=dash, lw=1.2, label=label)
            ax.axvline(2, color=REFERENCE, lw=0.8)
            ax.set_title(f"gradient of the {title}", fontsize=9)
            ax.legend(title="above 2", loc="upper right", fontsize=7, title_fontsize=7.5)
        axes[0, 0].set_xscale("log", base=2)
        axes[0, 0].set_xlim(min(low, 0.5) / 1.1, max(high, 3) * 2.2)  # room for the legend
        for ax in axes[1]:
            ax.set_xlabel("mean norm in Q4 of ‖x‖ ÷ in Q1")
        for ax in axes[:, 0]:
            ax.set_ylabel("share of latents above, %")
        words = (
            f"Latents with at least {provenance['min_quartile']} active tokens in the first and the fourth quartile. Compare scores in the lower "
            "panels: there the factor is the same. Intervals: 95 %, over prompts."
        )
        write_caption(figure, _caption(provenance, words))
    return figure


def _above(found: Line) -> str:
    if found["value"] is None:
        return "none known"
    ends = "" if found["low"] in (None, found["high"]) else f" [{100 * found['low']:.0f}, {100 * found['high']:.0f}]"
    return f"{100 * found['value']:.0f} %{ends}"


def plot_alignment(frame: pd.DataFrame, lines: Sequence[Line], provenance: Mapping[str, Any]) -> Figure:
    """Each live latent's MCS against its alignment, a panel an SAE; the cosine of w and d where alignment does not vary.

    frame: a row a latent; lines: alignment by SAE. MCS: mean over the SAE's other training seeds, or, where it has none, over all other SAEs.
    """
    in_groups = {name for names in provenance["seed_groups"].values() for name in names}

    def draw(ax: Axes, name: str, colour: str, column: str, facts: Line) -> None:
        own = frame.loc[(frame["sae"] == name) & (frame["fired"] > 0)]
        y = own["mcs_seeds" if name in in_groups else "mcs_mean"]
        ax.scatter(own[column], y, s=4, alpha=0.25, color=colour, lw=0, rasterized=True)
        r = facts[f"{column}_mcs_pearson"]
        text = "does not vary" if r is None else f"r = {r:.2f}".replace("-", "−")
        ax.text(0.03, 0.97, text, transform=ax.transAxes, va="top", fontsize=8)
        ax.set_ylim(0, 1.13)

    words = "MCS: mean over the SAE's other seeds, else over all other SAEs. Live latents; r: Pearson's, no interval."
    return _panels(frame, lines, provenance, draw, "MCS", words)


def plot_effect(frame: pd.DataFrame, lines: Sequence[Line], provenance: Mapping[str, Any]) -> Figure:
    """Mean KL of ablating a latent, over that of its matched placebo, against its alignment; a panel an SAE.

    frame: a row a latent; lines: alignment by SAE. KL(clean ‖ ablated) of x − z_i d_i at tokens where the latent is active, mean over
    tokens; placebo: an edit of the same norm and angle, turned along the difference of two other tokens. Latents come from bins of log
    frequency; the area of a dot is the number of live latents it represents. ρ: Spearman's, weighted so, with 95 % delete-one-prompt intervals.
    """

    def draw(ax: Axes, name: str, colour: str, column: str, facts: Line) -> None:
        own = frame.loc[(frame["sae"] == name) & (frame["kl"] > 0) & (frame["kl_placebo_token"] > 0)]
        area = 8 * own["latent_weight"] / own["latent_weight"].mean()
        ax.scatter(own[column], own["kl"] / own["kl_placebo_token"], s=area, alpha=0.5, color=colour, lw=0)
        ax.axhline(1, color=REFERENCE, lw=0.8)
        ax.set_yscale("log")
        lines = []
        for effect, label in (("kl_over_placebo", "ρ"), ("kl", "ρ, KL alone"), ("delta_norm", "ρ, dose")):
            found = facts[f"{column}_{effect}_spearman"]
            if found["value"] is not None:
                ends = "" if found["low"] in (None, found["high"]) else f" [{found['low']:.2f}, {found['high']:.2f}]"
                lines.append(f"{label} = {found['value']:.2f}{ends}".replace("-", "−"))
        ax.text(0.03, 0.98, "\n".join(lines), transform=ax.transAxes, va="top", fontsize=7.5)

    p = provenance
    words = (
        f"{p['causal_latents']} latents an SAE, up to {p['causal_tokens']} tokens each; area: latents represented. ρ: weighted Spearman's, 95 %, "
        "delete-one-prompt jackknife."
    )
    return _panels(frame, lines, provenance, draw, "KL of ablation ÷ KL of placebo", words)


def _panels(
    frame: pd.DataFrame,
    lines: Sequence[Line],
    provenance: Mapping[str, Any],
    draw: Callable[[Axes, str, str, str, Line], None],
    label: str,
    words: str,
) -> Figure:
    facts = {line["sae"]: line for line in lines}
    known = set(frame.loc[frame["alignment"].notna(), "sae"])
    names, style = [name for name in provenance["saes"] if name in known], looks(list(provenance["saes"]))
    with styled():
        figure, axes = panels(len(names), 3.1, 2.6, 1.2, least=6.4, sharey=True)
        for ax, name in zip(axes.flat, names, strict=False):
            spread = facts[name]["alignment_sd"] or 0.0
            column = "alignment" if spread > 1e-3 else "alignment_cosine"
            draw(ax, name, style[name][0], column, facts[name])
            ax.set_title(name, fontsize=9)
            ax.set_xlabel("alignment ⟨wᵢ, dᵢ⟩" if column == "alignment" else "cosine of wᵢ and dᵢ")
        if axes[0, 0].get_yscale() == "log":  # room for the words
            bottom, top = axes[0, 0].get_ylim()
            axes[0, 0].set_ylim(bottom, top * (top / bottom) ** 0.4)
        for ax in axes[:, 0]:
            ax.set_ylabel(label)
        write_caption(figure, _caption(provenance, words))
    return figure


def _rule(provenance: Mapping[str, Any]) -> str:
    p = provenance
    return (
        f"Matched: correlation ≥ {p['correlation']:g}, decoder cosine > {p['cosine']:g}, one to one; active on ≥ {p['min_active']} "
        "tokens."
    )


def _caption(provenance: Mapping[str, Any], words: str) -> str:
    p = provenance
    texts = f"{p['counted']:,} tokens of {p['prompts']} prompts of {text_names(p)}, seed {p['seed']}"
    return caption(p, words, texts=texts, place=p["site"])

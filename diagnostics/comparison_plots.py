"""Figures of comparisons of dictionaries."""

import textwrap
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from diagnostics.comparison_summary import quartiles_said
from diagnostics.plots import write_caption
from diagnostics.style import GRID, INK, OPEN, OTHER, REFERENCE, SHARES, legend_label, looks, styled

if TYPE_CHECKING:
    from diagnostics.dictionary_comparison import DictionaryComparison

MOST = 6
"""Pairs, or SAEs, that a figure of panels shows."""


def plot_quartiles(result: "DictionaryComparison") -> Figure:
    """Share of firing in each quartile of ‖x‖: matched latents, and those unique to either SAE; a panel a pair of SAEs.

    Pairs of different kinds, the first of each; only where there are none, pairs of seeds. Bars: 95 % delete-one-prompt jackknife.
    """
    pairs = _shown(result)
    columns = min(3, len(pairs))
    lines = -(-min(len(pairs), MOST) // columns)
    style, width = looks(result.names), max(3.4 * columns, 6.8)
    with styled():
        figure, axes = plt.subplots(
            lines, columns, figsize=(width, 2.9 * lines + 1.3), sharey=True, layout="constrained", squeeze=False
        )
        for ax, (a, b) in zip(axes.flat, pairs, strict=False):
            one, other = result.pair(a, b), result.pair(b, a)
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
        for ax in axes.flat[len(pairs) :]:
            ax.set_visible(False)
        words = (
            "Mean over latents of the share of their firing in each quartile; grey line: 25 %. "
            f"{_rule(result)} Bars: 95 % delete-one-prompt jackknife intervals, matches and quartiles held fixed"
        )
        if len(pairs) > MOST:
            words += f". {MOST} of {len(pairs)} pairs are shown"
        write_caption(figure, caption(result, words, width))
    return figure


def _shown(result: "DictionaryComparison") -> list[tuple[str, str]]:
    """Pairs that a panel each is given to."""
    mates = [set(names) for names in result.provenance["seed_groups"].values()]
    first = [
        n for n in result.names if not any(n in group and n != min(group, key=result.names.index) for group in mates)
    ]
    names = first if len(first) > 1 else result.names
    return [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]


def _quartile_line(
    ax: Axes, line: dict[str, Any], kind: str, colour: str, marker: str, label: str, shift: float
) -> None:
    if quartiles_said(line, kind) == "-":  # there is no such latent: the legend says so
        ax.plot([], [], color=colour, marker=marker, ms=4.5, lw=1.1, label=label)
        return
    found = [line[f"{kind}_q{q}"] for q in range(1, 5)]
    value = 100 * np.array([f["value"] for f in found])
    ends = [[value[i] if f[end] is None else 100 * f[end] for i, f in enumerate(found)] for end in ("low", "high")]
    bars = np.array([value - ends[0], ends[1] - value]).clip(min=0)
    ax.errorbar(
        np.arange(4) + shift, value, bars, color=colour, marker=marker, ms=4.5, lw=1.1, capsize=1.8, label=label
    )


def plot_stability(result: "DictionaryComparison") -> Figure:
    """Mean MCS (left) and share of matched latents (right) of each SAE (row) in each other (column); seeds of one kind framed."""
    names, n = result.names, len(result.names)
    width = max(8.2, 2 * (1.6 + 0.62 * n))
    with styled():
        figure, axes = plt.subplots(1, 2, figsize=(width, 0.42 * width + 1.2), layout="constrained")
        chance = []
        for ax, column, title in (
            (axes[0], "mcs", "mean of a latent's largest decoder cosine (MCS)"),
            (axes[1], "matched_share", "share of usable latents matched one to one"),
        ):
            table, alike = np.full((n, n), np.nan), np.zeros((n, n), dtype=bool)
            for line in result.groups:
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
            for group in result.provenance["seed_groups"].values():
                _frame(ax, sorted(names.index(name) for name in group))
            null = "mcs_null_covariance" if column == "mcs" else "matched_share_null"
            chance.append([line[null] for line in result.groups if line[null] is not None])
        axes[0].set_ylabel("latents of")
        for ax in axes:
            ax.set_xlabel("looked for in")
        words = (
            f"Left: over live latents; chance (random rows with the other's covariance): {_range(chance[0])}. Right: {_rule(result)} "
            f"Chance (activations on other prompts' tokens): {_range(chance[1])}. Framed: SAEs that differ in their training seed "
            "alone; seeds are points, without an interval. *: both trained from one seed"
        )
        write_caption(figure, caption(result, words, width))
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


def plot_gradients(result: "DictionaryComparison") -> Figure:
    """Distributions over latents of the gradient's mean norm in the fourth quartile of ‖x‖ over that in the first.

    Left: of a token's squared error by the encoder's row; right: of the activation by the input. Lines: share of latents above.
    """
    style, width, dashes = looks(result.names), 9.2, ("-", "--", ":", "-.")
    used: dict[str, int] = {}
    with styled():
        figure, axes = plt.subplots(1, 2, figsize=(width, 4.3), sharey=True, layout="constrained")
        lines = {line["sae"]: line for line in result.lines["saes"]}
        values = {kind: result.frame[f"{kind}_ratio"].dropna().to_numpy(float) for kind in ("gradient", "sensitivity")}
        low, high = (np.quantile(np.concatenate(list(values.values())), q) for q in (0.002, 0.998))
        for name in result.names:
            colour = style[name][0]
            dash = dashes[used.setdefault(colour, -1) + 1 & 3]
            used[colour] += 1
            for ax, kind in zip(axes, ("gradient", "sensitivity"), strict=True):
                own = result.frame.loc[result.frame["sae"] == name, f"{kind}_ratio"].dropna().to_numpy(float)
                if not len(own):
                    continue
                x = np.sort(own)
                share = 100 * (1 - np.arange(len(x)) / len(x))
                label = legend_label(f"{name}: {_above(lines[name][f'{kind}_above_2'])}")
                ax.step(
                    np.r_[min(low, 0.5) / 2, x, max(high, 3) * 3],
                    np.r_[100, share, 0],
                    where="pre",
                    color=colour,
                    ls=dash,
                    lw=1.2,
                    label=label,
                )
        for ax, title in zip(
            axes, ("of a token's squared error by the encoder row", "of the activation by the input"), strict=True
        ):
            ax.axvline(2, color=REFERENCE, lw=0.8)
            ax.set_xscale("log", base=2)
            ax.set_xlim(min(low, 0.5) / 1.1, max(high, 3) * 2.2)  # room for the legend
            ax.set_xlabel("mean norm in Q4 of ‖x‖ ÷ in Q1")
            ax.set_title(f"gradient {title}", fontsize=9)
            ax.legend(title="above 2", loc="upper right", fontsize=7, title_fontsize=7.5)
        axes[0].set_ylabel("share of latents above, %")
        words = (
            f"Latents with at least {result.provenance['min_quartile']} active tokens in the first and the fourth quartile. "
            "Of the activation: 1 on all tokens where the score is an inner product. Intervals: 95 % delete-one-prompt jackknife"
        )
        write_caption(figure, caption(result, words, width))
    return figure


def _above(found: dict[str, Any]) -> str:
    if found["value"] is None:
        return "none known"
    ends = "" if found["low"] in (None, found["high"]) else f" [{100 * found['low']:.0f}, {100 * found['high']:.0f}]"
    return f"{100 * found['value']:.0f} %{ends}"


def plot_alignment(result: "DictionaryComparison") -> Figure:
    """Each live latent's MCS against its alignment, a panel an SAE; the cosine of w and d where alignment does not vary."""
    in_groups = {name for names in result.provenance["seed_groups"].values() for name in names}

    def draw(ax: Axes, name: str, colour: str, column: str, facts: dict[str, Any]) -> None:
        own = result.frame.loc[(result.frame["sae"] == name) & (result.frame["fired"] > 0)]
        y = own["mcs_seeds" if name in in_groups else "mcs_mean"]
        ax.scatter(own[column], y, s=4, alpha=0.25, color=colour, lw=0, rasterized=True)
        r = facts[f"{column}_mcs_pearson"]
        text = "does not vary" if r is None else f"r = {r:.2f}".replace("-", "−")
        ax.text(0.03, 0.97, text, transform=ax.transAxes, va="top", fontsize=8)
        ax.set_ylim(0, 1.13)

    words = (
        "MCS: mean over the SAE's other training seeds, or, where it has none, over all other SAEs. Live latents; r: Pearson's, "
        "over latents, which are no sample"
    )
    return _panels(result, draw, "MCS", words)


def plot_effect(result: "DictionaryComparison") -> Figure:
    """Mean KL of ablating a latent, over that of its matched placebo, against its alignment; a panel an SAE."""

    def draw(ax: Axes, name: str, colour: str, column: str, facts: dict[str, Any]) -> None:
        own = result.frame.loc[
            (result.frame["sae"] == name) & (result.frame["kl"] > 0) & (result.frame["kl_placebo_token"] > 0)
        ]
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

    p = result.provenance
    words = (
        f"x − zᵢdᵢ at up to {p['causal_tokens']} tokens where a latent is active, {p['causal_latents']} latents of each SAE from bins of log "
        "frequency; KL(clean ‖ ablated) at the token, mean over tokens, over the same of a placebo with the norm and angle of what is left, "
        "turned along the difference of two other tokens. ρ: Spearman's over latents, each weighted by how many live ones of the SAE it stands for (area of "
        "the dots), with 95 % delete-one-prompt jackknife intervals"
    )
    return _panels(result, draw, "KL of ablation ÷ KL of placebo", words)


def _panels(result: "DictionaryComparison", draw: Any, label: str, words: str) -> Figure:
    facts = {line["sae"]: line for line in result.lines["alignment"]}
    known = set(result.frame.loc[result.frame["alignment"].notna(), "sae"])
    names = [name for name in result.names if name in known]
    columns = min(3, len(names))
    lines, width, style = -(-len(names) // columns), max(3.1 * columns, 6.4), looks(result.names)
    with styled():
        figure, axes = plt.subplots(
            lines, columns, figsize=(width, 2.6 * lines + 1.2), sharey=True, layout="constrained", squeeze=False
        )
        for ax, name in zip(axes.flat, names, strict=False):
            spread = facts[name]["alignment_sd"] or 0.0
            column = "alignment" if spread > 1e-3 else "alignment_cosine"
            draw(ax, name, style[name][0], column, facts[name])
            ax.set_title(name, fontsize=9)
            ax.set_xlabel("alignment ⟨wᵢ, dᵢ⟩" if column == "alignment" else "cosine of wᵢ and dᵢ")
        if axes[0, 0].get_yscale() == "log":  # room for the words
            bottom, top = axes[0, 0].get_ylim()
            axes[0, 0].set_ylim(bottom, top * (top / bottom) ** 0.4)
        for ax in axes.flat[len(names) :]:
            ax.set_visible(False)
        for ax in axes[:, 0]:
            ax.set_ylabel(label)
        write_caption(figure, caption(result, words, width))
    return figure


def _rule(result: "DictionaryComparison") -> str:
    p = result.provenance
    return (
        f"Matched: correlation of activations ≥ {p['correlation']:g} and decoder cosine > {p['cosine']:g}, one to one; unique: no such "
        f"latent in the other; latents active on at least {p['min_active']} tokens."
    )


def caption(result: "DictionaryComparison", words: str, inches: float) -> str:
    """What a reader of the figure must know, from how it was made."""
    p = result.provenance
    sink = f"‖x‖ > {p['sink_filter']:g} × median left out" if p["sink_filter"] else "none"
    if p["sink_filter"] and p["skip_first"]:
        sink += f", and the first {p['skip_first']} of each prompt"
    text = p["text"].get("name", "given")
    sentence = (
        f"{p['model']} ({p['model_note'] or p['norm']}; {p['dtype']}), {p['site']}. {p['counted']:,} tokens of {p['prompts']} prompts "
        f"({text}), seed {p['seed']}. Sink filter: {sink}. {words}."
    )
    return textwrap.fill(sentence, int(16 * inches), break_on_hyphens=False)

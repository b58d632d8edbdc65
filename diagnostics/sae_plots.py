"""Figures of evaluations of SAEs."""

import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from diagnostics.plots import write_caption
from diagnostics.sae_measures import NO_SINKS, QUARTILES
from diagnostics.style import DEAD, GRID, INK, NOTE, OPEN, REFERENCE, looks, styled
from interventions.errors import ResultError

if TYPE_CHECKING:
    from diagnostics.sae_evaluation import SAEEvaluation


def plot_evaluation(result: "SAEEvaluation", tokens: str | None = None) -> Figure:
    """FVE (left) and KL score (right) of each SAE, by depth, over all tokens and by quartile of ‖x‖; a row of panels a corpus.

    Bars: 95 % delete-one-prompt jackknife intervals. tokens: `no sinks` (default where there is a sink filter) or `all`.
    """
    counted = tokens or result.counted
    if not result.select(tokens=counted):
        raise ResultError(f"no tokens {counted!r} in this result, which the figure shows")
    order = _by_depth(result)
    style, width = looks(result.names), max(9.6, min(1.9 * len(order), 16))
    with styled():
        figure, axes = plt.subplots(
            len(result.corpora), 2, figsize=(width, 2.9 * len(result.corpora) + 1.5), sharex=True, sharey="col",
            layout="constrained", squeeze=False,
        )  # fmt: skip
        for row, corpus in zip(axes, result.corpora, strict=True):
            for ax, measure in zip(row, ("fve", "kl_score"), strict=True):
                for place, name in enumerate(order):
                    groups = result.select(sae=name, corpus=corpus, tokens=counted)
                    _quartile_points(ax, place, groups, measure, *style[name])
                _mark_depths(ax, result, order)
                ax.axhline(1, color=REFERENCE, lw=0.8)
                ax.set_title(
                    f"{corpus}: {'reconstruction' if measure == 'fve' else 'the model with the SAE in its stream'}"
                )
            row[0].set_ylabel("fraction of variance explained")
            row[1].set_ylabel("KL score: 1 − KL / KL of zero ablation")
        for column in axes.T:
            _scale(list(column))
        for ax in axes[-1]:
            crowded = len(order) > 9
            labels = [name.rsplit("/", 1)[-1] if crowded else _wrapped(name) for name in order]
            ax.set_xticks(range(len(order)), labels, rotation=60 if crowded else 0, ha="right" if crowded else "center")
        p, names = result.provenance, {True: "sinks left as they are", False: "every token"}
        spliced = max(g["kl"].n_prompts for g in result.groups)
        words = (
            f"Filled: {names[counted == NO_SINKS]}, all quartiles of ‖x‖; open, from left to right: quartiles 1 to 4 of each text and "
            f"site. KL score: x̂ in place of x at every position of {spliced} prompts"
            f"{', sinks too' if p['splice_sinks'] else ''}. Bars: 95 % delete-one-prompt jackknife intervals"
        )
        write_caption(figure, caption(result, words, width))
    return figure


def _by_depth(result: "SAEEvaluation") -> list[str]:
    """The SAEs by layer and point, those of one site in the order in which they were given."""
    where = {g["sae"]: (g["layer"], g["point"]) for g in result.groups}
    return sorted(result.names, key=lambda name: where[name])


def _quartile_points(
    ax: Axes, place: int, groups: list[dict[str, Any]], measure: str, colour: str, marker: str
) -> None:
    by = {g["quartile"]: g[measure] for g in groups}
    estimates = [by[quartile] for quartile in QUARTILES]
    x = place + np.array([-0.3, *np.linspace(-0.08, 0.34, len(QUARTILES) - 1)])
    value = np.array([e.value for e in estimates])
    bars = np.array([[e.value - e.low, e.high - e.value] for e in estimates]).T
    shown = np.isfinite(value)
    bars = np.where(np.isfinite(bars), bars, 0).clip(min=0)
    ax.plot(x[1:], value[1:], color=colour, lw=0.8, alpha=0.6)
    for which, face, size in ((slice(0, 1), colour, 6), (slice(1, None), OPEN, 4.5)):
        some = shown[which]
        ax.errorbar(
            x[which][some], value[which][some], bars[:, which][:, some], color=colour, marker=marker, mfc=face, ms=size,
            lw=0, elinewidth=1.1, capsize=1.8,
        )  # fmt: skip


def _mark_depths(ax: Axes, result: "SAEEvaluation", order: list[str]) -> None:
    """Which SAEs share a site, and which."""
    site = {g["sae"]: g["site"] for g in result.groups}
    start = 0
    for i, name in enumerate(order):
        if i + 1 < len(order) and site[order[i + 1]] == site[name]:
            continue
        layer, point = site[name].split(".")
        label = f"block {layer}" if point == "resid_post" else f"block {layer}, {point}"
        ax.text((start + i) / 2, 0.02, label, transform=ax.get_xaxis_transform(), ha="center", fontsize=7.5, color=NOTE)
        if i + 1 < len(order):
            ax.axvline(i + 0.5, color=GRID, lw=0.8)
        start = i + 1
    ax.set_xlim(-0.6, len(order) - 0.4)


def _scale(axes: list[Axes], floor: float = -0.5) -> None:
    """One scale for panels, with room for the names of sites; values far below are said in words and do not squeeze the rest."""
    drawn = [(ax, c) for ax in axes for c in ax.containers if isinstance(c, ErrorbarContainer)]
    ends = [float(y) for _, c in drawn for segment in c.lines[2][0].get_segments() for y in np.asarray(segment)[:, 1]]
    low, high = max(min(ends, default=0.0), floor), max([y for y in ends if y > floor], default=0.0)
    low, high = min(low, 0.95) - 0.02, max(high, 1.0) + 0.02
    for ax, c in drawn:
        line = c.lines[0]
        for x, y in np.asarray(line.get_xydata()):
            if y < floor:
                words = f"{y:.3g} ↓".replace("-", "−")
                ax.text(x, low, words, rotation=90, ha="center", va="bottom", fontsize=7, color=line.get_color())
    for ax in axes:
        ax.set_ylim(low - 0.12 * (high - low), high)


def _wrapped(name: str, width: int = 12) -> str:
    return "\n".join(textwrap.wrap(name.replace("/", " "), width, break_long_words=True))


def plot_alignment(result: "SAEEvaluation") -> Figure:
    """Histograms of <w_i, d_i> of live latents, a panel an SAE, the dead ones in grey on top; with free norms the cosine as a line."""

    def draw(ax: Axes, some: pd.DataFrame, dead: pd.DataFrame, colour: str, facts: dict[str, Any]) -> None:
        both = [part["alignment"].to_numpy(float) for part in (some, dead)]
        bins = _bins(np.concatenate([*both, some["cosine"].to_numpy(float)]))
        ax.hist([np.clip(x, bins[0], bins[-1]) for x in both], bins, stacked=True, color=[colour, DEAD])
        if not np.allclose(some["alignment"], some["cosine"], atol=1e-3):
            ax.hist(some["cosine"], bins, histtype="step", color=INK, lw=1)
        two = facts["alignment bimodality"]
        lines = [f"below 0.5: {facts['alignment < 0.5']:.1%}"] + ([f"bimodality {two:.2f}"] if np.isfinite(two) else [])
        _corner(ax, facts, lines)

    words = (
        "Colour: latents that fire on the evaluated tokens; grey: those that do not; black line, where norms are free: cosine of w "
        "and d of the first. Bimodality: Sarle's coefficient, 0.56 for a uniform distribution; values beyond an axis stand in its last bin"
    )
    known = set(result.latents.loc[result.latents["alignment"].notna(), "sae"])
    names = [name for name in result.names if name in known]
    if not names:
        raise ResultError("no SAE here has encoder rows, whose alignment the figure shows")
    return _histograms(result, names, draw, "alignment ⟨wᵢ, dᵢ⟩", words)


def plot_exponents(result: "SAEEvaluation") -> Figure:
    """Histograms of the exponents a_i of cosine scores, a panel an SAE that has them."""
    known = result.latents.loc[result.latents["exponent"].notna()]
    names = [name for name in result.names if name in set(known["sae"])]
    if not names:
        raise ResultError("no SAE here has a cosine score, whose exponents the figure shows")
    ends = min(-0.05, float(known["exponent"].min())), max(1.05, float(known["exponent"].max()))

    def draw(ax: Axes, some: pd.DataFrame, dead: pd.DataFrame, colour: str, facts: dict[str, Any]) -> None:
        both = [part["exponent"].to_numpy(float) for part in (some, dead)]
        ax.hist(both, np.linspace(ends[0], ends[1], 57).tolist(), stacked=True, color=[colour, DEAD])
        for end in (0, 1):
            ax.axvline(end, color=REFERENCE, lw=0.8)
        mean, sd = (f"{facts[name]:.3f}".replace("-", "−") for name in ("exponent", "exponent sd"))
        _corner(ax, facts, [f"mean {mean}", f"SD {sd}"], 0.4)

    words = (
        "Lines: 0, the cosine alone, and 1, the inner product. Colour: latents that fire on the evaluated tokens; grey: those that "
        "do not"
    )
    return _histograms(result, names, draw, "exponent aᵢ of ‖x_c‖", words)


Draw = Callable[[Axes, pd.DataFrame, pd.DataFrame, str, dict[str, Any]], None]


def _histograms(result: "SAEEvaluation", names: list[str], draw: Draw, label: str, words: str) -> Figure:
    """A panel for each SAE, three in a row."""
    from diagnostics.sae_evaluation import live

    style, site = looks(result.names), {g["sae"]: g["site"] for g in result.groups}
    columns = min(3, len(names))
    lines, width = -(-len(names) // columns), max(3.2 * columns, 6.4)
    with styled():
        figure, axes = plt.subplots(
            lines, columns, figsize=(width, 2.3 * lines + 1.1), layout="constrained", squeeze=False
        )
        for ax, name in zip(axes.flat, names, strict=False):
            rows = result.latents.loc[result.latents["sae"] == name]
            some = live(rows)
            dead = rows.loc[~rows["latent"].isin(some["latent"])].drop_duplicates(["latent"])
            facts = next(g for g in result.alignments if g["sae"] == name)
            draw(ax, some, dead, style[name][0], facts)
            ax.set_title(f"{name} ({site[name]})", fontsize=9)
        for ax in axes.flat[len(names) :]:
            ax.set_visible(False)
        for i, ax in enumerate(axes.flat[: len(names)]):
            if i + columns >= len(names):
                ax.set_xlabel(label)
        for ax in axes[:, 0]:
            ax.set_ylabel("latents")
        write_caption(figure, caption(result, words, width))
    return figure


def _bins(x: np.ndarray) -> list[float]:
    """60 bins that hold all but the outermost values, and 0 and 1."""
    low, high = np.percentile(x, (0.5, 99.5))
    low, high = min(low, 0.0), max(high, 1.0)
    edge = 0.03 * (high - low)
    return np.linspace(low - edge, high + edge, 61).tolist()


def _corner(ax: Axes, facts: dict[str, Any], lines: list[str], x: float = 0.03) -> None:
    """Facts above the bars."""
    ax.set_ylim(top=1.3 * ax.get_ylim()[1])
    lines = [f"{facts['live']:,} of {facts['latents']:,} live", *lines]
    ax.text(x, 0.98, "\n".join(lines), transform=ax.transAxes, va="top", fontsize=7.5, color=NOTE)


def caption(result: "SAEEvaluation", words: str, inches: float) -> str:
    """What a reader of the figure must know, from how it was made."""
    p = result.provenance
    sink = f"‖x‖ > {p['sink_filter']:g} × median left out" if p["sink_filter"] else "none"
    if p["sink_filter"] and p.get("skip_first"):
        sink += f", and the first {p['skip_first']} of each prompt"
    texts = "; ".join(
        f"{name}: {text['tokens']:,} tokens of {text['prompts']} prompts ({text.get('name', 'given')}"
        f"{', chat template' if text.get('chat_template') else ''})"
        for name, text in p["texts"].items()
    )
    sentence = f"{p['model']} ({p['model_note'] or p['norm']}; {p['dtype']}). {texts}. Sink filter: {sink}. {words}."
    return textwrap.fill(sentence, int(16 * inches), break_on_hyphens=False)

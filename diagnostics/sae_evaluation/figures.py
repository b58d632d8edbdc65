"""Figures of evaluations of SAEs."""

import textwrap
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from diagnostics.figures.axes import BARS, bar_lengths, caption, panels, sae_label, write_caption
from diagnostics.figures.by_depth import Groups
from diagnostics.figures.looks import DEAD, GRID, INK, NOTE, OPEN, REFERENCE, looks, styled
from diagnostics.sampling.counted import NO_SINKS, QUARTILES
from interventions.errors import ResultError


def plot_evaluation(groups: Groups, provenance: Mapping[str, Any], counted: str) -> Figure:
    """FVE (left) and KL score (right) of each SAE, by depth, over all tokens and by quartile of ‖x‖; a row of panels a corpus.

    groups: a line for each SAE, corpus, kind of tokens and quartile. Filled: all quartiles of ‖x‖; open, from left to right: quartiles 1 to
    4. Bars: 95 % delete-one-prompt jackknife intervals. counted: the tokens shown, `no sinks` or `all`. Raises `ResultError` where
    there are none.
    """
    groups = [g for g in groups if g["tokens"] == counted]
    if not groups:
        raise ResultError(f"no tokens {counted!r} in this result to draw")
    names, corpora, site = list(provenance["saes"]), list(provenance["texts"]), {g["sae"]: g["site"] for g in groups}
    where = {g["sae"]: (g["layer"], g["point"]) for g in groups}
    order = sorted(names, key=lambda name: where[name])  # those of one site in the order in which they were given
    style, width = looks(names), max(9.6, min(1.9 * len(order), 16))
    with styled():
        figure, axes = plt.subplots(
            len(corpora), 2, figsize=(width, 2.9 * len(corpora) + 1.5), sharex=True, sharey="col",
            layout="constrained", squeeze=False,
        )  # fmt: skip
        for row, corpus in zip(axes, corpora, strict=True):
            for ax, measure in zip(row, ("fve", "kl_score"), strict=True):
                for place, name in enumerate(order):
                    own = [g for g in groups if (g["sae"], g["corpus"]) == (name, corpus)]
                    _quartile_points(ax, place, own, measure, *style[name])
                _mark_depths(ax, site, order)
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
            labels = [sae_label(name) if crowded else _wrapped(name) for name in order]
            ax.set_xticks(range(len(order)), labels, rotation=60 if crowded else 0, ha="right" if crowded else "center")
        shown = "no sinks" if counted == NO_SINKS else "every token"
        words = (
            f"Filled: {shown}, all quartiles of ‖x‖; open: quartiles 1 to 4. KL score: x̂ for x at every position of "
            f"{max(g['kl'].n_prompts for g in groups)} prompts{', sinks too' if provenance['splice_sinks'] else ''}. {BARS}"
        )
        write_caption(figure, evaluation_caption(provenance, words))
    return figure


def _quartile_points(ax: Axes, place: int, groups: Groups, measure: str, colour: str, marker: str) -> None:
    by = {g["quartile"]: g[measure] for g in groups}
    estimates = [by[quartile] for quartile in QUARTILES]
    x = place + np.array([-0.3, *np.linspace(-0.08, 0.34, len(QUARTILES) - 1)])
    value = np.array([e.value for e in estimates])
    bars, shown = bar_lengths(estimates), np.isfinite(value)
    ax.plot(x[1:], value[1:], color=colour, lw=0.8, alpha=0.6)
    for which, face, size in ((slice(0, 1), colour, 6), (slice(1, None), OPEN, 4.5)):
        some = shown[which]
        ax.errorbar(
            x[which][some], value[which][some], bars[:, which][:, some], color=colour, marker=marker, mfc=face, ms=size,
            lw=0, elinewidth=1.1, capsize=1.8,
        )  # fmt: skip


def _mark_depths(ax: Axes, site: Mapping[str, str], order: list[str]) -> None:
    """Labels the sites of the SAEs."""
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
    """One scale for all panels, with room for the names of sites; values far below are written as text."""
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


def plot_alignment(latents: pd.DataFrame, facts: Groups, provenance: Mapping[str, Any]) -> Figure:
    """Histograms of <w_i, d_i>, a panel an SAE; with free norms the cosine as a line.

    latents: one line for each latent of each SAE, `live` where it fires on the evaluated tokens (in colour; others in grey); facts: by SAE.
    Bimodality: Sarle's coefficient, 0.56 for a uniform distribution. Values beyond an axis are counted in its last bin.
    """

    def draw(ax: Axes, some: pd.DataFrame, dead: pd.DataFrame, colour: str, facts: Mapping[str, Any]) -> None:
        both = [part["alignment"].to_numpy(float) for part in (some, dead)]
        bins = _bins(np.concatenate([*both, some["cosine"].to_numpy(float)]))
        ax.hist([np.clip(x, bins[0], bins[-1]) for x in both], bins, stacked=True, color=[colour, DEAD])
        if not np.allclose(some["alignment"], some["cosine"], atol=1e-3):
            ax.hist(some["cosine"], bins, histtype="step", color=INK, lw=1)
        two = facts["alignment bimodality"]
        lines = [f"below 0.5: {facts['alignment < 0.5']:.1%}"] + ([f"bimodality {two:.2f}"] if np.isfinite(two) else [])
        _corner(ax, facts, lines)

    words = "Grey: latents that never fire. Black: cosine of w and d."
    names = _having(latents, "alignment", provenance)
    if not names:
        raise ResultError("no SAE has encoder rows, so there is no alignment to draw")
    return _histograms(latents, facts, provenance, names, draw, "alignment ⟨wᵢ, dᵢ⟩", words)


def plot_exponents(latents: pd.DataFrame, facts: Groups, provenance: Mapping[str, Any]) -> Figure:
    """Histograms of the exponents a_i of cosine scores, a panel an SAE that has them; arguments as for `plot_alignment`."""
    known = latents.loc[latents["exponent"].notna()]
    names = _having(latents, "exponent", provenance)
    if not names:
        raise ResultError("no SAE has a cosine score, so there are no exponents to draw")
    ends = min(-0.05, float(known["exponent"].min())), max(1.05, float(known["exponent"].max()))

    def draw(ax: Axes, some: pd.DataFrame, dead: pd.DataFrame, colour: str, facts: Mapping[str, Any]) -> None:
        both = [part["exponent"].to_numpy(float) for part in (some, dead)]
        ax.hist(both, np.linspace(ends[0], ends[1], 57).tolist(), stacked=True, color=[colour, DEAD])
        for end in (0, 1):
            ax.axvline(end, color=REFERENCE, lw=0.8)
        mean, sd = (f"{facts[name]:.3f}".replace("-", "−") for name in ("exponent", "exponent sd"))
        _corner(ax, facts, [f"mean {mean}", f"SD {sd}"], 0.4)

    words = "Lines: 0, the cosine, and 1, the inner product. Grey: latents that never fire."
    return _histograms(latents, facts, provenance, names, draw, "exponent aᵢ of ‖x_c‖", words)


Draw = Callable[[Axes, pd.DataFrame, pd.DataFrame, str, Mapping[str, Any]], None]


def _having(latents: pd.DataFrame, column: str, provenance: Mapping[str, Any]) -> list[str]:
    """The SAEs that have values in a column."""
    known = set(latents.loc[latents[column].notna(), "sae"])
    return [name for name in provenance["saes"] if name in known]


def _histograms(
    latents: pd.DataFrame,
    facts: Groups,
    provenance: Mapping[str, Any],
    names: list[str],
    draw: Draw,
    label: str,
    words: str,
) -> Figure:
    """A panel for each SAE, three in a row."""
    style, of = looks(list(provenance["saes"])), {g["sae"]: g for g in facts}
    with styled():
        figure, axes = panels(len(names), 3.2, 2.3, 1.1, least=6.4)
        for i, (ax, name) in enumerate(zip(axes.flat, names, strict=False)):
            rows = latents.loc[latents["sae"] == name]
            draw(ax, rows.loc[rows["live"]], rows.loc[~rows["live"]], style[name][0], of[name])
            ax.set_title(f"{name} ({of[name]['site']})", fontsize=9)
            if i + axes.shape[1] >= len(names):
                ax.set_xlabel(label)
        for ax in axes[:, 0]:
            ax.set_ylabel("latents")
        write_caption(figure, evaluation_caption(provenance, words))
    return figure


def _bins(x: np.ndarray) -> list[float]:
    """60 bins that hold all but the outermost values, and 0 and 1."""
    low, high = np.percentile(x, (0.5, 99.5))
    low, high = min(low, 0.0), max(high, 1.0)
    edge = 0.03 * (high - low)
    return np.linspace(low - edge, high + edge, 61).tolist()


def _corner(ax: Axes, facts: Mapping[str, Any], lines: list[str], x: float = 0.03) -> None:
    """Facts above the bars."""
    ax.set_ylim(top=1.3 * ax.get_ylim()[1])
    lines = [f"{facts['live']:,} of {facts['latents']:,} live", *lines]
    ax.text(x, 0.98, "\n".join(lines), transform=ax.transAxes, va="top", fontsize=7.5, color=NOTE)


def evaluation_caption(provenance: Mapping[str, Any], words: str) -> str:
    """The caption of a figure: model and texts, then the figure's own sentences."""
    texts = "; ".join(
        f"{text['tokens']:,} tokens of {text['prompts']} prompts of {_named(name, text)}"
        for name, text in provenance["texts"].items()
    )
    return caption(provenance, words, texts=texts)


def _named(name: str, text: Mapping[str, Any]) -> str:
    """A text by its name in the panels, and by its own name where that is different."""
    own = text.get("name", "given") + (", chat template" if text.get("chat_template") else "")
    return own if own.startswith(name) else f"{name} ({own})"

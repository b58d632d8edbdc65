"""The figure of sparse probing."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from diagnostics.figures.axes import bar_lengths, caption, panels, sink_rule, write_caption
from diagnostics.figures.by_depth import Groups
from diagnostics.figures.looks import GRID, KEY, NULL, OPEN, legend_label, legend_looks, looks, styled
from diagnostics.sparse_probing.summary import MEAN, described


def plot_probing(groups: Groups, provenance: Mapping[str, Any]) -> Figure:
    """Accuracy against k for each SAE, and on all latents and the raw activations; a panel a data set, their mean first.

    groups: by SAE, data set, kind of probe and k. Filled: the k latents of largest mean difference on the training texts, dots the splits;
    open, dotted: random latents; grey: shuffled labels, mean over SAEs and the widest of their 95 % ranges. Probes are logistic, on latents
    averaged over a text's tokens; tasks are balanced. Bars: 95 % delete-one-group jackknife intervals (one text where a set has no groups),
    pooled over classes and splits with probes held fixed; pale bars: 95 % over splits with selection and fit anew. Variation between trained
    SAEs is not included.
    """
    datasets = list(provenance["texts"])
    shown = [MEAN] * (len(datasets) > 1) + datasets
    style, ks = looks(list(provenance["saes"])), sorted(provenance["ks"])
    with styled():
        figure, axes = panels(len(shown), 3.3, 2.7, 1.6, least=6.6, sharey=True)
        for i, (ax, dataset) in enumerate(zip(axes.flat, shown, strict=False)):
            _panel(ax, [g for g in groups if g["dataset"] == dataset], ks, style)
            n = len(provenance["texts"][dataset]["counts"]) if dataset != MEAN else 0
            ax.set_title(f"{dataset}: {_classes(n)}" if n else f"mean of {len(datasets)} data sets")
            if i + axes.shape[1] >= len(shown):
                ax.set_xlabel("latents read by the probe, k")
        for ax in axes[:, 0]:
            ax.set_ylabel("held-out accuracy")
        ends = [g["accuracy"].value for g in groups] + [0.5]
        axes[0, 0].set_ylim(min(ends) - 0.04, 1.02)
        figure.legend(handles=_handles(style), loc="outside upper center", ncols=min(7, len(style) + 3))
        write_caption(figure, _caption(provenance))
    return figure


def _classes(n: int) -> str:
    return "two classes" if n == 2 else f"{n} classes, each against the rest"


def _panel(ax: Axes, groups: Groups, ks: list[int], style: dict[str, tuple[str, str]]) -> None:
    places = {("selected", k): i for i, k in enumerate(ks)} | {("all", 0): len(ks), ("raw", 0): len(ks) + 1}
    names = list(style)
    for i, name in enumerate(names):
        colour, marker = style[name]
        shift = (i - (len(names) - 1) / 2) * min(0.12, 0.6 / len(names))
        own = {(g["kind"], g["k"]): g for g in groups if g["sae"] == name}
        for key, place in places.items():
            seeds = own[key]["by_seed"]["accuracy"]
            ax.plot([place + shift] * len(seeds), seeds, ".", color=colour, ms=3, alpha=0.45, zorder=1.5)
        x = np.array(list(places.values())) + shift
        found = [own[key]["accuracy"] for key in places]
        value = np.array([e.value for e in found])
        ax.errorbar(x, value, bar_lengths(found), color=colour, marker=marker, ms=5, lw=0, elinewidth=1.1, capsize=1.8)
        ax.plot(x[: len(ks)], value[: len(ks)], color=colour, lw=1)
        anew = [own["selected", k]["refits"] for k in ks]
        ax.vlines(x[: len(ks)], [e.low for e in anew], [e.high for e in anew], color=colour, lw=3.5, alpha=0.25)
        lot = [own["random", k]["accuracy"].value for k in ks]
        ax.plot(x[: len(ks)], lot, ":", color=colour, marker=marker, mfc=OPEN, ms=4, lw=1, zorder=1.8)
    nulls = [[g["shuffled"] for g in groups if (g["kind"], g["k"]) == ("selected", k)] for k in ks]
    low, high = ([end([null[name] for null in some]) for some in nulls] for end, name in ((min, "low"), (max, "high")))
    ax.fill_between(range(len(ks)), low, high, color=NULL, alpha=0.2, lw=0, zorder=1)
    ax.plot(
        range(len(ks)),
        [np.mean([null["mean"] for null in some]) for some in nulls],
        "--",
        color=NULL,
        lw=1.1,
        zorder=1.2,
    )
    ax.axhline(0.5, color=GRID, lw=0.8, zorder=1)
    ax.axvline(len(ks) - 0.5, color=GRID, lw=0.8, zorder=1)
    ax.set_xticks(range(len(ks) + 2), [*map(str, ks), "all", "raw x"])
    ax.set_xlim(-0.5, len(ks) + 1.5)


def _handles(style: dict[str, tuple[str, str]]) -> list[Line2D]:
    handles = [
        Line2D([], [], color=c, marker=m, ms=5, lw=1, label=legend_label(name))
        for name, (c, m) in legend_looks(list(style)).items()
    ]
    handles.append(Line2D([], [], ls=":", color=KEY, marker="o", mfc=OPEN, ms=4, lw=1, label="random latents"))
    handles.append(Line2D([], [], ls="--", color=NULL, lw=1.1, label="shuffled labels"))
    return [*handles, Line2D([], [], ls="", color=KEY, marker=".", ms=4, label="one split")]


def _caption(provenance: Mapping[str, Any]) -> str:
    p = provenance
    texts = "; ".join(f"{name}: {described(text)}" for name, text in p["texts"].items())
    grouped = any(text["groups"] != text["counts"] for text in p["texts"].values())
    words = (
        f"Logistic probes (L2, C = {p['inverse_penalty']:g}), means over ≤ {p['max_length']} tokens; all: every latent. "
        f"Bars: 95 % over {'groups' if grouped else 'texts'}, probes fixed, {p['seeds']} split{'s' * (p['seeds'] > 1)}, seed {p['seed']}; pale: {p['refits']} "
        f"refitted. Grey: 95 % of {p['shuffles']} shuffles."
    )
    return caption(p, words, texts=texts, place=", ".join(p["sites"]), sinks=sink_rule(p, "position 0"))

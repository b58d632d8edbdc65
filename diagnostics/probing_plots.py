"""The figure of sparse probing."""

import textwrap
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from diagnostics.plots import write_caption
from diagnostics.probing_summary import MEAN, described
from diagnostics.style import GRID, KEY, NULL, OPEN, legend_label, legend_looks, looks, styled

if TYPE_CHECKING:
    from diagnostics.sparse_probing import SparseProbing


def plot_probing(result: "SparseProbing") -> Figure:
    """Accuracy against k for each SAE, and on all latents and the raw activations; a panel a data set, their mean first.

    Filled: selected latents, bars 95 % delete-one-group jackknife intervals, dots the splits; open, dotted: random latents; grey: shuffled
    labels, mean over SAEs.
    """
    panels = [MEAN] * (len(result.datasets) > 1) + result.datasets
    columns = min(3, len(panels))
    lines, width = -(-len(panels) // columns), max(3.3 * columns, 6.6)
    style, ks = looks(result.names), sorted(result.provenance["ks"])
    with styled():
        figure, axes = plt.subplots(
            lines, columns, figsize=(width, 2.7 * lines + 1.6), sharey=True, layout="constrained", squeeze=False
        )
        for ax, dataset in zip(axes.flat, panels, strict=False):
            _panel(ax, result, dataset, ks, style)
            n = len(result.provenance["texts"][dataset]["counts"]) if dataset != MEAN else 0
            ax.set_title(f"{dataset}: {_classes(n)}" if n else f"mean of {len(result.datasets)} data sets")
        for ax in axes.flat[len(panels) :]:
            ax.set_visible(False)
        for i, ax in enumerate(axes.flat[: len(panels)]):
            if i + columns >= len(panels):
                ax.set_xlabel("latents read by the probe, k")
        for ax in axes[:, 0]:
            ax.set_ylabel("held-out accuracy")
        ends = [g["accuracy"].value for g in result.groups] + [0.5]
        axes[0, 0].set_ylim(min(ends) - 0.04, 1.02)
        figure.legend(handles=_handles(style), loc="outside upper center", ncols=min(7, len(style) + 3))
        write_caption(figure, _caption(result, width))
    return figure


def _classes(n: int) -> str:
    return "two classes" if n == 2 else f"{n} classes, each against the rest"


def _panel(ax: Axes, result: "SparseProbing", dataset: str, ks: list[int], style: dict[str, tuple[str, str]]) -> None:
    places = {("selected", k): i for i, k in enumerate(ks)} | {("all", 0): len(ks), ("raw", 0): len(ks) + 1}
    names = list(style)
    for i, name in enumerate(names):
        colour, marker = style[name]
        shift = (i - (len(names) - 1) / 2) * min(0.12, 0.6 / len(names))
        own: dict[tuple[str, int], dict[str, Any]] = {
            (g["kind"], g["k"]): g for g in result.select(sae=name, dataset=dataset)
        }
        for key, place in places.items():
            seeds = own[key]["by_seed"]["accuracy"]
            ax.plot([place + shift] * len(seeds), seeds, ".", color=colour, ms=3, alpha=0.45, zorder=1.5)
        x = np.array(list(places.values())) + shift
        found = [own[key]["accuracy"] for key in places]
        value = np.array([e.value for e in found])
        bars = np.array([[e.value - e.low, e.high - e.value] for e in found]).T
        bars = np.where(np.isfinite(bars), bars, 0).clip(min=0)
        ax.errorbar(x, value, bars, color=colour, marker=marker, ms=5, lw=0, elinewidth=1.1, capsize=1.8)
        ax.plot(x[: len(ks)], value[: len(ks)], color=colour, lw=1)
        lot = [own["random", k]["accuracy"].value for k in ks]
        ax.plot(x[: len(ks)], lot, ":", color=colour, marker=marker, mfc=OPEN, ms=4, lw=1, zorder=1.8)
    null = [np.mean([g["accuracy"].value for g in result.select(dataset=dataset, kind="shuffled", k=k)]) for k in ks]
    ax.plot(range(len(ks)), null, "--", color=NULL, lw=1.1, zorder=1.2)
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


def _caption(result: "SparseProbing", inches: float) -> str:
    p = result.provenance
    texts = "; ".join(f"{name}: {described(text)}" for name, text in p["texts"].items())
    grouped = any(text["groups"] != text["counts"] for text in p["texts"].values())
    unit = "group (one text where a set has none)" if grouped else "text"
    whole = "; whole groups are held out" if grouped else ""
    sinks = f"position 0 and ‖x‖ > {p['sink_filter']:g} × median" if p["sink_filter"] else "position 0"
    words = (
        f"{p['model']} ({p['model_note'] or p['norm']}; {p['dtype']}), {', '.join(p['sites'])}. Texts: {texts}. Logistic probes (L2, C = "
        f"{p['inverse_penalty']:g}) on latents averaged over a text's tokens ({sinks} left out; cut at {p['max_length']} tokens). "
        f"Filled: the k latents of largest mean difference on the training texts; all: every active latent; raw x: the activations. "
        f"Tasks are balanced, chance is .5{whole}. Bars: 95 % delete-one-{unit} jackknife intervals, pooled over classes and {p['seeds']} splits "
        f"(seed {p['seed']}) with probes held fixed; they do not hold what training another SAE would change."
    )
    return textwrap.fill(words, int(16 * inches), break_on_hyphens=False)

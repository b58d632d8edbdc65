"""The figure of norms forced to 1: KL by depth beside a rotation by the same distance."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from diagnostics.figures.axes import BARS, Depth, caption, legend_above, null_models, patched, points, write_caption
from diagnostics.figures.by_depth import Groups
from diagnostics.figures.looks import EDIT_COLOURS, EDIT_MARKERS, UNTRAINED, styled


def plot_unit_norm(groups: Groups, nulls: Sequence[Groups], provenance: Mapping[str, Any]) -> Figure:
    """Median KL by depth of forcing norm 1, and of a rotation by the same distance: one token alone (left), all tokens (right).

    groups: of the trained model; nulls: the same of each randomly initialised model, in grey. Bars are 95 % intervals
    over prompts.
    """
    depth = Depth(sorted({g["layer"] for g in groups}))
    with styled():
        figure, axes = plt.subplots(1, 2, figsize=(9.6, 4.4), layout="constrained", sharey=True)
        for ax, end, title in zip(axes, ("", "_everywhere"), ("this token alone", "all tokens at once"), strict=True):
            for i, (edit, label, like) in enumerate(
                (("unit_norm", "norm forced to 1", "norm_up"), ("rotation", "turned by the same distance", "isotropic"))
            ):
                some = [g for g in groups if g[edit + end].value > 10 * g["noise_floor"]]
                estimates, shift = [g[edit + end] for g in some], (i - 0.5) * depth.step
                points(ax, depth.at(some), estimates, EDIT_COLOURS[like], label, EDIT_MARKERS[like], shift)
                for j, rows in enumerate(nulls):
                    kl = [g[edit + end].value if g[edit + end].value > 10 * g["noise_floor"] else np.nan for g in rows]
                    dashes = "--" if edit == "unit_norm" else "-"
                    name = f"untrained: {label}" if j == 0 else None
                    ax.plot(depth.at(rows), kl, color=UNTRAINED, lw=0.9, ls=dashes, zorder=0, label=name)
            ax.set_yscale("log")
            ax.set_title(title)
            depth.label(ax)
        axes[0].set_ylabel("median KL(clean ‖ intervened), nats")
        legend_above(figure, axes[0], 2)
        words = f"{max(g['n_tokens'] for g in groups)} tokens {patched(provenance)}. {BARS}{null_models(provenance)}"
        write_caption(figure, caption(provenance, words))
    return figure

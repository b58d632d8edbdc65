"""Figure of token patterns: scores by what predicts, and each latent's patterns against its tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from diagnostics.figures.axes import bar_lengths, caption, write_caption
from diagnostics.figures.looks import OPEN, PREDICTION_LOOKS, REFERENCE, UNTRAINED, legend_label, looks, styled
from diagnostics.results.headlines import Group
from diagnostics.statistics.tables import lines_of
from diagnostics.token_patterns.work import PREDICTED_BY


def plot_patterns(groups: Sequence[Group], frame: pd.DataFrame, provenance: Mapping[str, Any]) -> Figure:
    """Mean held-out F1 by what predicts (left), share of latents explained (middle), each latent's F1 of patterns against tokens (right).

    groups: estimates by SAE, `of` and kind; frame: counts of each latent. Open markers: random directions that are active as often.
    """
    saes = list(dict.fromkeys(g["sae"] for g in groups))
    with styled():
        figure, axes = plt.subplots(1, 3, figsize=(12.0, 4.0), layout="constrained")
        for ax, measure, title in zip(
            axes, ("f1", "explained"), ("held-out F1, mean over latents", "latents explained"), strict=False
        ):
            for i, (kind, (colour, marker)) in enumerate(PREDICTION_LOOKS.items()):
                for of, shift, face in (("latent", -0.06, colour), ("random", 0.06, OPEN)):
                    own = [g for g in groups if g["kind"] == kind and g["of"] == of]
                    x = np.array([saes.index(g["sae"]) for g in own]) + 0.15 * (i - 2) + shift / 2
                    estimates = [g[measure] for g in own]
                    label = PREDICTED_BY[kind] if of == "latent" else None
                    ax.errorbar(
                        x, [e.value for e in estimates], bar_lengths(estimates), color=colour, marker=marker, mfc=face, ms=4, lw=0,
                        elinewidth=1, capsize=2, label=label,
                    )  # fmt: skip
            ax.set_xticks(range(len(saes)), [legend_label(name) for name in saes])
            ax.set(xlim=(-0.6, len(saes) - 0.4), ylim=(-0.02, 1.02), title=title)
        scatter = axes[2]
        scatter.plot([0, 1], [0, 1], color=REFERENCE, lw=0.8, zorder=0)
        for of in ("random", "latent"):
            for sae, (colour, marker) in looks(saes).items():
                own = lines_of(frame, sae=sae, of=of)
                y, x = (lines_of(own, kind=kind)["f1"].to_numpy(float) for kind in ("trie", "tokens_best"))
                how = {"color": UNTRAINED, "mfc": OPEN} if of == "random" else {"color": colour}
                label = f"{sae}: {'random directions' if of == 'random' else 'latents'}"
                scatter.plot(
                    x, y, marker=marker, ms=4, lw=0, label=legend_label(label), zorder=1 + (of == "latent"), **how
                )
        scatter.set(
            xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="F1 of the best set of tokens", ylabel="F1 of all patterns"
        )
        scatter.set_title("each latent")
        scatter.legend(loc="upper left")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=5)
        held_out = len(provenance["test_prompts"])
        words = (
            f"Open: random directions, active as often. {held_out} prompts held out. "
            "Explained: precision and recall of .5 or more. Bars: 95 % intervals, prompts and latents."
        )
        write_caption(figure, caption(provenance, words, place=", ".join(provenance["sites"])))
    return figure

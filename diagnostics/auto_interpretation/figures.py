"""Figure of judged latents: detection with own and shuffled explanations, and against alignment."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from diagnostics.figures.axes import bar_lengths, caption, write_caption
from diagnostics.figures.looks import NULL, OPEN, REFERENCE, legend_label, looks, styled
from diagnostics.results.headlines import Group
from diagnostics.statistics.tables import lines_of


def plot_judged(groups: Sequence[Group], frame: pd.DataFrame, provenance: Mapping[str, Any]) -> Figure:
    """Mean AUC by judge and SAE (left); of the last judge: AUC of each latent with its own explanation against another's (middle), and
    against the cosine of encoder and decoder row (right).

    groups: estimates by SAE and judge; frame: scores of each latent. Open markers: the explanation of another latent.
    """
    saes, judges = (list(dict.fromkeys(g[name] for g in groups)) for name in ("sae", "judge"))
    look = looks(saes)
    with styled():
        figure, axes = plt.subplots(1, 3, figsize=(11.0, 3.8), layout="constrained")
        for i, (sae, (colour, marker)) in enumerate(look.items()):
            own = [g for g in groups if g["sae"] == sae]
            x = np.array([judges.index(g["judge"]) for g in own]) + 0.16 * (i - (len(saes) - 1) / 2)
            for measure, face, shift in (("auc", colour, -0.03), ("auc_shuffled", OPEN, 0.03)):
                estimates = [g[measure] for g in own]
                how = {"color": colour, "marker": marker, "mfc": face, "ms": 4, "lw": 0, "elinewidth": 1, "capsize": 2}
                label = legend_label(sae if measure == "auc" else f"{sae}, another latent's explanation")
                axes[0].errorbar(x + shift, [e.value for e in estimates], bar_lengths(estimates), label=label, **how)
        axes[0].set_xticks(range(len(judges)), [legend_label(name) for name in judges])
        axes[0].set(xlim=(-0.6, len(judges) - 0.4), ylim=(0.3, 1.02), title="detection AUC, mean over latents")
        axes[0].axhline(0.5, color=NULL, lw=0.8, zorder=0)
        some = lines_of(frame, judge=judges[-1])
        for sae, (colour, marker) in look.items():
            own, other = (lines_of(some, sae=sae, of=of) for of in ("own", "shuffled"))
            how = {"color": colour, "marker": marker, "ms": 4, "lw": 0, "alpha": 0.6}
            axes[1].plot(other["auc"], own["auc"], **how)
            axes[2].plot(own["alignment_cosine"], own["auc"], **how)
        axes[1].plot([0, 1], [0, 1], color=REFERENCE, lw=0.8, zorder=0)
        axes[1].set(xlabel="AUC with another latent's explanation", ylabel="AUC with its own", title="each latent")
        axes[2].set(xlabel="cosine of encoder row w and decoder row d", ylabel="AUC", title="against alignment")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=4)
        words = (
            f"Middle, right: judge {judges[-1]}. {provenance['snippets']} snippets of {provenance['width']} tokens of each class. "
            "Bars: 95 % intervals, prompts and latents."
        )
        write_caption(figure, caption(provenance, words, place=", ".join(provenance["sites"])))
    return figure

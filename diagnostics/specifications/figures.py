"""Figures of specification curves."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from diagnostics.figures.axes import caption, null_models, patched, write_caption
from diagnostics.figures.looks import COLOURS, GRID, KEY, NOTE, REFERENCE, UNTRAINED, styled
from diagnostics.statistics.tables import TRAINED


def plot_specifications(
    frame: pd.DataFrame, provenances: Mapping[str, Mapping[str, Any]], claim: str, factors: Sequence[str], label: str
) -> Figure:
    """Estimates of one claim sorted, with their intervals; below, the choices behind each. Grey: randomly initialised models, same choices.

    frame: the claim's lines; provenances: by text; claim: in words; factors: what was chosen, columns of the frame; label: of the values.
    """
    factors = list(factors)
    trained = frame.loc[(frame.model == TRAINED) & frame.value.notna()].sort_values(by="value", kind="stable")
    x = np.arange(len(trained))
    with styled():
        choices = [(factor, choice) for factor in factors for choice in dict.fromkeys(frame[factor])]
        figure, (top, bottom) = plt.subplots(
            2, 1, figsize=(9.6, 4.4 + 0.21 * len(choices)), sharex=True, layout="constrained",
            height_ratios=[3.4, 0.21 * len(choices)],
        )  # fmt: skip
        value, low, high = (trained[name].to_numpy(float) for name in ("value", "low", "high"))
        above = np.where(low > 1, COLOURS["direction"], np.where(high < 1, COLOURS["norm"], KEY))
        top.vlines(
            x,
            np.where(np.isfinite(low), low, value),
            np.where(np.isfinite(high), high, value),
            color=above,
            lw=0.8,
            alpha=0.6,
        )
        top.scatter(x, value, c=above, s=7, zorder=3)
        place = {tuple(row): i for i, row in enumerate(trained[factors].itertuples(index=False, name=None))}
        nulls = frame.loc[(frame.model != TRAINED) & frame.value.notna()]
        at = np.array([place.get(row, -1) for row in nulls[factors].itertuples(index=False, name=None)])
        top.scatter(at[at >= 0], nulls.value.to_numpy(float)[at >= 0], c=UNTRAINED, s=6, marker="_", lw=1, zorder=1)
        top.axhline(1, color=REFERENCE, lw=0.8)
        top.set_yscale("log")
        top.set_ylabel(label)
        share, under = (low > 1).mean(), (high < 1).mean()
        top.set_title(
            f"“{claim}”: {len(trained)} specifications, median {np.median(value):.3g};\n"
            f"95 % interval above 1 in {share:.0%} (blue), below in {under:.0%} (orange)"
        )
        for i, (factor, choice) in enumerate(choices):
            chosen = (trained[factor] == choice).to_numpy()
            bottom.scatter(x[chosen], np.full(chosen.sum(), -i), c=above[chosen], s=5, marker="|", lw=0.9)
        bottom.set_yticks(-np.arange(len(choices)), [f"{choice}" for _, choice in choices], fontsize=7.5)
        first = [next(i for i, (f, _) in enumerate(choices) if f == factor) for factor in factors]
        for factor, i in zip(factors, first, strict=True):
            bottom.annotate(
                factor, (1.005, -i), xycoords=("axes fraction", "data"), fontsize=7.5, va="center", color=NOTE
            )
            if i:
                bottom.axhline(0.5 - i, color=GRID, lw=0.6)
        bottom.set_ylim(0.7 - len(choices), 0.7)
        bottom.set_xlabel("specifications, sorted by their estimate")
        bottom.tick_params(left=False)
        provenance = next(iter(provenances.values()))
        lost = len(frame[frame.model == TRAINED]) - len(trained)
        words = (
            f"{int(trained.n_pairs.max())} random cross-prompt pairs a text, {patched(provenance)}. Lines: 95 % intervals over "
            f"prompts.{null_models(provenance)}"
        )
        words += f" {lost} undefined (effect within the noise floor)." if lost else ""
        texts = f"{provenance['prompts']} prompts of {' and '.join(provenances)}, seed {provenance['seed']}"
        write_caption(figure, caption(provenance, words, texts=texts, sinks="sink filter as chosen"))
    return figure

"""Figure of Shapley values and interactions."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from diagnostics.figures.axes import bar_lengths, write_pairs_caption
from diagnostics.figures.looks import INK, MISSING, REFERENCE, SIGNED, styled


def plot_shapley(groups: Sequence[Mapping[str, Any]], matrix: pd.DataFrame, provenance: Mapping[str, Any]) -> Figure:
    """Shares of components (left), interactions of pairs (right)."""
    names, p = list(matrix.index), provenance
    estimates = {g["component"]: g["share"] for g in groups if not g["partner"]}
    shares = [estimates[name] for name in names]
    n = len(names)
    with styled():
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.4, max(3.4, 1.8 + 0.26 * n)), layout="constrained")
        at = np.arange(n)
        left.errorbar(at, [e.value for e in shares], yerr=bar_lengths(shares), fmt="o", color=INK, ms=4, lw=1)
        left.axhline(0, color=REFERENCE, lw=0.8)
        left.set_xticks(at, names, rotation=90, fontsize=7)
        left.set(xlim=(-0.5, n - 0.5), xlabel="component", ylabel="Shapley value\nshare of m_clean − m_corrupt")
        values = matrix.to_numpy(float).copy()
        np.fill_diagonal(values, np.nan)
        limit = max(float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 0.0, 1e-9)
        right.set_facecolor(MISSING)
        image = right.imshow(values, cmap=SIGNED, vmin=-limit, vmax=limit)
        right.set_xticks(at, names, rotation=90, fontsize=7)
        right.set_yticks(at, names, fontsize=7)
        figure.colorbar(
            image, ax=right, label="interaction, share of m_clean − m_corrupt" if n > 6 else "interaction, share"
        )
        how = "all coalitions" if p["orders"] is None else f"{p['orders']} sampled orders a pair, no interactions"
        left.set_title(f"{p['direction']}: each component's part")
        right.set_title("interactions of two")
        known = any(np.isfinite(e.low) for e in shares)
        bars = "Bars: 95 % intervals over pairs." if known else "No intervals: fewer than 10 effective pairs."
        words = f"Positions: {p['positions']}; {how}. {bars} Interaction below 0: the two overlap."
        write_pairs_caption(figure, p, words)
    return figure

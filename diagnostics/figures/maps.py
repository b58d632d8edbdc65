"""Maps of cells that may be dimmed, and marks on their colour bar."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize

from diagnostics.figures.looks import INK, MISSING, SIGNED

_DIMMED = 0.25


def draw_cells(ax: Axes, values: np.ndarray, clear: np.ndarray, norm: Normalize, **how: Any) -> None:
    """Cells in colour, those that are not `clear` dimmed, those without a value (nan) grey. how: as for `imshow`."""
    ax.set_facecolor(MISSING)
    there = np.isfinite(values)
    colours = plt.get_cmap(SIGNED)(norm(np.where(there, values, 0.0)))
    white = np.ones_like(colours)
    white[..., 3] = there
    colours[..., 3] = np.where(there, np.where(clear, 1.0, _DIMMED), 0.0)
    for image in (white, colours):
        ax.imshow(image, aspect="auto", interpolation="nearest", **how)


def mark_largest_control(bar: Any, null: float) -> None:
    """Lines on a colour bar at the largest |share| of a control, on both sides of 0."""
    for sign in (-1, 1):
        bar.ax.axhline(sign * null, color=INK, lw=1.2)

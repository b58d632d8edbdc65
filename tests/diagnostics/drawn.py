"""What stands in a figure, read back from its axes."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure


def panels(figure: Figure) -> list[Axes]:
    """The visible axes."""
    return [ax for ax in figure.axes if ax.get_visible()]


def titles(figure: Figure) -> list[str]:
    """Of the visible panels."""
    return [ax.get_title(loc="left") for ax in panels(figure)]


def caption(figure: Figure) -> str:
    """In one line."""
    return " ".join(figure.get_supxlabel().split())


def legend(figure: Figure) -> list[str]:
    """Entries of the figure's own legend."""
    return [text.get_text() for text in figure.legends[0].get_texts()]


def series(ax: Any) -> list[tuple[ErrorbarContainer, np.ndarray]]:
    """Each error-bar series and its points, `[point, (x, value, low, high)]`, in the order drawn."""
    found = []
    for container in ax.containers:
        if isinstance(container, ErrorbarContainer):
            line, _, bars = container.lines
            x, y = (np.asarray(v, dtype=float) for v in line.get_data())
            ends = [(s[0][1], s[1][1]) if len(s) else (np.nan, np.nan) for s in bars[-1].get_segments()]
            found.append((container, np.column_stack([x, y, np.reshape(ends, (-1, 2))])))
    return found


def points(ax: Any, label: str) -> np.ndarray:
    """Points of the one series of this label."""
    (found,) = [points for container, points in series(ax) if container.get_label() == label]
    return found

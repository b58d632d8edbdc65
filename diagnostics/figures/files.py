"""Figures saved as PNG, SVG and PDF: the same figure gives the same bytes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from interventions.files import write_whole

FIGURE_KINDS: dict[str, dict[str, Any]] = {
    "png": {"dpi": 200},
    "svg": {"metadata": {"Date": None}},
    "pdf": {"metadata": {"CreationDate": None}},
}
"""Of files of figures, and how each is saved: without a date, so that the same figure gives the same bytes."""
_FIGURE_FILES: dict[Any, Any] = {
    "pdf.fonttype": 42,
    "svg.hashsalt": "mechdiag",
}  # text stays text in a PDF; ids that do not change


def save_figures(folder: Path, figures: Mapping[str, Any]) -> list[str]:
    """Each figure as PNG (200 dpi), SVG and PDF under its name, laid out once for all three, then closed; the names of the files."""
    names = []
    for name, figure in figures.items():
        figure.set_dpi(FIGURE_KINDS["png"]["dpi"])
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # each draw moves things a little otherwise
        for end, how in FIGURE_KINDS.items():
            with plt.rc_context(_FIGURE_FILES):
                write_whole(folder / f"{name}.{end}", lambda path, figure=figure, how=how: figure.savefig(path, **how))
            names.append(f"{name}.{end}")
        plt.close(figure)
    return names

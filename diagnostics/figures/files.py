"""Figures saved as PNG, SVG and PDF: the same figure gives the same bytes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from diagnostics.figures.looks import FILE_STYLE
from interventions.files import write_whole

FIGURE_KINDS: dict[str, dict[str, Any]] = {
    "png": {"dpi": 200},
    "svg": {"metadata": {"Date": None}},
    "pdf": {"metadata": {"CreationDate": None}},
}
"""How each kind of file is saved: without a date, so that equal figures give equal bytes."""


def save_figures(folder: Path, figures: Mapping[str, Any]) -> list[str]:
    """Each figure as PNG (200 dpi), SVG and PDF under its name, laid out once for all three, then closed; the names of the files."""
    names = []
    for name, figure in figures.items():
        figure.set_dpi(FIGURE_KINDS["png"]["dpi"])
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # each draw moves things a little otherwise
        for end, how in FIGURE_KINDS.items():
            with plt.rc_context(FILE_STYLE):
                write_whole(folder / f"{name}.{end}", lambda path, figure=figure, how=how: figure.savefig(path, **how))
            names.append(f"{name}.{end}")
        plt.close(figure)
    return names

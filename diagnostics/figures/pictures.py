"""Figures as data within a page, so that the page needs no other file."""

import base64
import io
from typing import NamedTuple

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from diagnostics.figures.files import FIGURE_KINDS
from diagnostics.figures.looks import FILE_STYLE, OPEN

_MOST_BYTES = 300_000
_DPI = 150


class Picture(NamedTuple):
    """What an `<img>` of a figure needs."""

    source: str
    """the picture as a `data:` URI"""
    width: int
    """CSS pixels"""


def picture(figure: Figure) -> Picture:
    """A figure, which is closed then, as SVG, or as PNG where thousands of points make that large. The same figure gives the same bytes."""
    try:
        with plt.rc_context(FILE_STYLE):
            kind, data = "svg+xml", _saved(figure, "svg", **FIGURE_KINDS["svg"])
            if len(data) > _MOST_BYTES:
                kind, data = "png", _saved(figure, "png", dpi=_DPI)
        width = round(figure.get_figwidth() * 96)
    finally:
        plt.close(figure)
    return Picture(f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}", width)


def _saved(figure: Figure, kind: str, **how: object) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format=kind, facecolor=OPEN, **how)  # type: ignore[arg-type]
    return out.getvalue()

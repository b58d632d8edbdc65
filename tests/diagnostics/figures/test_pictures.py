import base64

import matplotlib.pyplot as plt
import numpy as np
import pytest

from diagnostics.figures.pictures import picture


def drawn(n):
    figure, ax = plt.subplots(figsize=(5, 2))
    ax.plot(np.arange(n) % 7, np.random.default_rng(0).normal(size=n), "o")
    return figure


@pytest.mark.parametrize(("points", "kind", "start"), [(5, "svg+xml", b"<?xml"), (20_000, "png", b"\x89PNG")])
def test_pictures_are_svg_or_png_if_large(points, kind, start):
    before = plt.get_fignums()
    found = picture(drawn(points))
    head, data = found.source.split(";base64,")
    assert head == f"data:image/{kind}" and base64.b64decode(data).startswith(start)
    assert found.width == 480 and plt.get_fignums() == before


def test_same_figure_gives_same_bytes():
    assert picture(drawn(5)) == picture(drawn(5)) != picture(drawn(6))

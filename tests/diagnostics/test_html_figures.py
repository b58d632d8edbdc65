import base64

import matplotlib.pyplot as plt
import numpy as np

from diagnostics.html_figures import picture
from tests.pages import read


def drawn(n):
    figure, ax = plt.subplots()
    ax.plot(np.arange(n) % 7, np.random.default_rng(0).normal(size=n), "o")
    return figure


def source(html):
    kind, data = read(html).of("img", "src")[0].split(";base64,")
    return kind, base64.b64decode(data)


def test_a_figure_is_carried_as_data_and_closed():
    before = plt.get_fignums()
    html = picture(drawn(5), 'what "it" shows')
    kind, data = source(html)
    assert kind == "data:image/svg+xml" and data.lstrip().startswith(b"<?xml") and b"</svg>" in data
    assert read(html).of("img", "alt") == ['what "it" shows'] and plt.get_fignums() == before


def test_thousands_of_points_go_as_pixels():
    kind, data = source(picture(drawn(20_000), "many"))
    assert kind == "data:image/png" and data.startswith(b"\x89PNG")


def test_the_same_figure_gives_the_same_bytes():
    assert picture(drawn(5), "x") == picture(drawn(5), "x") != picture(drawn(6), "x")

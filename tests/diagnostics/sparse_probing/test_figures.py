"""Panels and captions of the figure, for one data set and for several."""

import matplotlib.pyplot as plt
import pytest

from diagnostics.sparse_probing.run import probe_saes
from tests.diagnostics.drawn import caption, legend, panels, series, titles
from tests.diagnostics.sparse_probing.test_run import SETS, model, result, saes


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def test_panels_show_the_accuracies_of_each_data_set():
    figure = result().plot()
    assert titles(figure) == ["mean of 2 data sets", "two: two classes", "three: 3 classes, each against the rest"]
    for ax, dataset in zip(panels(figure), ("mean", "two", "three"), strict=True):
        drawn = [points[:, 1] for _, points in series(ax)]
        assert len(drawn) == 2
        for y, sae in zip(drawn, result().names, strict=True):
            wanted = [("selected", 1), ("selected", 4), ("all", 0), ("raw", 0)]
            of = {(g["kind"], g["k"]): g["accuracy"].value for g in result().select(sae=sae, dataset=dataset)}
            assert y.tolist() == [of[key] for key in wanted]
        assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "4", "all", "raw x"]
    assert "95 % over groups" in caption(figure)
    assert "two: 40 texts; three: 72 texts in groups" in caption(figure)
    assert legend(figure) == [*result().names, "random latents", "shuffled labels", "one split"]


def test_one_data_set_has_one_panel():
    found = probe_saes(model(), SETS[0], {"4/cosine": saes()["4/cosine"]}, ks=(1,), seeds=1)
    figure = found.plot()
    (ax,) = panels(figure)
    assert len(series(ax)) == 1 and "95 % over texts" in caption(figure)

"""The figure: what is drawn where, for one data set and for several."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer

from diagnostics.sparse_probing import probe_saes
from tests.diagnostics.test_sparse_probing import HOW, SETS, model, result, saes


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def points(ax) -> list[np.ndarray]:
    return [c.lines[0].get_ydata() for c in ax.containers if isinstance(c, ErrorbarContainer)]


def test_panels_hold_the_groups():
    figure = result().plot()
    panels = [ax for ax in figure.axes if ax.get_visible()]
    assert [ax.get_title(loc="left") for ax in panels] == [
        "mean of 2 data sets", "two: two classes", "three: 3 classes, each against the rest"
    ]  # fmt: skip
    for ax, dataset in zip(panels, ("mean", "two", "three"), strict=True):
        drawn = points(ax)
        assert len(drawn) == 2
        for y, sae in zip(drawn, result().names, strict=True):
            wanted = [("selected", 1), ("selected", 4), ("all", 0), ("raw", 0)]
            of = {(g["kind"], g["k"]): g["accuracy"].value for g in result().select(sae=sae, dataset=dataset)}
            assert y.tolist() == [of[key] for key in wanted]
        assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "4", "all", "raw x"]
    words = " ".join(figure._supxlabel.get_text().split())
    assert (
        "delete-one-group (one text where a set has none) jackknife" in words
        and "two: 40 texts; three: 72 texts in groups" in words
    )
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [*result().names, "random latents", "shuffled labels", "one split"]


def test_one_data_set_has_one_panel():
    found = probe_saes(model(), SETS[0], {"4/cosine": saes()["4/cosine"]}, **HOW)
    (ax,) = [ax for ax in found.plot().axes if ax.get_visible()]
    assert len(points(ax)) == 1
    assert "delete-one-text jackknife" in " ".join(found.plot()._supxlabel.get_text().split())

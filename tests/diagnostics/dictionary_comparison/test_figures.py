"""Figures draw the numbers of the result, also where some are missing."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest

from tests.diagnostics.dictionary_comparison.test_run import result
from tests.diagnostics.drawn import caption, panels, points


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def test_quartiles_of_unique_latents():
    found, figure = result(), result().plot()
    (ax,) = (ax for ax in figure.axes if ax.get_visible())
    pair = found.pair("standard", "cosine")
    drawn = points(ax, f"only in standard: {pair['unique']}")[:, 1]
    np.testing.assert_allclose(drawn, [100 * pair[f"unique_q{q}"]["value"] for q in range(1, 5)])


def test_stability_of_each_ordered_pair():
    found, figure = result(), result().figures()["dictionary_stability"]
    for ax, column in zip(figure.axes, ("mcs", "matched_share"), strict=True):
        shown = {tuple(map(round, t.get_position()[::-1])): t.get_text() for t in ax.texts}
        place = found.names.index
        expected = {(place(g["sae"]), place(g["other"])): f"{g[column]:.2f}" for g in found.groups}
        assert shown == expected and len(ax.patches) == 1
    assert "Chance, left: 0." in caption(figure)


def test_gradient_curves_fall_from_100_percent_to_0():
    found, figure = result(), result().figures()["dictionary_gradients"]
    line = next(line for line in found.lines["saes"] if line["sae"] == "cosine")
    for ax, kind in zip(figure.axes, ("gradient", "sensitivity", "error", "error_norm"), strict=True):
        (drawn,) = (c for c in ax.lines if c.get_label().startswith("cosine: "))
        x, y = drawn.get_data()
        assert y[0] == 100 and y[-1] == 0 and (np.diff(y) <= 0).all()
        assert len(x) == line[f"{kind}_latents"] + 2
        assert f"{100 * line[f'{kind}_above_2']['value']:.0f} %" in drawn.get_label()


def test_alignment_and_effect_have_a_point_for_each_latent():
    found = result()
    figures = found.figures()
    for name, column in (("alignment", "mcs_seeds"), ("effect", "kl")):
        by_name = {ax.get_title("left"): ax for ax in panels(figures[f"dictionary_{name}"])}
        assert list(by_name) == found.names
        own = found.frame.query("sae == 'standard' and fired > 0").dropna(subset=column)
        assert len(by_name["standard"].collections[0].get_offsets()) == len(own)


def test_figures_without_values_are_left_out():
    found = result()
    mute = found.frame.assign(alignment=np.nan, alignment_cosine=np.nan, gradient_ratio=np.nan)
    assert list(replace(found, frame=mute).figures()) == ["dictionary_quartiles", "dictionary_stability"]
    without = replace(found, ablations=found.ablations.iloc[:0]).figures()
    assert "dictionary_effect" not in without and "dictionary_alignment" in without

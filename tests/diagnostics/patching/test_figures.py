"""Maps show every cell's share in its colour; the mark on the colour bar is the largest control."""

import numpy as np
import pytest
from matplotlib import pyplot as plt

from diagnostics.figures.looks import SIGNED
from diagnostics.pairs.pair import Pair, Pairs
from diagnostics.patching import summary
from diagnostics.patching.figures import _outline, plot_audit, plot_maps
from diagnostics.patching.result import ActivationPatching
from diagnostics.patching.run import _words
from interventions.errors import ResultError
from tests.diagnostics.patching.made import frame

SMALL = {"pairs": 12, "layers": 4, "labels": ("BOS", "S2", "END"), "first": 1}
PROVENANCE = {
    "model": "m", "model_note": None, "norm": "RMSNorm", "dtype": "float32", "seed": 3, "metric": "logit_difference",
    "controls": 1, "texts": {"pairs": {"task": "ioi", "pairs": 12}}, "path": {"pairs": "replay"},
}  # fmt: skip


@pytest.mark.parametrize("heads", [0, 2])
def test_maps_draw_the_cells_and_mark_the_largest_control(heads):
    where = (3, heads - 1, "END")
    cells = summary.cells(frame({where: -0.5}, heads=heads, site="z" if heads else "resid_pre", **SMALL))
    figure = plot_maps(cells, PROVENANCE)
    *panels, bar = figure.axes
    assert len(panels) == (2 * 2 if heads else 2)
    largest = cells["share"].abs().max()
    assert bar.get_ylim() == pytest.approx((-largest, largest))
    marks = {round(float(line.get_ydata()[0]), 9) for line in bar.lines if len(set(line.get_ydata())) == 1}
    null = round(float(cells["null"].max()), 9)
    assert {-null, null} <= marks
    column = heads - 1 if heads else 1
    drawn = panels[1 if heads else 0].images[-1].get_array()
    share = cells.loc[(cells["direction"] == "denoise") & (cells["layer"] == 3) & (cells["label"] == "END")][
        "share"
    ].iloc[-1]
    assert tuple(drawn[3, column]) == pytest.approx(
        (*plt.get_cmap(SIGNED)(0.5 + share / largest / 2)[:3], 1.0), abs=0.01
    )
    alphas = {round(float(a), 3) for ax in panels for a in np.unique(ax.images[-1].get_array()[..., 3])}
    assert len(alphas) == 2 and max(alphas) == 1.0  # what its control does too is dimmed
    plt.close(figure)


def test_scatter_holds_every_cell():
    cells = summary.cells(frame({(3, 1, "END"): 0.5}, heads=2, scores=("gradient",), **SMALL))
    figure = plot_audit(cells, summary.audit(cells), PROVENANCE)
    for ax, direction in zip(figure.axes, ("denoise", "noise"), strict=True):
        some = cells[cells["direction"] == direction]
        points = np.concatenate([line.get_xydata() for line in ax.lines[:2]])
        expected = some[["share", "gradient"]].to_numpy()
        assert np.allclose(points[points[:, 0].argsort()], expected[expected[:, 0].argsort()])
    plt.close(figure)


def test_cells_that_beat_their_controls_are_outlined_together():
    inside = np.zeros((3, 4), dtype=bool)
    inside[1, 1:3] = inside[2, 3] = True
    lines = {tuple(map(tuple, line)) for line in _outline(inside)}
    two = {((0.5 + i, y), (1.5 + i, y)) for i in (0, 1) for y in (0.5, 1.5)} | {
        ((x, 0.5), (x, 1.5)) for x in (0.5, 2.5)
    }
    one = {((2.5, y), (3.5, y)) for y in (1.5, 2.5)} | {((x, 1.5), (x, 2.5)) for x in (2.5, 3.5)}
    assert lines == two | one  # (x, y); no line between the first two


def test_scores_are_plotted_for_one_site():
    found = ActivationPatching(frame({(3, 1, "END"): 0.5}, heads=2, scores=("gradient",), **SMALL), [], PROVENANCE)
    assert len(found.plot_scores("z").axes) == len(found.plot_scores().axes) == 2
    plt.close("all")
    with pytest.raises(ResultError, match="no scores at mlp_out; known: z;"):
        found.plot_scores("mlp_out")


def test_heads_and_controls_share_a_colour_scale():
    found = ActivationPatching(frame({(3, 1, "END"): 0.5}, heads=2, **SMALL), [], PROVENANCE)
    figure = found.plot_beside_control("END")
    some = found.cells.query("label == 'END' and direction == 'denoise'")
    largest = some["share"].abs().max()
    for ax, column in zip(figure.axes, ("share", "control"), strict=False):
        values = some.pivot(index="layer", columns="head", values=column).to_numpy()
        colours = plt.get_cmap(SIGNED)(0.5 + values / largest / 2)
        assert np.allclose(ax.images[-1].get_array()[..., :3], colours[..., :3], atol=0.01)
        assert [text.get_text() for text in ax.texts] == ["3.1"]
    plt.close(figure)
    with pytest.raises(ResultError, match="no heads beside a control at S1; positions known: S2, END;"):
        found.plot_beside_control("S1")


def test_layers_that_were_not_measured_are_not_drawn():
    cells = summary.cells(frame(heads=2, **SMALL))
    figure = plot_maps(cells[cells["layer"] != 1], PROVENANCE)
    assert figure.axes[0].images[-1].get_array().shape[0] == 3
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["0", "2", "3"]
    assert "0 exactly" not in figure.get_supxlabel()
    plt.close(figure)


def test_positions_without_roles_are_named_by_their_tokens():
    made = tuple(Pair((1, 2, c), (1, 3, c), 8, 9) for c in (4, 5))
    pairs = Pairs(made, np.ones(2), -np.ones(2))
    assert _words(pairs, None) == [{"0": "⟨1⟩", "1": "⟨2⟩/⟨3⟩"}]

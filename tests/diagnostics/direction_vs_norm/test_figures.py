"""What is drawn, read back from the axes, against the estimates of the table."""

import dataclasses
import functools
import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest

from diagnostics.direction_vs_norm.result import DirectionNorm
from diagnostics.direction_vs_norm.run import direction_norm
from diagnostics.figures.axes import CAP
from diagnostics.figures.looks import LABELS, UNTRAINED
from interventions import Site
from interventions.errors import MechdiagError
from interventions.texts.prompts import Prompts
from tests.diagnostics.drawn import points
from tests.tiny import prompts, tiny_model

PANELS = {
    "direction ÷ norm": ("direction patch ÷ norm patch", lambda g: g["ratios"]["direction ÷ norm"]["median"].estimate),
    "placebo_token": (
        "direction patch ÷ its placebo",
        lambda g: g["ratios"]["direction ÷ placebo_token"]["median"].estimate,
    ),
    "placebo_direction": (
        "direction patch ÷ its placebo",
        lambda g: g["ratios"]["direction ÷ placebo_direction"]["median"].estimate,
    ),
}


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def result(layers=(0, 3, 5), context="both", n_prompts=24, pairs=40) -> DirectionNorm:
    """A run shared by tests."""
    return _result(layers, context, n_prompts, pairs)


@functools.cache
def _result(layers, context, n_prompts, pairs):
    tokens = prompts(tuple(20 + (7 * i) % 21 for i in range(24)))[:n_prompts]
    given = Prompts(tokens, [[False] * len(p) for p in tokens], [""] * n_prompts, provenance={"name": "random tokens"})
    return direction_norm(tiny_model("llama"), given, layers=layers, context=context, pairs=pairs, seed=4)


def figure(run: DirectionNorm):
    """Drawn to the last pixel, so that what fails while drawing fails here."""
    drawn = run.plot()
    drawn.canvas.draw()
    return drawn


@functools.cache
def drawn_result():
    """That of `result()`, for tests that look at it."""
    return figure(result())


def axes(drawn, y_label: str):
    (found,) = [ax for ax in drawn.axes if ax.get_ylabel() == y_label]
    return found


def kl_axes(drawn, context: str):
    (found,) = [ax for ax in drawn.axes if ax.get_title(loc="left").startswith(LABELS[context])]
    return found


def arrows(ax) -> list[float]:
    """Where open markers stand: the only markers filled with white."""
    open_ones = [line for line in ax.lines if line.get_markerfacecolor() == "white"]
    return sorted(y for line in open_ones for y in np.asarray(line.get_ydata(), dtype=float))


def groups(run: DirectionNorm, context: str) -> list:
    return [g for g in run.groups if g["pair_set"] == "random" and g["context"] == context]


def check_points(drawn: np.ndarray, estimates: list) -> None:
    expected = [e for e in estimates if not e.bound and e.value <= CAP]
    np.testing.assert_allclose(drawn[:, 1], [e.value for e in expected])
    ends = [[x if np.isfinite(x) else e.value for x in (e.low, e.high)] for e in expected]
    np.testing.assert_allclose(drawn[:, 2:], np.reshape(np.minimum(ends, CAP), (-1, 2)))


@pytest.mark.parametrize(("layers", "context"), [((0, 3, 5), "both"), ((3,), "single_token")])
def test_plotted_points_match_the_table(layers, context):
    run = result(layers, context)
    drawn = drawn_result() if run is result() else figure(run)
    contexts = ("in_place", "single_token") if context == "both" else (context,)
    assert len(drawn.axes) == 2 * len(contexts) + 2
    for one in contexts:
        some = groups(run, one)
        assert [g["layer"] for g in some] == list(layers)
        for name in ("direction", "norm", "placebo_direction", "placebo_token", "placebo_norm"):
            estimates = [
                g["edits"][name]["median_kl"]
                for g in some
                if g["edits"][name]["median_kl"].value > 10 * g["noise_floor"]
            ]
            check_points(points(kl_axes(drawn, one), LABELS[name]), estimates)
        ax = axes(drawn, PANELS["direction ÷ norm"][0])
        check_points(points(ax, LABELS[one]), [PANELS["direction ÷ norm"][1](g) for g in some])
        for name, tangent in (("placebo_token", "tangent between tokens"), ("placebo_direction", "isotropic tangent")):
            y_label, of = PANELS[name]
            check_points(points(axes(drawn, y_label), f"{LABELS[one]}, {tangent}"), [of(g) for g in some])
    for ax in drawn.axes:
        assert ax.get_yscale() == "log"
        low, high = ax.get_ylim()
        for line in ax.lines:
            y = np.asarray(line.get_ydata(), dtype=float)
            assert ((y >= low) & (y <= high))[np.isfinite(y)].all(), "nothing is drawn outside the axes"


def test_crowded_layers_are_drawn_evenly_spaced():
    run = with_layers(result(), {0: 0, 3: 29, 5: 30})
    ax = axes(figure(run), PANELS["direction ÷ norm"][0])
    assert ax.get_xlabel() == "block whose output is patched (not to scale)"
    (series,) = [c for c in ax.containers if c.get_label() == LABELS["in_place"]]
    np.testing.assert_allclose(series.lines[0].get_xdata()[:2], [0, 1], atol=0.3)
    assert ax.get_xticks().tolist() == [0, 1, 2]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "29", "30"]


def with_layers(run: DirectionNorm, names: dict[int, int]) -> DirectionNorm:
    return dataclasses.replace(run, frame=run.frame.assign(layer=run.frame.layer.map(names).astype("int32")))


def with_kl(run: DirectionNorm, value: float, *edits: str, layer: int | None = None) -> DirectionNorm:
    rows = run.frame.edit.isin(edits) & ((run.frame.layer == layer) if layer is not None else True)
    return dataclasses.replace(run, frame=run.frame.assign(kl=run.frame.kl.where(~rows, value)))


def test_norm_patch_without_effect_is_drawn_as_a_bound():
    run = with_kl(result(), 1e-30, "norm", layer=5)
    ratios = {
        c: [g["ratios"]["direction ÷ norm"]["median"].estimate for g in groups(run, c)]
        for c in ("in_place", "single_token")
    }
    assert [e.bound for e in ratios["in_place"]] == [False, False, True]
    drawn = figure(run)
    ax = axes(drawn, PANELS["direction ÷ norm"][0])
    expected = [min(e.value, CAP) for e in itertools.chain(*ratios.values()) if e.bound or e.value > CAP]
    np.testing.assert_allclose(arrows(ax), sorted(expected))
    assert len(ax.texts) == len(expected)
    # Its KL stands in the strip of the noise floor, not among the effects.
    assert len(points(kl_axes(drawn, "in_place"), LABELS["norm"])) == 2
    strips = [ax for ax in drawn.axes if any("noise floor" in t.get_text() for t in ax.texts)]
    assert len(strips) == 2
    assert any(np.isclose(line.get_ydata(), 1e-30, rtol=1e-6).any() for line in strips[0].lines)


def test_zero_noise_floor_can_be_plotted():
    figure(with_kl(result((3,), "single_token"), 0.0, "self", "norm"))


@functools.cache
def beside_untrained() -> DirectionNorm:
    tokens = prompts(tuple(20 + (7 * i) % 21 for i in range(24)))
    sites = [Site(layer, point) for layer in (1, 4) for point in ("attn_out", "resid_post")]
    settings = {"pairs": 24, "context": "both", "pair_sets": ("random",), "null_seeds": 2}
    return direction_norm(tiny_model("llama"), tokens, sites=sites, **settings)


def test_randomly_initialised_models_are_grey_lines():
    run, point = beside_untrained(), "resid_post"
    drawn = run.plot(point)
    drawn.canvas.draw()
    for name, contexts in (("direction ÷ norm", ("in_place", "single_token")), ("placebo_token", ("in_place",))):
        y_label, of = PANELS[name]
        ax = axes(drawn, y_label)
        grey = [line for line in ax.lines if line.get_color() == UNTRAINED]
        expected = [
            [min(of(g).value, CAP) for g in run.select(model=label, point=point) if g["context"] == context]
            for context in contexts
            for label in ("random 0", "random 1")
        ]
        np.testing.assert_allclose([line.get_ydata() for line in grey], expected)
        assert all(list(line.get_xdata()) == [1, 4] for line in grey)
        named = [line.get_label() for line in grey if not line.get_label().startswith("_")]
        assert len(named) == len(contexts)  # a line of the legend for each context, not for each seed
        assert all(
            "randomly initialised models" in label and LABELS[c] in label
            for label, c in zip(named, contexts, strict=True)
        )
        solid = [of(g) for g in run.select(point=point) if g["context"] == "in_place"]
        series = LABELS["in_place"] if name == "direction ÷ norm" else f"{LABELS['in_place']}, tangent between tokens"
        check_points(points(ax, series), solid)


def test_a_figure_for_each_point():
    run = beside_untrained()
    figures = run.figures()
    assert list(figures) == ["direction_norm", "direction_norm_resid_post"]
    labels = [{ax.get_xlabel() for ax in drawn.axes} - {""} for drawn in figures.values()]
    assert labels == [{"block, patched at attn_out"}, {"block whose output is patched"}]
    assert list(result().figures()) == ["direction_norm"]


def test_without_random_pairs_plotting_raises():
    tokens = prompts((20, 20))
    run = direction_norm(tiny_model("llama"), tokens, layers=[1], pairs=4, pair_sets=("same_norm",))
    with pytest.raises(MechdiagError, match="random"):
        run.plot()
    assert run.figures() == {}  # so that the table can be written all the same

"""What is drawn of dose-response and unit-norm results, read back from the axes, against the estimates of the tables."""

import functools

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from diagnostics.dose.result import DoseResponse
from diagnostics.dose.run import dose_response
from diagnostics.figures.axes import CAP
from diagnostics.figures.axes import points as draw_points
from diagnostics.figures.looks import EDIT_LABELS, UNTRAINED
from diagnostics.statistics.estimate import Estimate
from diagnostics.unit_norm.result import UnitNorm
from diagnostics.unit_norm.run import unit_norm_sweep
from interventions import ResultError
from interventions.texts.prompts import Prompts
from tests.diagnostics.drawn import caption, legend, points
from tests.tiny import D_MODEL, fresh, prompts, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:an interval from")
LENGTHS = tuple(12 + (7 * i) % 11 for i in range(24))
TOKENS = prompts(LENGTHS)
TEXT = Prompts(TOKENS, [[False] * len(p) for p in TOKENS], [""] * 24, provenance={"name": "random tokens"})
STEER = {"steer": torch.randn(D_MODEL, generator=torch.Generator().manual_seed(2))}
TITLES = {"": "this token alone", "_everywhere": "all tokens at once"}
LOWEST = 1e-7
"""nats: below, an effect is said in words"""
GREY = {"-": "toward_token", "--": "norm_up"}


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def doses(layers=(0, 3, 5), given=True) -> DoseResponse:
    """A run shared by tests."""
    return _doses(layers, given)


@functools.cache
def _doses(layers, given):
    chosen = {"tokens": 26, "doses": (0.05, 0.3, 1.0), "seed": 4, "null_seeds": 1}
    return dose_response(tiny_model("llama"), TEXT, layers=layers, directions=STEER if given else {}, **chosen)


@functools.cache
def units(layers=(0, 3, 5), nulls=1) -> UnitNorm:
    return unit_norm_sweep(tiny_model("llama"), TEXT, layers=layers, tokens=40, seed=4, null_seeds=nulls)


@functools.cache
def deep(kind=dose_response):
    """A model of ten blocks: the tiny one's, some of them twice."""
    hf = fresh("llama")
    hf.model.layers.extend(fresh("llama").model.layers[:4])
    hf.config.num_hidden_layers = 10
    hf.config.layer_types = ["full_attention"] * 10
    for i, block in enumerate(hf.model.layers):
        block.self_attn.layer_idx = i
    own = {"doses": (0.1, 0.2)} if kind is dose_response else {}
    return kind(hf, TEXT, layers=range(10), tokens=15, **own)


def drawn(figure):
    """To the last pixel, so that what fails while drawing fails here."""
    figure.canvas.draw()
    return figure


@functools.cache
def drawn_doses(depth=False):
    """Those of `doses()`, for tests that look at them."""
    return drawn(doses().plot_depth(0.3) if depth else doses().plot())


def check_points(found: np.ndarray, estimates: list) -> None:
    some = [e for e in estimates if not e.bound and 0 < e.value <= CAP]
    np.testing.assert_allclose(found[:, 1], [e.value for e in some], rtol=1e-9)
    ends = [[end if np.isfinite(end) else e.value for end in (e.low, e.high)] for e in some]
    np.testing.assert_allclose(found[:, 2:], np.reshape(ends, (-1, 2)), rtol=1e-9)


def check_inside(figure, lowest: float = 0.0) -> None:
    """Every marker, line and bar above `lowest` lies within its panel, every panel and word within the figure."""
    box = figure.get_tightbbox(figure.canvas.get_renderer())
    width, height = figure.get_size_inches()
    assert box.x0 >= -0.05 and box.y0 >= -0.05 and box.x1 <= width + 0.05 and box.y1 <= height + 0.05
    seen = 0
    for ax in figure.axes:
        if not ax.get_visible():
            continue
        (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
        for line in ax.lines:
            if line.get_transform() == ax.transData:
                x, y = (np.asarray(v, dtype=float) for v in line.get_data())
                x, y = x[y > lowest], y[y > lowest]
                assert ((left <= x) & (x <= right)).all() and ((low <= y) & (y <= high)).all()
                seen += len(x)
        for container in ax.containers:
            ends = [s[:, 1] for s in container.lines[2][0].get_segments()]
            assert all(low <= end <= high for pair in ends for end in pair if pair[0] > lowest)
    assert seen > 0


def greys(ax) -> list:
    return [line for line in ax.lines if to_hex(line.get_color()) == to_hex(UNTRAINED)]


def test_unbounded_interval_runs_to_the_edge_of_the_axes():
    _, panels = plt.subplots(1, 2)
    for ax, high in zip(panels, (np.inf, 2.0), strict=True):
        estimates = [Estimate(1.0, 0.5, end, 0.1, 30, 30) for end in (2.0, high)]
        draw_points(ax, np.array([0.0, 1.0]), estimates, "C0", "some", "o")
        ax.set_yscale("log")
    assert panels[0].get_ylim() == panels[1].get_ylim()
    bars = [[c.get_segments() for c in ax.collections if c not in ax.containers[0].lines[2]] for ax in panels]
    ((segment,),) = bars[0]
    assert segment[0].tolist() == [1.0, 1.0] and segment[1][0] == 1 and segment[1][1] > CAP and bars[1] == [[]]


# KL against dose


@pytest.mark.parametrize(("layers", "given"), [((0, 3, 5), True), ((3,), False)])
def test_plot_draws_the_doses_of_the_table(layers, given):
    run = doses(layers, given)
    figure = drawn_doses() if run is doses() else drawn(run.plot())
    panels = [ax for ax in figure.axes if ax.get_visible()]
    assert [ax.get_title(loc="left") for ax in panels] == [f"block {layer}" for layer in layers]
    labels = {**EDIT_LABELS, **({"steer": "steer (given)"} if given else {})}
    for ax, layer in zip(panels, layers, strict=True):
        groups = [g for g in run.select() if g["layer"] == layer]
        assert [g["dose"] for g in groups] == [0.05, 0.3, 1.0]
        for edit, label in labels.items():
            some = [g for g in groups if g["edits"][edit]["median_kl"].value > 10 * g["noise_floor"]]
            found = points(ax, label)
            check_points(found, [g["edits"][edit]["median_kl"] for g in some])
            np.testing.assert_allclose(found[:, 0], [g["dose"] for g in some], rtol=0.1)  # side by side
            if layer == 5 and edit == "norm_up":
                assert len(found) == 0  # a no-op there: nothing but noise is left out
            else:
                assert len(found) == (1 if layer == 5 and edit == "norm_down" else 3)
        lines = greys(ax)
        assert len(lines) == 2
        for line in lines:
            edit = GREY[line.get_linestyle()]
            null = [g for g in run.select(model="random 0") if g["layer"] == layer]
            expected = [g["edits"][edit]["median_kl"].value for g in null]
            floor = [10 * g["noise_floor"] for g in null]
            np.testing.assert_allclose(line.get_ydata(), np.where(np.greater(expected, floor), expected, np.nan))
            np.testing.assert_allclose(line.get_xdata(), [0.05, 0.3, 1.0])
        assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
        assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0.05", "0.3", "1"]
    assert panels[0].get_ylabel() == "median KL(clean ‖ intervened), nats"
    assert figure.axes[-1].get_xlabel() == "dose ‖Δx‖ / ‖x‖"
    assert legend(figure) == [*labels.values(), f"untrained: {EDIT_LABELS['toward_token']}", f"untrained: {EDIT_LABELS['norm_up']}"]  # fmt: skip
    check_inside(figure, LOWEST)


def test_dose_figure_shows_at_most_six_blocks():
    run = deep()
    figure = drawn(run.plot())
    titles = [ax.get_title(loc="left") for ax in figure.axes if ax.get_visible()]
    assert titles == [f"block {layer}" for layer in (0, 2, 4, 5, 7, 9)]
    check_inside(figure, LOWEST)
    figure = drawn(run.plot_depth(0.2))
    for ax in figure.axes:
        assert [tick.get_text() for tick in ax.get_xticklabels()] == [str(layer) for layer in range(10)]
    found = points(figure.axes[0], EDIT_LABELS["between_tokens"])
    check_points(found, [g["ratios"]["between_tokens ÷ isotropic"] for g in run.select() if g["dose"] == 0.2])
    assert len(found) == 10
    check_inside(figure)


# By depth


@pytest.mark.parametrize("layers", [(0, 3, 5), (3,)])
def test_plot_depth_draws_the_ratios_of_the_table(layers):
    run = doses(layers, given=len(layers) > 1)
    figure = drawn_doses(depth=True) if run is doses() else drawn(run.plot_depth(0.3))
    left, right = figure.axes
    every = [g for g in run.select() if g["dose"] == 0.3]
    nulls = [g for g in run.select(model="random 0") if g["dose"] == 0.3]
    names = ["toward_token", "between_tokens", "norm_up", "norm_down", *run.provenance["directions"]]
    labels = {edit: EDIT_LABELS.get(edit, f"{edit} (given)") for edit in names}
    for edit in names:
        groups = [g for g in every if g["edits"][edit]["median_kl"].value > 10 * g["noise_floor"]]
        assert len(groups) == len(layers) - (5 in layers and edit.startswith("norm"))
        versus = "steer_placebo_isotropic" if edit == "steer" else "isotropic"
        for ax, value in (
            (left, lambda g, e=edit, v=versus: g["ratios"][f"{e} ÷ {v}"]),
            (right, lambda g, e=edit: g["edits"][e]["direct_over_total"]),
        ):
            check_points(points(ax, labels[edit]), [value(g) for g in groups])
            np.testing.assert_allclose(
                points(ax, labels[edit])[:, 0].round(), [g["layer"] for g in groups if not value(g).bound]
            )
            style = {v: k for k, v in GREY.items()}.get(edit)
            if style:
                (line,) = [line for line in greys(ax) if line.get_linestyle() == style]
                expected = [value(g).value if value(g).value >= 1e-3 else np.nan for g in nulls]
                np.testing.assert_allclose(line.get_ydata(), expected)
                np.testing.assert_allclose(line.get_xdata(), [g["layer"] for g in nulls])
    assert (left.get_yscale(), right.get_yscale()) == ("log", "log")
    assert "÷ KL of an isotropic rotation" in left.get_ylabel() and right.get_ylabel() == "direct effect ÷ total effect"
    assert "0.3 ‖x‖" in left.get_title(loc="left") and "dose 0.3" in right.get_title(loc="left")
    assert left.get_xlabel() == "block whose output is patched"
    assert [label for label in legend(figure) if "untrained" not in label] == list(labels.values())
    check_inside(figure)


def said_in(ax) -> str:
    return " ".join(text.get_text() for text in ax.texts)


def test_the_caption_names_edits_without_effect():
    """After the last block of an RMSNorm model norm edits are noise, but for the one to zero."""
    panels = {ax.get_title(loc="left"): said_in(ax) for ax in drawn_doses().axes}
    panels["block 5"] = panels["block 5"].split(" below")[0]  # the largest dose is zero ablation for one of them
    assert panels == {
        "block 0": "",
        "block 3": "",
        "block 5": "norm up and norm down: no effect",
    }
    left, right = drawn_doses(depth=True).axes
    assert (said_in(left), said_in(right)) == ("norm up and norm down: no effect at block 5", "")
    left, right = drawn(doses((0, 3), given=False).plot_depth(0.3)).axes
    assert (said_in(left), said_in(right)) == ("", "")


def test_single_dose_is_not_reported_as_no_effect():
    run = dose_response(tiny_model("llama"), TEXT, layers=[2], tokens=12, doses=(0.5,))
    (ax,) = drawn(run.plot()).axes
    assert len(points(ax, EDIT_LABELS["toward_token"])) == 1
    assert said_in(ax) == ""


def test_unknown_dose_point_or_context_raises():
    with pytest.raises(ResultError, match=r"no dose 0.4 in this result; known: \[0.05, 0.3, 1.0\]"):
        doses().plot_depth(0.4)
    for form in (doses().plot, lambda **k: doses().plot_depth(0.3, **k)):
        with pytest.raises(ResultError, match="in this result"):
            form(point="mlp_out")
        with pytest.raises(ResultError, match="in this result"):
            form(context="single_token")


def test_depth_figure_uses_the_dose_nearest_to_a_fifth():
    figures = doses().figures()
    assert list(figures) == ["dose_response", "dose_response_depth"]
    assert "0.3 ‖x‖" in figures["dose_response_depth"].axes[0].get_title(loc="left")


# Unit norm


@pytest.mark.parametrize("layers", [(0, 3, 5), (3,)])
def test_unit_norm_plot_draws_the_table(layers):
    run = units(layers)
    figure = drawn(run.plot())
    groups, nulls = run.select(), run.select(model="random 0")
    labels = {"unit_norm": "norm forced to 1", "rotation": "turned by the same distance"}
    assert [ax.get_title(loc="left") for ax in figure.axes] == list(TITLES.values())
    for ax, end in zip(figure.axes, TITLES, strict=True):
        for edit, label in labels.items():
            some = [g for g in groups if g[edit + end].value > 10 * g["noise_floor"]]
            check_points(points(ax, label), [g[edit + end] for g in some])
            np.testing.assert_allclose(points(ax, label)[:, 0], [g["layer"] for g in some], atol=0.2)
            style = {"unit_norm": "--", "rotation": "-"}[edit]
            (line,) = [line for line in greys(ax) if line.get_linestyle() == style]
            expected = [g[edit + end].value if g[edit + end].value > 10 * g["noise_floor"] else np.nan for g in nulls]
            np.testing.assert_allclose(line.get_ydata(), expected)
        assert ax.get_yscale() == "log"
    assert figure.axes[0].get_ylabel() == "median KL(clean ‖ intervened), nats"
    assert {*labels.values(), *(f"untrained: {label}" for label in labels.values())} == set(legend(figure))
    assert f"{run.provenance['drawn']['trained']['tokens_used']} tokens patched at resid_post" in caption(figure)
    check_inside(figure)

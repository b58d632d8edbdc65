"""Figures of feature ablations: what they show, what they say."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from diagnostics.concept_ablation.result import FeatureAblation
from tests.diagnostics.concept_ablation.test_summary import COUNTS, table
from tests.diagnostics.drawn import caption, titles


def result(**changes) -> FeatureAblation:
    frame = table(**changes)
    arms = list(dict.fromkeys(frame["arm"]))
    provenance = {
        "model": "m", "model_note": None, "norm": "RMSNorm", "dtype": "float32", "saes": {"one": {}, "two": {}}, "arms": arms,
        "rankings": ["probe"], "counts": list(COUNTS), "sink_filter": 10.0, "reads": None, "dropped": {"reads lost": 2},
        "why_hooks": None, "texts_untouched": 3,
        "texts": {
            "d": {"concepts": {"a": {}, "b": {}}, "measured": {"texts": 24, "groups": 9}, "dropped": {"c: 3 groups, fewer than 4": 9, "empty": 2}}
        },
    }  # fmt: skip
    return FeatureAblation(frame, [], provenance)


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def test_panels_and_caption():
    figure = result().plot("kl")
    assert titles(figure) == ["a", "b", "at equal intended effect"]
    assert figure.axes[0].get_xscale() == figure.axes[0].get_yscale() == "log"
    said = "d: 24 texts measured in 9 groups, 2 concepts (without c: 3 groups, fewer than 4), effects at all tokens"
    assert said in caption(figure) and "delete-one-group jackknife" in caption(figure)


def test_zero_collateral_is_open_and_negatives_are_counted():
    found = result(arms=("selected",))
    frame = found.frame
    frame.loc[(frame["concept"] == "a") & ~frame["own"], "kl"] = 0.0
    frame.loc[(frame["concept"] == "b") & (frame["sae"] == "one") & (frame["count"] == 1), "kl"] *= -1
    figure = found.plot("kl")
    assert figure.axes[0].get_xscale() == "log" and figure.axes[0].get_yscale() == "linear"
    bottom = [line for line in figure.axes[0].lines if line.get_markerfacecolor() == "white"]
    assert len(bottom) == 2 and all(len(line.get_xdata()) == 3 for line in bottom)
    assert "Open, at the bottom: no collateral effect. Not drawn: 1 points" in caption(figure)


@pytest.mark.parametrize("arms", [("selected",), ("selected", "random", "keep")])
def test_figure_by_count(arms):
    found = result(arms=arms, per_group=2)
    figure = found.plot_counts()
    assert titles(figure) == ["precision", "dose"] + ["only the top N kept"] * ("keep" in arms)
    own = found.frame.query("sae == 'one' and arm == 'selected' and own").groupby("count")["delta_square"].mean()
    assert np.allclose(np.asarray(figure.axes[1].lines[0].get_ydata(), float), own.to_numpy())
    assert [int(t) for t in figure.axes[0].get_xticks()] == list(COUNTS)


def test_table():
    words = result().table()
    for part in ("kl, mean over concepts", "probe, at equal intended effect", "‖Δx‖²", "2 (reads lost)", "mean of 2"):
        assert part in words
    alone = result(arms=("random",)).table()
    assert "kl, at equal intended effect:\nnone" in alone


def test_without_selected_latents_there_is_no_comparison():
    figure = result(arms=("random",)).plot("kl")
    assert [t.get_text() for t in figure.axes[2].texts] == ["no selected latents"]

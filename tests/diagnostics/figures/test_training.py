"""Metrics of training runs, read and drawn."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pytest

from diagnostics.figures.training import plot_training, training_metrics
from interventions.errors import ResultError
from tests.diagnostics.drawn import caption, legend, panels

LINES = [
    {"sae": name, "step": n, "tokens": 10 * n, "fve": 0.1 * n, "dead": 0.01 * n}
    | ({f"a_{q:02d}": 0.001 * q * n for q in (5, 25, 50, 75, 95)} if "cosine" in name else {})
    for n in (1, 2, 3)
    for name in ("15/standard", "15/cosine")
]


def written(folder, lines) -> str:
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return str(folder)


def test_training_metrics_are_read_and_drawn(tmp_path):
    metrics = training_metrics(written(tmp_path, map(json.dumps, LINES)))
    assert metrics.to_dict("records")[1] == LINES[1] and len(metrics) == len(LINES)
    figure = plot_training(metrics)
    fve, dead, exponents = panels(figure)
    for ax, column, scale in ((fve, "fve", 0.1), (dead, "dead", 0.01)):
        assert [line.get_label() for line in ax.lines] == ["15/standard", "15/cosine"], column
        for line in ax.lines:
            np.testing.assert_allclose(line.get_xydata(), [(10 * n, scale * n) for n in (1, 2, 3)])
    (median,) = [line for line in exponents.lines if line.get_label() == "15/cosine"]
    np.testing.assert_allclose(median.get_ydata(), [0.05, 0.1, 0.15])
    ends = [band.get_paths()[0].vertices[:, 1] for band in exponents.collections]
    np.testing.assert_allclose([(y.min(), y.max()) for y in ends], [(0.005, 0.285), (0.025, 0.225)])
    assert legend(figure) == ["15/standard", "15/cosine"] and "dead_window" in caption(figure)
    assert len(panels(plot_training(metrics[metrics["sae"] == "15/standard"].dropna(axis=1)))) == 2
    plt.close("all")


def test_many_saes_have_a_colour_and_an_entry_for_each_kind(tmp_path):
    names = [f"{site}/{kind}-k{k}{seed}" for site in ("15", "15.mlp_out") for kind in ("abstopk", "standard-topk")
             for k in (16, 32) for seed in ("", "-seed1")]  # fmt: skip
    lines = [{"sae": name, "step": n, "tokens": n, "fve": 0.5, "dead": 0.0} for n in (1, 2) for name in names]
    figure = plot_training(training_metrics(written(tmp_path, map(json.dumps, lines))))
    assert legend(figure) == ["abstopk", "standard-topk"] and "16 SAEs" in caption(figure)
    assert [ax.get_ylabel() for ax in panels(figure)] == [
        "fraction of variance explained",
        "share of latents that are dead",
    ]
    for ax in panels(figure):
        colours = {name: line.get_color() for name, line in zip(names, ax.lines, strict=True)}
        kinds = {
            kind: {c for name, c in colours.items() if f"/{kind}" in name} for kind in ("abstopk", "standard-topk")
        }
        assert [len(own) for own in kinds.values()] == [1, 1] and kinds["abstopk"] != kinds["standard-topk"]
    plt.close("all")


@pytest.mark.parametrize("lines", [None, ["no JSON"], [], ['{"sae": "a"}'], ["3"]])
def test_folders_without_metrics_raise(lines, tmp_path):
    if lines is not None:
        written(tmp_path, lines)
    with pytest.raises(
        ResultError, match=r"metrics.jsonl (cannot be read|has no .*; expected what a training run writes)"
    ):
        training_metrics(tmp_path)

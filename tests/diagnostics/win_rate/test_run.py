"""The report is formed of its runs' tables alone, and says of each number what it must be read beside."""

import functools
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from diagnostics.projections.norm_exponent import Interventional
from diagnostics.projections.run import projection_effects
from diagnostics.projections.summary import PLACE, noise_floor
from diagnostics.statistics.tables import PLACEBOS
from diagnostics.win_rate.files import from_json
from diagnostics.win_rate.rates import win_rates
from diagnostics.win_rate.result import WinRateReport
from diagnostics.win_rate.run import win_rate_report
from diagnostics.win_rate.simpson import simpson
from diagnostics.win_rate.summary import QUARTILES, line_of
from interventions import ResultError, Site, record
from sae_models.architectures import build, named
from tests.tiny import D_MODEL, prompts, tiny_model

PROMPTS = prompts(tuple(9 + i % 5 for i in range(24)))


@functools.cache
def run(sampling: str = "stratified", **more):
    import torch

    site = Site(2)
    x = record(tiny_model("llama"), PROMPTS, [site]).activations[site].reshape(-1, D_MODEL)
    sae = build(named("standard:relu"), 32, 6, x, torch.Generator().manual_seed(0), hook_name=site.hook_name)
    settings = {
        "latents": 6,
        "tokens_per_latent": 60,
        "detail": 0.0,
        "sampling": sampling,
        "single_token_share": 1.0,
    } | more
    return projection_effects(tiny_model("llama"), PROMPTS, {"2/standard": sae}, context="both", **settings)


@functools.cache
def report() -> WinRateReport:
    return win_rate_report({"strata": run(), "published": run("active")}, draws=20)


def test_every_group_matches_its_rows():
    for contest in report().contests:
        frame = run("active" if contest.run == "published" else "stratified").frame
        rows = frame[np.logical_and.reduce([frame[key] == contest.place[key] for key in PLACE])]
        magnitudes = contest.run == "strata"
        alone = win_rates(rows, absolute=magnitudes)
        assert contest.rates.absolute == magnitudes
        assert contest.rates.main.overall.estimate == alone.main.overall.estimate
        pd.testing.assert_frame_equal(contest.rates.latents, alone.latents)
        assert contest.simpson is not None
        labels = simpson(rows, noise_floor(frame, contest.place), draws=20, absolute=magnitudes)
        assert contest.simpson.as_dict() == labels.as_dict()
    assert [(c.run, c.place["context"]) for c in report().contests] == [
        ("strata", "in_place"), ("strata", "single_token"), ("published", "in_place"), ("published", "single_token"),
    ]  # fmt: skip


def test_the_table_has_a_line_for_every_edit_and_quartile():
    frame = report().frame
    assert len(frame) == 4 * 3 * 5 and tuple(frame["quartile"].unique()) == QUARTILES
    main = frame[frame.edit == "zero"]
    assert main.main_less_this.isna().all() and main[main["quartile"] == "all"].band_low.notna().all()
    placebo = frame[frame.edit == "placebo_token"]
    assert placebo.band_low.isna().all()
    merged = main.merge(placebo, on=["run", *PLACE, "quartile"], suffixes=("", "_placebo"))
    known = merged.main_less_this_placebo.notna() & (merged.n_latents == merged.n_latents_placebo)
    assert known.any()
    gap = merged.win_rate - merged.win_rate_placebo
    np.testing.assert_allclose(gap[known], merged.main_less_this_placebo[known], atol=1e-9)


def test_report_roundtrip(tmp_path, monkeypatch):
    assert list(report().figures()) == ["win_rate", "win_rate_paradox", "win_rate_paradox_published"]
    monkeypatch.setattr(WinRateReport, "figures", lambda self: {})
    assert report().write(tmp_path) == list(WinRateReport.files())
    said = json.loads((tmp_path / "win_rate.json").read_text())
    assert set(said["provenance"]) == {"strata", "published"} and len(said["summary"]) == 4
    assert len(report().latents) == sum(len(c.rates.latents) for c in report().contests)
    found = WinRateReport.load(tmp_path)
    pd.testing.assert_frame_equal(found.frame, report().frame)
    pd.testing.assert_frame_equal(found.latents, report().latents)
    assert found.table() == report().table() and found.as_dict() == report().as_dict()
    for name in WinRateReport.files():
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        with pytest.raises(ResultError, match=f"{name} is missing"):
            WinRateReport.load(tmp_path)
        (tmp_path / name).write_bytes(content)


def test_plot_paradox_draws_the_values_of_the_table():
    figure = report().plot_paradox("strata")
    frame = report().frame
    own = frame[(frame.run == "strata") & (frame.context == "in_place") & (frame.edit == "zero")]
    drawn = [c for c in figure.axes[0].containers if getattr(c, "has_yerr", False)]
    values = [float(c.lines[0].get_ydata()[0]) for c in drawn[: own.win_rate.notna().sum()]]
    np.testing.assert_allclose(values, own.win_rate.dropna())
    with pytest.raises(ResultError, match="no run 'other'"):
        report().plot_paradox("other")


def test_no_runs_raise():
    with pytest.raises(ResultError, match="no run; give at least one"):
        win_rate_report({})


def test_rescaled_exponents_roundtrip_with_and_without_placebos():
    rescaled = run(latents=3, tokens_per_latent=40, detail=1.0, edits="rescaled")
    (contest,) = win_rate_report({"a": rescaled}, draws=4).contests[:1]
    way = contest.exponents["interventional"]
    assert isinstance(way, Interventional) and set(way.placebos) == set(PLACEBOS)
    stored = json.loads(json.dumps(way.as_dict()))
    assert from_json(Interventional, stored).as_dict() == way.as_dict()
    del stored["placebos"]
    assert from_json(Interventional, stored).as_dict() == replace(way, placebos={}).as_dict()
    line = line_of(contest)
    assert (line["its placebo's a"], line["a less placebo's"]) == (
        way.placebos["placebo_token"].placebo,
        way.placebos["placebo_token"].difference,
    )

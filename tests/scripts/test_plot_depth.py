"""`plot_depth.py` draws figures and writes their values."""

import json

import pandas as pd

from diagnostics.saved import PLANS

FILES = {f"sae_latents.{end}" for end in ("png", "svg", "pdf", "csv")}


def test_values_are_written_beside_the_figure(script):
    run = script.finished("plot_depth")
    assert run.files.keys() == FILES and "sae_latents: 10 of 10 values, of zoo" in run.said
    table = pd.read_csv(run.folder / "sae_latents.csv")
    assert set(table["series"]) == {"standard", "cosine", "cosine-seed1"} and set(table["run"]) == {"zoo"}


def test_json_holds_captions_and_values(script):
    found = json.loads(script("plot_depth", "--json").said)
    assert set(found["files"]) == FILES and found["notes"] == []
    assert "some-model" in found["figures"]["sae_latents"]["caption"]
    assert len(found["figures"]["sae_latents"]["table"]) == 10


def test_the_help_names_every_figure(script):
    said = script("plot_depth", "--help", small=False).said
    assert all(name in said for name in PLANS)
    assert "no folder of results" in script("plot_depth", "--out", script.folder, small=False).error

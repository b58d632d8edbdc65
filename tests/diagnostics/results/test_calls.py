"""How a result is made again: from its command, or from the call that made it."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import diagnostics
from diagnostics.results.calls import recorded, reproduction
from diagnostics.results.stored import save_tokens
from diagnostics.specifications.result import Specifications
from interventions.sites import Site
from tests.reports import measured, planted, with_provenance
from tests.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:an interval from")


def test_the_call_makes_the_same_table(tmp_path, monkeypatch):
    result = measured()
    save_tokens(tmp_path / "tokens.npy", result.tokens)
    monkeypatch.setattr("interventions.load_model", lambda name, **how: tiny_model("llama"))
    monkeypatch.chdir(tmp_path.parent)
    space: dict = {}
    exec(reproduction(result, tmp_path.name), space)
    pd.testing.assert_frame_equal(space["result"].frame, result.frame)
    assert space["result"].provenance["sites"] == result.provenance["sites"]


def test_arguments_that_are_not_defaults_are_kept():
    @recorded
    def unit_norm_sweep(model, prompts, *, layers=None, sites=None, seed=0, saes=None, path="auto", progress=None):
        return planted()

    def kept(**given):
        return unit_norm_sweep("model", "prompts", **given).provenance["call"]

    assert kept(seed=0, path="auto") == {"function": "unit_norm_sweep", "arguments": {}}
    assert kept(layers=range(2), seed=3, progress=print, saes=object())["arguments"] == {"layers": [0, 1], "seed": 3}
    said = reproduction(with_provenance(call=kept(sites=[Site(1, "attn_out")])), "x")
    assert "sites=[Site.parse(site) for site in ['1.attn_out']]" in said and "import Site, load_model" in said


def test_arguments_that_json_cannot_hold_are_named():
    @recorded
    def unit_norm_sweep(model, prompts, *, latents=None, directions=None, wrapper=None):
        return planted()

    result = unit_norm_sweep("model", "prompts", latents=np.arange(2), directions={"up": object()}, wrapper=object())
    call = {"function": "unit_norm_sweep", "arguments": {"latents": [0, 1]}, "not_kept": ["wrapper"]}
    assert result.provenance["call"] == call
    assert "wrapper=...,  # what you gave" in reproduction(with_provenance(call=call), "x")


def test_every_function_that_measures_records_its_call():
    def wrappers(function):
        while function is not None:
            yield Path(function.__code__.co_filename).name
            function = getattr(function, "__wrapped__", None)

    made = {
        name: getattr(diagnostics, name)
        for name in diagnostics.__all__
        if not isinstance(getattr(diagnostics, name), type)
    }
    without = {name for name, function in made.items() if "calls.py" not in list(wrappers(function))}
    assert without == {
        "latent_card",
        "latent_cards",
        "report",
        "saved_results",
        "specification_curve",
        "win_rate_report",
    }


def test_the_stored_command_is_printed():
    command = ["scripts/unit_norm.py", "--layers", "1", "4", "--prompts", "my text.txt"]
    said = "scripts/unit_norm.py --layers 1 4 --prompts 'my text.txt' --out x"
    assert reproduction(with_provenance(command=command), "x") == said


def test_specification_curve_call_names_its_runs():
    curve = Specifications(pd.DataFrame(), {"boolq": {"model": "m"}, "sotu": {"model": "m"}})
    assert "specification_curve({'boolq': DirectionNorm.load('boolq'), 'sotu'" in reproduction(curve, "x")


def test_result_without_a_call_has_no_reproduction():
    assert reproduction(planted(), "x") == ""

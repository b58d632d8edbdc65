import pandas as pd
import pytest

from diagnostics.direction_vs_norm.run import direction_norm
from diagnostics.reports.reproduction import arguments, reproduction
from diagnostics.results.stored import save_tokens
from diagnostics.specifications.result import Specifications
from diagnostics.unit_norm.run import unit_norm_sweep
from tests.reports import measured, planted, with_provenance
from tests.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:an interval from")


def test_the_call_reproduces_the_table(tmp_path, monkeypatch):
    result = measured()
    save_tokens(tmp_path / "tokens.npy", result.tokens)
    monkeypatch.setattr("interventions.load_model", lambda name, **how: tiny_model("llama"))
    monkeypatch.chdir(tmp_path.parent)
    space: dict = {}
    exec(reproduction(result, tmp_path.name), space)
    pd.testing.assert_frame_equal(space["result"].frame, result.frame)
    assert space["result"].provenance["sites"] == result.provenance["sites"]


def test_defaults_are_left_out():
    sites = {"sites": ["1.resid_post", "4.resid_post"], "path": {"1.resid_post": "replay"}}
    p = {"seed": 0, "sink_filter": 10.0, "tokens": 10338, "tokens_asked": 500} | sites
    assert arguments(unit_norm_sweep, p) == {"layers": "[1, 4]"}
    changed = {"seed": 3, "sink_filter": None, "tokens_asked": 40, "asked_path": "hooks", "null_models": ["random 0"]}
    found = {
        "layers": "[1, 4]",
        "seed": "3",
        "sink_filter": "None",
        "tokens": "40",
        "path": "'hooks'",
        "null_seeds": "1",
    }
    assert arguments(unit_norm_sweep, p | changed) == found


def test_sites_and_context():
    assert arguments(direction_norm, {"sites": ["1.resid_post", "4.resid_post"]}) == {"layers": "[1, 4]"}
    inside = {"sites": ["1.attn_out"], "context": ["in_place", "single_token"], "pairs_asked": 7}
    found = arguments(direction_norm, inside)
    assert found == {"sites": "[Site.parse(site) for site in ['1.attn_out']]", "pairs": "7", "context": "'both'"}


def test_the_stored_command_is_printed():
    command = ["diagnostics/unit_norm/command.py", "--layers", "1", "4", "--prompts", "my text.txt"]
    said = "diagnostics/unit_norm/command.py --layers 1 4 --prompts 'my text.txt' --out x"
    assert reproduction(with_provenance(command=command), "x") == said


def test_a_result_of_several_runs_loads_them():
    curve = Specifications(pd.DataFrame(), {"boolq": {"model": "m"}, "sotu": {"model": "m"}})
    assert "specification_curve({'boolq': DirectionNorm.load('boolq'), 'sotu'" in reproduction(curve, "x")


def test_a_kind_without_a_call_has_no_steps():
    assert reproduction(planted(), "x") == ""

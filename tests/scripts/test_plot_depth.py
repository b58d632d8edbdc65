"""The command end to end: what it draws, what it says, and how it ends where there is nothing to draw."""

import importlib.util
import json
import sys
from pathlib import Path

import pandas as pd
import pytest

from diagnostics.results import save_tokens, write_frame, write_json
from diagnostics.saved import PLANS
from tests.diagnostics.made_results import evaluation

SCRIPT = Path(__file__).parents[2] / "scripts" / "plot_depth.py"
FILES = {f"sae_latents.{end}" for end in ("png", "svg", "pdf", "csv")}

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def script():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("plot_depth", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their own annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A folder with one result below it, as a command leaves it, without its figures."""
    folder, result = tmp_path_factory.mktemp("results"), evaluation()
    (folder / "zoo").mkdir()
    write_frame(folder / "zoo" / "sae_evaluation.parquet", result.frame)
    write_frame(folder / "zoo" / result.TABLES["latents"], result.latents)
    write_json(folder / "zoo" / "sae_evaluation.json", result.as_dict())
    save_tokens(folder / "zoo" / "tokens.npy", result.tokens)
    return folder


def test_it_draws_and_says_what(run, results, tmp_path):
    out = tmp_path / "out"
    status, said, err = run(results, "--figures", "sae_latents", "--out", out, model=False)
    assert status == 0, err
    assert {path.name for path in out.iterdir()} == FILES
    assert "sae_latents: 10 of 10 values, of zoo" in said and f"into {out}" in said
    table = pd.read_csv(out / "sae_latents.csv")
    assert set(table["series"]) == {"standard", "cosine", "cosine-seed1"} and set(table["run"]) == {"zoo"}
    status, _, err = run(results, "--figures", "sae_latents", "--out", out, model=False)
    assert status == 2 and err.count("\n") == 1 and "--overwrite" in err


def test_json_holds_captions_and_values(run, results, tmp_path):
    status, said, err = run(results, "--figures", "sae_latents", "--json", "--out", tmp_path / "out", model=False)
    assert status == 0, err
    found = json.loads(said)
    assert set(found["files"]) == FILES and found["notes"] == []
    assert "some-model" in found["figures"]["sae_latents"]["caption"]
    assert len(found["figures"]["sae_latents"]["table"]) == 10


def test_input_that_does_not_serve_is_said_on_one_line(run, results, tmp_path):
    (tmp_path / "empty").mkdir()
    for words, said in (
        ((tmp_path / "empty",), "no result in"),
        ((tmp_path / "nowhere",), "no folder"),
        ((results, "--figures", "depth"), "no figure 'depth'; known: direction_norm_kl"),
        (
            (results, "--figures", "win_rate"),
            "nothing to draw by depth: zoo: a SAEEvaluation has no figure by depth of those asked for",
        ),
        ((), "no folder of results"),
    ):
        status, _, err = run(*words, "--out", tmp_path / "out", model=False)
        assert status == 2 and err.count("\n") == 1 and said in err, err


def test_the_help_names_every_figure(script):
    for name in PLANS:
        assert name in SCRIPT.read_text()

"""The command from its options to its files, on a tiny model in a folder."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from diagnostics.unit_norm import UnitNorm, unit_norm_sweep
from interventions import MechdiagError, ResultError
from tests.tiny import N_LAYERS

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "unit_norm.py"
FILES = {"unit_norm.parquet", "unit_norm.json", "tokens.npy", *(f"unit_norm.{kind}" for kind in ("png", "svg", "pdf"))}

pytestmark = [pytest.mark.filterwarnings("ignore:an interval from"), pytest.mark.usefixtures("undrawn")]


@pytest.fixture(scope="module")
def script():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("unit_norm", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their own annotations
    spec.loader.exec_module(module)
    return module


def one_line(err: str) -> str:
    """The only line of an error, after what transformers says of a folder's weights."""
    *before, last = err.rstrip("\n").split("\n")
    assert all("Loading weights" in line for line in before)
    assert last.startswith("error: ")
    return last.removeprefix("error: ")


def test_a_run_leaves_its_files_and_they_are_those_of_the_library(run, script, given, tmp_path):
    out = tmp_path / "out"
    words = ("--out", out, "--layers", 1, 4, "--tokens", 30, "--null-model", "random", "--null-seeds", 1, "--seed", 2)
    status, said, err = run(*words)
    assert status == 0, err
    assert "Traceback" not in err
    assert {path.name for path in out.iterdir() if path.is_file()} - {"run.json", ".lock"} == FILES
    assert f"into {out}" in said and "unit_norm ÷ rotation" in said
    found = UnitNorm.load(out)
    same_input = script.Settings(
        out=out,
        model=str(given / "model"),
        prompts=str(given / "text.txt"),
        n_prompts=24,
        device="cpu",
        seed=found.provenance["seed"],
    ).load()
    assert found.tokens == same_input[1].tokens
    by_hand = unit_norm_sweep(*same_input, layers=[1, 4], tokens=30, null_seeds=1, seed=2)
    same = ["model", "layer", "token", "edit", "target_prompt", "target_position"]
    pd.testing.assert_frame_equal(found.frame[same], by_hand.frame[same])
    np.testing.assert_allclose(found.frame.kl, by_hand.frame.kl, rtol=1e-4, atol=1e-9)
    summary = json.loads((out / "unit_norm.json").read_text(), parse_constant=lambda c: pytest.fail(c))["summary"]
    assert [(g["model"], g["layer"]) for g in summary] == [(m, n) for m in ("trained", "random 0") for n in (1, 4)]
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert run(*words)[0] == 0
    assert {name: (out / name).read_bytes() for name in before} == before
    status, said, err = run(*words, "--json", "--quiet")
    assert (status, err) == (0, "") and json.loads(said)["files"] and json.loads(said)["summary"] == summary
    status, said, err = run(*words[:-1], 3)
    assert (status, said) == (2, "") and "holds units of another run" in one_line(err)
    status, _, err = run(*words[:-1], 3, "--overwrite")
    assert status == 0 and UnitNorm.load(out).provenance["seed"] == 3


def test_all_blocks_are_the_default(run, tmp_path):
    assert run("--out", tmp_path, "--tokens", 6)[0] == 0
    assert sorted(set(UnitNorm.load(tmp_path).frame.layer)) == list(range(N_LAYERS))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--path", "fast"), "unknown path 'fast'; known: auto, replay, hooks"),
        (("--context", "both"), "Unrecognized options: --context"),
        (("--horizon", 2), "Unrecognized options: --horizon"),
        (("--sites", "attn_out"), "Unrecognized options: --sites"),
        (("--pairs", 3), "--pairs"),
    ],
)
def test_options_are_looked_at_before_the_model(run, tmp_path, words, message):
    status, said, err = run("--out", tmp_path / "out", "--model", "/nowhere/at/all", *words, model=False)
    assert (status, said) == (2, "")
    assert message in one_line(err)
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tokens", 0), "0 tokens asked for"),
        (("--layers", 6), "no block 6 in a model of 6 blocks"),
        (("--sink-filter", 1e-3), "is left, dropped"),
    ],
)
def test_what_needs_the_model_is_one_line_too(run, tmp_path, words, message):
    status, said, err = run("--out", tmp_path / "out", "--tokens", 20, *words)
    assert (status, said) == (2, "")
    assert message in one_line(err)


@pytest.mark.parametrize("more", [{"context": "both"}, {"horizon": "2"}, {"sites": ("attn_out",)}])
def test_what_the_sweep_cannot_do_is_refused_without_a_command_line_too(script, tmp_path, more):
    with pytest.raises(MechdiagError, match="runs in place, at resid_post, with horizon 1"):
        script.main(script.Settings(out=tmp_path, model="/nowhere/at/all", **more))


def test_a_folder_of_another_run_is_refused_first(script, tmp_path):
    (tmp_path / "tokens.npy").write_text("kept")
    with pytest.raises(ResultError, match=r"holds another run \(tokens\.npy\)"):
        script.main(script.Settings(out=tmp_path, model="/nowhere/at/all"))

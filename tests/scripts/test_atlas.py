"""The command of the atlas, from its options to its files."""

import importlib.util
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from diagnostics.atlas import CausalAtlas
from diagnostics.atlas_units import COLUMNS
from interventions import Site, record
from sae_models.architectures import build, named
from sae_models.saving import save_sae
from tests.tiny import D_MODEL, prompts, tiny_model


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("atlas", Path(__file__).parents[2] / "scripts" / "atlas.py")
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def sae(tmp_path_factory):
    folder, site = tmp_path_factory.mktemp("saes") / "standard", Site(2)
    x = record(tiny_model("llama"), prompts((24, 24)), [site]).activations[site].reshape(-1, D_MODEL)
    save_sae(
        build(named("standard:relu"), 24, 6, x, torch.Generator().manual_seed(0), hook_name=site.hook_name), folder
    )
    return folder


def test_an_atlas_is_written_whole_and_bad_input_costs_nothing(run, sae, tmp_path):
    out = tmp_path / "out"
    asked = ("--saes", sae, "--out", out, "--held-out", 0, "--path-share", 0.5)
    status, said, err = run(*asked)
    assert status == 0, err
    atlas = CausalAtlas.load(out)
    assert list(atlas.frame) == list(COLUMNS) and len(atlas.frame) and "gradient" in said
    assert (out / "atlas_calibration.png").stat().st_size > 10_000
    shards = pd.read_parquet(out / "atlas")  # one data set, for whoever does not know this package
    assert len(shards) == len(atlas.frame)
    before = (out / "atlas.json").read_bytes()
    left = out / ".partial-killed"  # by a process that ended while it wrote
    left.mkdir()
    (left / "00-00000.parquet").write_bytes(b"half")
    status, said, err = run(*asked)  # all units are there
    assert status == 0 and (out / "atlas.json").read_bytes() == before and not left.exists()
    for words, message in (
        ((*asked, "--steps", 3), "steps was 6, is 3"),
        ((*asked, "--results", out), "is one of --results"),
        (
            ("--saes", sae, "--out", tmp_path / "no", "--held-out", 0, "--context", "both"),
            "Unrecognized options: --context",
        ),
        (("--saes", tmp_path, "--out", tmp_path / "no", "--held-out", 0), "error:"),
    ):
        status, _, err = run(*words)
        assert status == 2 and message in err and "Traceback" not in err
    assert (out / "atlas.json").read_bytes() == before


def test_finished_atlases_are_joined_and_never_written_over(run, sae, tmp_path):
    asked = ("--saes", sae, "--out", tmp_path / "one", "--held-out", 0, "--path-share", 0.5)
    assert run(*asked)[0] == 0
    joining = ("--results", tmp_path / "one", "--out", tmp_path / "joined")
    status, _, err = run(*joining, model=False)
    assert status == 0, err
    assert len(CausalAtlas.load(tmp_path / "joined").frame) == len(CausalAtlas.load(tmp_path / "one").frame)
    for words, message in (
        (joining, "--overwrite"),
        (("--results", tmp_path, "--out", tmp_path / "x"), "holds no atlas"),
    ):
        status, _, err = run(*words, model=False)
        assert status == 2 and message in err

"""The command from its options to its files, on a tiny model, small SAEs in folders and a file of labelled texts."""

import importlib.util
import json
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from diagnostics.sparse_probing import SparseProbing, probe_saes
from interventions import MechdiagError, Site, load_model, record
from interventions.labelled import load_labelled
from sae_models.architectures import build, named
from sae_models.loading import load_sae
from sae_models.saving import save_sae
from tests.tiny import prompts

SCRIPT = Path(__file__).parents[2] / "scripts" / "probe.py"


@pytest.fixture(scope="module")
def script():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("probe", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their own annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def files(given) -> dict[str, Path]:
    """An SAE of block 1, one of another width, and a table of texts of two kinds."""
    model, generator = load_model(given / "model", device="cpu"), torch.Generator().manual_seed(0)
    x = record(model, prompts((20, 20, 20)), [Site(1)], keep_cache=False).activations[Site(1)].flatten(0, 1)
    sae = build(named("standard"), 40, 6, x, generator, model_name="model", hook_name="blocks.1.hook_resid_post")
    sae.selector.threshold.fill_(0.2)
    wide = build(named("standard:relu"), 8, 2, torch.randn(9, 16), generator, hook_name="blocks.1.hook_resid_post")
    texts = (given / "text.txt").read_text().strip().split("\n\n")
    rows = [f"{'even' if i % 2 else 'odd'},{text}" for i, text in enumerate(texts)]
    (given / "mine.csv").write_text("\n".join(["kind,said", *rows]) + "\n")
    return {
        "sae": save_sae(sae, given / "saes" / "standard"),
        "wide": save_sae(wide, given / "saes" / "wide"),
        "data": given / "mine.csv",
    }


@pytest.fixture
def words(given, files, tmp_path):
    """A command line that works, but for the SAEs."""
    return (
        *("--data", f"{files['data']}:said:kind", "--out", tmp_path / "out", "--model", given / "model"),
        *("--device", "cpu", "--ks", 1, 3, "--seeds", 2, "--per-class", 10),
    )


def last_line(err: str) -> str:
    return err.rstrip("\n").split("\n")[-1]


def test_a_run_leaves_its_files_and_they_are_those_of_the_library(run, given, files, words, tmp_path):
    out = tmp_path / "out"
    status, said, err = run("--saes", files["sae"], *words, model=False)
    assert status == 0, err
    made = {path.name for path in out.iterdir() if path.name not in (".lock", "units", "run.json")}
    assert made == {*SparseProbing.files(), *(f"sparse_probing.{kind}" for kind in ("png", "svg", "pdf"))}
    assert f"into {out}" in said and "probe loss" in said
    found = SparseProbing.load(out)
    assert found.names == ["standard"] and found.datasets == ["mine.csv"]
    model = load_model(given / "model", device="cpu")
    texts = load_labelled(f"{files['data']}:said:kind", per_class=10)
    same = probe_saes(model, texts, {"standard": load_sae(files["sae"])}, ks=(1, 3), seeds=2, per_class=10)
    pd.testing.assert_frame_equal(found.frame, same.frame, rtol=1e-5)
    pd.testing.assert_frame_equal(found.held_out, same.held_out, rtol=1e-5)
    assert json.loads((out / "sparse_probing.json").read_text())["provenance"]["texts"]["mine.csv"]["counts"] == {
        "even": 10,
        "odd": 10,
    }
    assert run("--saes", files["sae"], *words, model=False)[0] == 0  # goes on: nothing is left to do
    status, said, err = run("--saes", files["sae"], *words, "--max-length", 6, model=False)
    assert (status, said) == (2, "") and "max_length was 128, is 6" in last_line(err)
    assert run("--saes", files["sae"], *words, "--max-length", 6, "--overwrite", model=False)[0] == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--sink-filter", -1), "--sink-filter -1.0"),
        (("--per-class", -1), "--per-class -1"),
        (("--dtype", "int8"), "unknown dtype 'int8'"),
        (("--data", "nothing"), "no labelled texts 'nothing'"),
        (("--saes", "standard", "--layers", 99), "no SAE"),
    ],
)
def test_options_are_looked_at_before_the_model(run, files, words, tmp_path, more, message):
    status, said, err = run("--saes", files["sae"], *words, "--model", "/nowhere/at/all", *more, model=False)
    assert (status, said) == (2, "") and message in last_line(err)
    assert not list((tmp_path / "out").glob("*"))


def test_an_sae_that_does_not_fit_and_a_folder_of_another_run_are_refused(run, script, files, words, tmp_path):
    status, _, err = run("--saes", files["wide"], *words, model=False)
    assert status == 2 and "width 16 for activations of width 32" in last_line(err)
    (tmp_path / "tokens.npy").write_text("kept")
    with pytest.raises(MechdiagError, match=r"holds another run \(tokens\.npy\)"):
        script.main(script.Settings(saes=(str(files["wide"]),), out=tmp_path, model="/nowhere/at/all"))

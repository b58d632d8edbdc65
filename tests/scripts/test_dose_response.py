"""The command from its options to its files, on a tiny model in a folder."""

import importlib.util
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from diagnostics.dosing import DOSES, DoseResponse, dose_response
from interventions import MechdiagError, ResultError, Site
from tests.tiny import D_MODEL

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "dose_response.py"
FILES = {"dose_response.parquet", "dose_response.json", "tokens.npy"} | {
    f"dose_response{which}.{kind}" for which in ("", "_depth") for kind in ("png", "svg", "pdf")
}
FEW = ("--layers", 1, 4, "--doses", 0.1, 0.5, "--tokens", 20)

pytestmark = [pytest.mark.filterwarnings("ignore:an interval from"), pytest.mark.usefixtures("undrawn")]


@pytest.fixture(scope="module")
def script():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("dose_response", SCRIPT)
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


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()} - {"run.json", ".lock"}


# A run


def test_a_run_leaves_its_files_and_they_are_those_of_the_library(run, script, given, tmp_path):
    steer = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(3))
    np.save(tmp_path / "steer.npy", steer.double().numpy())
    torch.save(steer.flip(0), tmp_path / "back.pt")
    options = (
        "--directions",
        tmp_path / "steer.npy",
        tmp_path / "back.pt",
        "--null-model",
        "random",
        "--null-seeds",
        1,
    )
    out = tmp_path / "new" / "out"
    status, said, err = run("--out", out, *FEW, *options)
    assert status == 0, err
    assert "Traceback" not in err and "warning" not in err
    assert files(out) == FILES
    assert f"into {out}" in said and "toward token÷between tokens" in said and "steer÷its placebo" in said
    found = DoseResponse.load(out)
    assert found.provenance["doses"] == [0.1, 0.5]
    assert list(found.provenance["directions"]) == ["steer", "back"]
    assert found.null_models == ["random 0"]
    same_input = script.Settings(
        out=out,
        model=str(given / "model"),
        prompts=str(given / "text.txt"),
        n_prompts=24,
        device="cpu",
        seed=found.provenance["seed"],
    ).load()
    assert found.tokens == same_input[1].tokens
    by_hand = dose_response(
        *same_input, layers=[1, 4], doses=(0.1, 0.5), tokens=20, null_seeds=1,
        directions={"steer": steer, "back": steer.flip(0)},
    )  # fmt: skip
    same = ["model", "layer", "pair", "edit", "target_prompt", "target_position", "source_prompt", "source_position"]
    pd.testing.assert_frame_equal(found.frame[same], by_hand.frame[same])
    np.testing.assert_allclose(found.frame.kl, by_hand.frame.kl, rtol=1e-4, atol=1e-9)
    summary = json.loads((out / "dose_response.json").read_text(), parse_constant=lambda c: pytest.fail(c))["summary"]
    assert [(g["model"], g["layer"], g["dose"]) for g in summary] == [
        (model, layer, dose) for model in ("trained", "random 0") for layer in (1, 4) for dose in (0.1, 0.5)
    ]
    # the same again; another run is refused and leaves what is there
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert run("--out", out, *FEW, *options)[0] == 0
    assert {name: (out / name).read_bytes() for name in before} == before
    status, said, err = run("--out", out, *FEW, *options, "--seed", 1)
    assert (status, said) == (2, "")
    assert "holds units of another run" in one_line(err) and "seed" in err
    assert {name: (out / name).read_bytes() for name in before} == before


def test_sites_contexts_and_horizons_are_passed_on(run, tmp_path):
    some = ("--layers", 1, 2, "--tokens", 10, "--doses", 0.1, 0.5)
    assert run("--out", tmp_path / "a", *some, "--sites", "attn_out", "3.resid_pre", "--horizon", 2)[0] == 0
    found = DoseResponse.load(tmp_path / "a")
    assert found.provenance["sites"] == [str(Site(1, "attn_out")), str(Site(2, "attn_out")), str(Site(3, "resid_pre"))]
    assert found.provenance["horizon"] == 2
    assert "kl_at_1" in found.frame
    assert run("--out", tmp_path / "b", *some, "--context", "both", "--sink-filter", 0, "--path", "hooks")[0] == 0
    found = DoseResponse.load(tmp_path / "b")
    assert found.provenance["context"] == ["in_place", "single_token"]
    assert found.provenance["sink_filter"] is None
    assert set(found.provenance["path"].values()) == {"hooks"}


def test_defaults_are_those_of_the_library(script, tmp_path):
    settings = script.Settings(out=tmp_path)
    assert (settings.doses, settings.tokens, settings.directions) == (DOSES, 200, ())


# Input that does not serve. Each is found before anything is written.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--path", "fast"), "unknown path 'fast'; known: auto, replay, hooks"),
        (("--null-model", "shuffled"), "unknown null model 'shuffled'; known: none, random"),
        (("--horizon", "soon"), "horizon 'soon'; expected a number of positions"),
        (("--directions", "/nowhere/d.npy"), "cannot read direction /nowhere/d.npy"),
        (("--directions", "/nowhere/d.txt"), "no direction in /nowhere/d.txt; expected a .npy or .pt file"),
        (("--tokens", "many"), "many"),
    ],
)
def test_options_and_directions_are_looked_at_before_the_model(run, tmp_path, words, message):
    status, said, err = run("--out", tmp_path / "out", "--model", "/nowhere/at/all", *words, model=False)
    assert (status, said) == (2, "")
    assert message in one_line(err)
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--doses", 0.1, 2.5), "doses [0.1, 2.5]; expected numbers above 0 and up to 2"),
        (("--tokens", 0), "0 tokens asked for"),
        (("--layers", 6), "no block 6 in a model of 6 blocks"),
        (("--sink-filter", 1e-3), "none of 20 tokens is left"),
        (("--horizon", 2, "--context", "both"), "a single token has no later positions"),
    ],
)
def test_what_needs_the_model_is_one_line_too(run, tmp_path, words, message):
    status, said, err = run("--out", tmp_path / "out", *FEW, *words)
    assert (status, said) == (2, "")
    assert message in one_line(err)


def _archive(path: Path) -> None:
    np.savez(path.with_suffix(".npz"), d=np.ones(D_MODEL))
    path.with_suffix(".npz").rename(path)


BAD = {
    "short.npy": lambda path: np.save(path, np.ones(D_MODEL - 1)),
    "wide.npy": lambda path: np.save(path, np.ones((1, D_MODEL))),
    "zero.npy": lambda path: np.save(path, np.zeros(D_MODEL)),
    "nan.npy": lambda path: np.save(path, np.full(D_MODEL, np.nan)),
    "objects.npy": lambda path: np.save(path, np.array([{}] * D_MODEL, dtype=object), allow_pickle=True),
    "words.npy": lambda path: np.save(path, np.array(["one"] * D_MODEL)),
    "archive.npy": _archive,
    "text.npy": lambda path: path.write_text("0.1 0.2"),
    "empty.npy": lambda path: path.write_bytes(b""),
    "dictionary.pt": lambda path: torch.save({"d": torch.ones(D_MODEL)}, path),
    "text.pt": lambda path: path.write_text("0.1 0.2"),
    "empty.pt": lambda path: path.write_bytes(b""),
    "complex.npy": lambda path: np.save(path, np.ones(D_MODEL) * 1j),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_holds_no_direction_is_an_error_of_one_line(run, tmp_path, name):
    path = tmp_path / name
    BAD[name](path)
    status, said, err = run("--out", tmp_path / "out", *FEW, "--directions", path)
    assert (status, said) == (2, "")
    assert path.stem in one_line(err)


def test_two_files_of_one_name_are_an_error(script, tmp_path):
    """Else the second would take the place of the first."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "steer.npy", np.ones(D_MODEL))
    both = (tmp_path / "a" / "steer.npy", tmp_path / "b" / "steer.npy")
    with pytest.raises(MechdiagError, match="steer"):
        script.main(script.Settings(out=tmp_path / "out", model="/nowhere/at/all", directions=both))


def test_a_folder_of_another_run_is_refused_first(script, tmp_path):
    (tmp_path / "dose_response.json").write_text("kept")
    with pytest.raises(ResultError, match=r"holds another run \(dose_response\.json\)"):
        script.main(script.Settings(out=tmp_path, model="/nowhere/at/all"))
    assert (tmp_path / "dose_response.json").read_text() == "kept"


def test_a_user_sees_one_line_and_exit_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--out", str(tmp_path / "out"), "--path", "fast"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert ended.value.code == 2
    assert tuple(capsys.readouterr()) == ("", "error: unknown path 'fast'; known: auto, replay, hooks\n")

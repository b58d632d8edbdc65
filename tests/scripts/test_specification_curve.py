"""The command from texts, or from results that are there, to its files, on a tiny model in a folder."""

import importlib.util
import json
import sys
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from diagnostics import study
from diagnostics.direction_patching import DirectionNorm, direction_norm
from diagnostics.results import save_tokens, write_frame, write_json
from diagnostics.specification import Specifications, specification_curve
from interventions import MechdiagError, ResultError
from tests.tiny import prompts, tiny_model

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "specification_curve.py"
FILES = {"specification.parquet", "specification.json"} | {
    f"specification_{claim}.{kind}" for claim in ("direction", "deeper") for kind in ("png", "svg", "pdf")
}

pytestmark = [pytest.mark.filterwarnings("ignore:an interval from"), pytest.mark.usefixtures("undrawn")]


@pytest.fixture(scope="module")
def script():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("specification_curve", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their own annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(script, given, monkeypatch, capsys):
    """The command as a user types it, in this process: (exit status, what it said, what went to stderr)."""

    def command(*words: object, model: bool = True) -> tuple[int, str, str]:
        some = ["--model", given / "model", "--n-prompts", 24, "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, [*words, *(some if model else [])])])
        status = 0
        with warnings.catch_warnings():  # a command shows warnings in its own way
            try:
                script.command.run(script.Settings, script.main)
            except SystemExit as ended:
                status = ended.code
        plt.close("all")
        said = capsys.readouterr()
        return status, said.out, said.err

    return command


def one_line(err: str) -> str:
    """The only line of an error, after what transformers says of a folder's weights."""
    *before, last = err.rstrip("\n").split("\n")
    assert all("Loading weights" in line for line in before)
    assert last.startswith("error: ")
    return last.removeprefix("error: ")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Folders with a result each: `A` and `B` serve; `few` has two blocks below the last; `horizon` reads later positions."""
    folder = tmp_path_factory.mktemp("results")
    some = {"pairs": 16, "pair_sets": ("random",), "sink_filter": None}
    texts = prompts(tuple(10 + i % 5 for i in range(12)))
    for name, settings in {
        "A": {"layers": [0, 2, 4], "context": "both", "null_seeds": 1},
        "B": {"layers": [0, 2, 4], "seed": 1},
        "few": {"layers": [1, 3, 5]},
        "horizon": {"layers": [0, 2, 4], "horizon": 2},
    }.items():
        (folder / name).mkdir()
        result = direction_norm(tiny_model("llama"), texts, **{**some, **settings})
        write_frame(folder / name / "direction_norm.parquet", result.frame)
        write_json(folder / name / "direction_norm.json", result.as_dict())
        save_tokens(folder / name / "tokens.npy", result.tokens)
    return folder


def test_results_that_are_there_give_the_curve(run, results, tmp_path):
    out = tmp_path / "out"
    status, said, err = run("--out", out, "--results", results / "A", results / "B", model=False)
    assert status == 0, err
    assert {path.name for path in out.iterdir()} == FILES
    assert f"into {out}" in said and "direction matters more than norm" in said
    curve = specification_curve({name: DirectionNorm.load(results / name) for name in ("A", "B")})
    pd.testing.assert_frame_equal(pd.read_parquet(out / "specification.parquet"), curve.frame)
    read = json.loads((out / "specification.json").read_text(), parse_constant=lambda c: pytest.fail(c))
    assert set(read["provenance"]) == {"A", "B"}
    assert [row["specifications"] for row in read["summary"]] == curve.summary().specifications.tolist()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    status, said, err = run("--out", out, "--results", results / "A", model=False)
    assert (status, said) == (2, "") and "holds another run (specification.parquet)" in one_line(err)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert run("--out", out, "--results", results / "B", "--overwrite", model=False)[0] == 0
    assert set(pd.read_parquet(out / "specification.parquet").text) == {"B"}


def test_texts_are_patched_in_both_contexts_and_without_a_filter(run, given, tmp_path, monkeypatch):
    out = tmp_path / "out"
    words = (
        "--out",
        out,
        "--prompts",
        f"{given / 'text.txt'},{given / 'other.txt'}",
        "--layers",
        0,
        2,
        4,
        "--pairs",
        20,
    )
    status, _, err = run(*words, "--null-model", "random", "--null-seeds", 1)
    assert status == 0, err
    assert {path.name for path in out.iterdir()} == FILES | {"text", "other"}
    found = {name: DirectionNorm.load(out / name) for name in ("text", "other")}
    for name, result in found.items():
        assert result.provenance["context"] == ["in_place", "single_token"]
        assert result.provenance["sink_filter"] is None
        assert result.provenance["pair_sets"] == ["random"]
        assert result.provenance["text"]["name"].startswith(name) or name in json.dumps(result.provenance["text"])
    assert found["text"].tokens != found["other"].tokens
    frame = pd.read_parquet(out / "specification.parquet")
    pd.testing.assert_frame_equal(frame, specification_curve(found).frame)
    assert len(frame[(frame.claim == "direction") & (frame.model == "trained")]) == 2 * 2 * 2 * 3 * 3 * 3
    again = []
    monkeypatch.setattr(Specifications, "write", lambda self, folder, **_: again.append(self.frame) or [])
    monkeypatch.setattr(study, "measure", lambda *_, **__: pytest.fail("measured again"))
    assert run(*words, "--null-model", "random", "--null-seeds", 1)[0] == 0
    pd.testing.assert_frame_equal(again[0], frame, check_exact=True)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("few",), "few: 2 blocks below the last; give three or more"),
        (("horizon",), "horizon: points ['resid_post'], horizon 2; expected random pairs, one point, horizon 1"),
        (("A", "none"), "holds no direction_norm result: direction_norm.parquet is missing"),
    ],
)
def test_results_that_do_not_serve_are_one_line(run, results, tmp_path, names, message):
    status, said, err = run("--out", tmp_path / "out", "--results", *(results / name for name in names), model=False)
    assert (status, said) == (2, "")
    assert message in one_line(err)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--path", "fast"), "unknown path 'fast'; known: auto, replay, hooks"),
        (("--prompts", "nowhere.txt"), "no file 'nowhere.txt'"),
        (("--pair-sets", "random"), "--pair-sets"),
    ],
)
def test_options_are_looked_at_before_the_model(run, tmp_path, words, message):
    status, said, err = run("--out", tmp_path / "out", "--model", "/nowhere/at/all", *words, model=False)
    assert (status, said) == (2, "")
    assert message in one_line(err)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_two_results_of_one_name_are_an_error(run, results, tmp_path):
    """Else the second would take the place of the first, and the curve of one text would pass for that of two."""
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "A").symlink_to(results / "B")
    status, _, err = run("--out", tmp_path / "out", "--results", results / "A", tmp_path / "more" / "A", model=False)
    assert status == 2 and "A" in one_line(err)


def test_two_texts_of_one_name_are_an_error(script, given, tmp_path):
    (tmp_path / "text.txt").write_text((given / "other.txt").read_text())
    both = f"{given / 'text.txt'},{tmp_path / 'text.txt'}"
    with pytest.raises(MechdiagError, match="two texts"):
        script.main(script.Settings(out=tmp_path / "out", prompts=both, model="/nowhere/at/all"))


def test_a_curve_of_another_run_is_not_replaced(script, given, tmp_path):
    """Also where texts are to be patched."""
    (tmp_path / "specification.json").write_text("kept")
    with pytest.raises(ResultError, match=r"holds another run \(specification\.json\)"):
        script.main(script.Settings(out=tmp_path, prompts=str(given / "text.txt"), model="/nowhere/at/all"))

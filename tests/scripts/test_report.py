"""The command of reports, from folders of results to its page."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from diagnostics.results import save_tokens, write_frame, write_json
from tests.pages import read
from tests.reports import measured

pytestmark = pytest.mark.filterwarnings("ignore:an interval from")
SCRIPT = Path(__file__).parents[2] / "scripts" / "report.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("report", SCRIPT)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules["report"] = found  # where dataclasses look up their own annotations
    spec.loader.exec_module(found)
    return found


def stored(folder, code="1+ab"):
    folder.mkdir(parents=True)
    write_frame(folder / "unit_norm.parquet", measured().frame)
    save_tokens(folder / "tokens.npy", measured().tokens)
    write_json(folder / "unit_norm.json", measured().as_dict())
    write_json(folder / "run.json", {"code": code})


def test_a_page_of_every_result_in_the_folders(run, tmp_path):
    stored(tmp_path / "one")
    stored(tmp_path / "more/two", code="2+cd")
    (tmp_path / "more/begun/units").mkdir(parents=True)
    (tmp_path / "more/begun/run.json").write_text("{}")
    out = tmp_path / "page.html"
    status, said, err = run(tmp_path / "one", tmp_path / "more", "--out", out, model=False)
    assert (status, err) == (0, "") and "wrote 2 results" in said
    text = "".join(read(out.read_text(encoding="utf-8")).text)
    assert "one: Unit norm" in text and "more/two: Unit norm" in text and "unfinished run, left out: more/begun" in text
    assert "code of the package differs: 1+ab in one; 2+cd in more/two" in text

    status, said, err = run(tmp_path / "one", "--out", out, model=False)
    assert status == 2 and "--overwrite" in err
    status, said, err = run(tmp_path / "one", "--out", out, "--overwrite", "--json", model=False)
    assert status == 0 and json.loads(said) == {
        "out": str(out),
        "results": {"one": "unit_norm"},
        "unfinished": [],
        "damaged": {},
    }


@pytest.mark.filterwarnings("default:two is left out")
def test_a_damaged_result_is_left_out_and_named_and_the_rest_is_shown(run, tmp_path):
    stored(tmp_path / "all/one")
    stored(tmp_path / "all/two")
    (tmp_path / "all/one/run.json").write_text("[1]")
    (tmp_path / "all/two/tokens.npy").write_bytes(b"\x93NUMPY")
    out = tmp_path / "page.html"
    status, said, err = run(tmp_path / "all", "--out", out, "--json", model=False)
    assert (
        status == 0 and err.count("\n") == 1 and "warning: two is left out: " in err and "tokens.npy is damaged" in err
    )
    assert list(json.loads(said)["results"]) == ["one"] and list(json.loads(said)["damaged"]) == ["two"]
    text = "".join(read(out.read_text(encoding="utf-8")).text)
    assert "damaged result, left out: two: " in text and "one: Unit norm" in text
    status, said, err = run(tmp_path / "all/two", "--out", out, "--overwrite", model=False)
    assert (status, said) == (2, "") and err.count("\n") == 1 and "tokens.npy is damaged" in err


@pytest.mark.filterwarnings("default:.*is left out")
@pytest.mark.parametrize("gone", ["null_models", "path", "sites", "norm", "n_layers"])
def test_a_result_without_digests_that_cannot_be_shown_is_left_out(run, tmp_path, gone):
    stored(tmp_path / "all/one")
    stored(tmp_path / "all/two")
    path = tmp_path / "all/two/unit_norm.json"
    document = json.loads(path.read_text())
    document["provenance"][gone] = {"not": ["what", 1]}
    path.write_text(json.dumps(document))
    status, _, err = run(tmp_path / "all", "--out", tmp_path / "page.html", model=False)
    assert status == 0 and "Traceback" not in err and err.count("\n") <= 1


def test_what_does_not_serve_is_exit_2(run, tmp_path):
    (tmp_path / "empty").mkdir()
    for words, why in (
        ((tmp_path / "empty",), "no result in"),
        ((tmp_path / "nowhere",), "no folder"),
        ((tmp_path / "empty", tmp_path / "empty"), "given twice"),
        ((tmp_path / "empty", "--out", tmp_path / "nowhere/page.html"), "expected one to write page.html into"),
    ):
        status, said, err = run(*words, *(() if "--out" in words else ("--out", tmp_path / "page.html")), model=False)
        assert (status, said) == (2, "") and why in err and err.count("\n") == 1
    assert not (tmp_path / "page.html").exists()

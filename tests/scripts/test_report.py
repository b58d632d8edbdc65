"""`report.py` makes a page of results; damaged ones are left out and named."""

import json

import pytest

from tests.pages import read
from tests.reports import measured
from tests.scripts.conftest import store

pytestmark = pytest.mark.filterwarnings("ignore:an interval from")


def stored(folder, code="1+ab"):
    store(measured(), folder)
    (folder / "run.json").write_text(json.dumps({"code": code}))


def text(page) -> str:
    return "".join(read(page.read_text(encoding="utf-8")).text)


def test_page_has_every_result_in_the_folders(script, tmp_path):
    stored(tmp_path / "one")
    stored(tmp_path / "more/two", code="2+cd")
    (tmp_path / "more/begun/units").mkdir(parents=True)
    (tmp_path / "more/begun/run.json").write_text("{}")
    run = script("report", tmp_path / "one", tmp_path / "more")
    assert (run.status, run.err) == (0, "") and "wrote 2 results" in run.said
    said = text(run.folder)
    assert "one: Unit norm" in said and "more/two: Unit norm" in said and "unfinished run, left out: more/begun" in said
    assert "code of the package differs: 1+ab in one; 2+cd in more/two" in said
    assert "--overwrite" in script("report", tmp_path / "one").error
    again = script("report", tmp_path / "one", "--overwrite", "--json")
    assert json.loads(again.said) == {
        "out": str(run.folder),
        "results": {"one": "unit_norm"},
        "unfinished": [],
        "damaged": {},
    }


def test_damaged_result_is_named_and_left_out(script, tmp_path):
    stored(tmp_path / "all/one")
    stored(tmp_path / "all/two")
    (tmp_path / "all/one/run.json").write_text("[1]")
    (tmp_path / "all/two/tokens.npy").write_bytes(b"\x93NUMPY")
    run = script("report", tmp_path / "all", "--json")
    assert run.status == 0 and run.err.count("\n") == 1
    assert "warning: two is left out: " in run.err and "tokens.npy is damaged" in run.err
    assert list(json.loads(run.said)["results"]) == ["one"] and list(json.loads(run.said)["damaged"]) == ["two"]
    assert "damaged result, left out: two: " in text(run.folder) and "one: Unit norm" in text(run.folder)
    assert "tokens.npy is damaged" in script("report", tmp_path / "all/two", "--overwrite").error


@pytest.mark.parametrize("gone", ["null_models", "path", "sites", "norm", "n_layers"])
def test_unreadable_result_without_digests_is_left_out(script, tmp_path, gone):
    stored(tmp_path / "all/one")
    stored(tmp_path / "all/two")
    path = tmp_path / "all/two/unit_norm.json"
    document = json.loads(path.read_text())
    document["provenance"][gone] = {"not": ["what", 1]}
    path.write_text(json.dumps(document))
    run = script("report", tmp_path / "all")
    assert run.status == 0 and "Traceback" not in run.err and run.err.count("\n") <= 1


def test_latents_option_writes_a_page_of_latents(script, tmp_path):
    from tests.diagnostics.reports.test_latents import N, data
    from tests.diagnostics.reports.test_latents import stored as stored_latents

    folder = stored_latents(tmp_path / "run")
    words = ("--latents", folder, "--title", "Mine", "--json")
    run = script("report", *words, small=False)
    assert json.loads(run.said) == {"out": str(run.folder), "latents": N}
    page = run.folder.read_text(encoding="utf-8")
    assert data(page)["n"] == N and "Mine" in read(page).words
    assert "--overwrite" in script("report", *words, small=False).error
    assert "name no other folder" in script("report", folder, *words, "--overwrite").error

import importlib.metadata
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from diagnostics.results.result import Result, result_files
from diagnostics.results.stored import document_digest, load_tokens, save_tokens
from diagnostics.statistics.estimate import Estimate
from diagnostics.statistics.measures import censored_median
from interventions import wrap
from interventions.errors import ResultError
from interventions.files import claim_folder, claim_run, jsonable, write_frame, write_json, write_whole
from interventions.provenance import model_provenance
from tests.pages import read as page_of
from tests.tiny import D_MODEL, N_LAYERS, VOCAB, tiny_model


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_claimed_folders_are_made_and_may_hold_other_files(tmp_path):
    assert claim_folder(tmp_path / "a" / "b", ["x.json"], overwrite=False) == tmp_path / "a" / "b"
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "notes.txt").write_text("mine")
    claim_folder(str(tmp_path), ["x.json"], overwrite=False)
    assert everything(tmp_path) == {"notes.txt": b"mine"}  # claiming leaves nothing behind


def test_a_folder_with_a_result_is_refused_and_unchanged(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"another run")
    with pytest.raises(ResultError, match=r"holds another run \(x\.parquet\); name another folder or pass --overwrite"):
        claim_folder(tmp_path, ["x.json", "x.parquet"], overwrite=False)
    assert everything(tmp_path) == {"x.parquet": b"another run"}
    claim_folder(tmp_path, ["x.json", "x.parquet"], overwrite=True)
    assert everything(tmp_path) == {"x.parquet": b"another run"}  # it goes when the new one is there, not before


def test_a_failed_write_changes_nothing(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")

    def fails(partial: Path) -> None:
        assert partial.suffix == ".txt"
        assert partial.parent == tmp_path
        partial.write_text("half of the n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, fails)
    assert everything(tmp_path) == {"x.txt": b"old"}
    with pytest.raises(ValueError):
        write_frame(tmp_path / "new.parquet", pd.DataFrame({"a": [object()]}))
    assert everything(tmp_path) == {"x.txt": b"old"}


def test_json_has_null_for_nonfinite_values(tmp_path):
    estimate = Estimate(1.5, float("nan"), float("inf"), 0.25, 7, 3, bound=True)
    value = {
        3: [math.nan, math.inf, -math.inf, 2.5, 0, True, None, "‖x‖"],
        "numpy": (np.float32(0.5), np.int64(3), np.bool_(True), np.float64("nan"), np.float32("-inf")),
        "estimate": {"inner": [estimate]},
        "array": np.array([1.0, np.nan]),
        "censored": censored_median(np.ones(20), np.zeros(20), 0.5, np.arange(20)),
        "path": Path("a/b"),
        "dtype": torch.float32,
    }
    write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    read = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert read == jsonable(value)
    assert read["3"] == [None, None, None, 2.5, 0, True, None, "‖x‖"]
    assert (read["numpy"], read["array"]) == ([0.5, 3, True, None, None], [1.0, None])
    assert (read["censored"]["estimate"]["value"], read["censored"]["n_censored"]) == (2, 20)
    expected = {"value": 1.5, "low": None, "high": None, "se": 0.25, "n_rows": 7, "n_prompts": 3, "bound": True}
    expected |= {"n_effective": None, "influence": None}
    assert read["estimate"]["inner"] == [expected]
    assert (read["path"], read["dtype"]) == ("a/b", "torch.float32")
    assert "‖x‖" in text


def test_tokens_are_padded_on_the_right(tmp_path):
    save_tokens(tmp_path / "tokens.npy", [[5, 6, 7], [0], [8, 9]])
    table = np.load(tmp_path / "tokens.npy")
    assert np.issubdtype(table.dtype, np.integer) and table.tolist() == [[5, 6, 7], [0, -1, -1], [8, 9, -1]]
    assert list(everything(tmp_path)) == ["tokens.npy"]


def test_model_provenance():
    found = model_provenance(wrap(tiny_model("llama"), name="mine", note="random"))
    assert (found["model"], found["model_note"], found["wrapper"]) == ("mine", "random", "huggingface")
    assert (found["n_layers"], found["d_model"], found["vocab"]) == (N_LAYERS, D_MODEL, VOCAB)
    assert (found["norm"], found["dtype"], found["device"]) == ("RMSNorm", "float32", "cpu")
    assert model_provenance(wrap(tiny_model("gpt2")))["norm"] == "LayerNorm"
    assert found["threads"] == torch.get_num_threads()
    assert found["versions"]["torch"] == importlib.metadata.version("torch")
    assert {"transformers", "transformer-lens", "nnsight", "numpy", "pandas", "pyarrow"} <= set(found["versions"])
    json.dumps(found, allow_nan=False)


# A diagnostic's result


class Drawing(Figure):
    """A matplotlib Figure that writes down how it was saved."""

    def savefig(self, path: Path, **how) -> None:
        path.write_text(f"{path.suffix} {how}")


@dataclass(frozen=True)
class Mine(Result):
    """A result with two figures."""

    NAME: ClassVar[str] = "mine"

    def as_dict(self):
        return {"summary": {"mean": math.nan}, "provenance": self.provenance}

    def figures(self):
        return {"mine": Drawing(), "mine_attn_out": Drawing()}


def mine() -> Mine:
    frame = pd.DataFrame({"layer": np.array([1, 2], dtype="int32"), "kl": np.array([0.5, np.nan], dtype="float32")})
    return Mine(frame, [[3, 4, 5], [0]], {"vocab": 9, "sites": ["1.resid_post"], "sink_filter": None})


def test_roundtrip_and_equal_bytes(tmp_path):
    names = mine().write(tmp_path)
    figures = [f"{name}.{kind}" for name in ("mine", "mine_attn_out") for kind in ("png", "svg", "pdf")]
    assert names == [*result_files(Mine), *figures] == ["mine.parquet", "mine.json", "tokens.npy", *figures]
    assert sorted(everything(tmp_path)) == sorted(names)
    found = Mine.load(str(tmp_path))
    assert isinstance(found, Mine)
    pd.testing.assert_frame_equal(found.to_frame(), mine().frame, check_exact=True)
    assert (found.tokens, found.provenance) == (mine().tokens, mine().provenance)
    assert json.loads((tmp_path / "mine.json").read_text())["summary"] == {"mean": None}
    before = everything(tmp_path)
    assert found.write(tmp_path) == names  # again: the same bytes, figures without a date
    assert everything(tmp_path) == before
    assert "'Date': None" in (tmp_path / "mine.svg").read_text()
    assert "'CreationDate': None" in (tmp_path / "mine.pdf").read_text()


@pytest.mark.parametrize("name", ["mine.parquet", "mine.json", "tokens.npy"])
def test_a_missing_file_is_named(tmp_path, name):
    mine().write(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ResultError, match=f"holds no mine result: {re.escape(name)} is missing"):
        Mine.load(tmp_path)


# Files that belong together


def with_kl(*values: float, tokens=None, seed=0) -> Mine:
    frame = pd.DataFrame({"layer": np.arange(len(values), dtype="int32"), "kl": np.array(values, dtype="float32")})
    return Mine(frame, tokens or [[3, 4, 5], [0]], {"vocab": 9, "sites": ["1.resid_post"], "seed": seed})


@pytest.mark.parametrize("name", ["mine.parquet", "tokens.npy"])
def test_a_file_of_another_run_is_refused(tmp_path, name):
    with_kl(0.5, 1.0).write(tmp_path / "one")
    with_kl(0.5, 2.0, tokens=[[3, 4, 6], [0]]).write(tmp_path / "other")
    (tmp_path / "one" / name).write_bytes((tmp_path / "other" / name).read_bytes())
    message = rf"{re.escape(name)} is not the file that mine\.json was written with"
    with pytest.raises(ResultError, match=message) as said:
        Mine.load(tmp_path / "one")
    assert "\n" not in str(said.value)


def test_changed_json_content_raises_but_new_layout_does_not(tmp_path):
    with_kl(0.5).write(tmp_path)
    path = tmp_path / "mine.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document, sort_keys=True))
    assert Mine.load(tmp_path).provenance["seed"] == 0
    path.write_text(json.dumps(document | {"provenance": document["provenance"] | {"seed": 1}}))
    with pytest.raises(ResultError, match=r"mine\.json is damaged: its content is not what it was written with"):
        Mine.load(tmp_path)


def test_without_digests_the_number_of_rows_is_checked(tmp_path):
    old = with_kl(0.5, 1.0)
    write_frame(tmp_path / "mine.parquet", old.frame)
    save_tokens(tmp_path / "tokens.npy", old.tokens)
    write_json(tmp_path / "mine.json", {"summary": [], "provenance": old.provenance | {"rows": 2}})
    pd.testing.assert_frame_equal(Mine.load(tmp_path).frame, old.frame)
    write_frame(tmp_path / "mine.parquet", old.frame.iloc[:1])
    with pytest.raises(ResultError, match=r"mine\.parquet is damaged: it holds 1 rows, mine\.json says 2"):
        Mine.load(tmp_path)


def test_no_pickle_is_ever_loaded(tmp_path):
    with_kl(0.5).write(tmp_path)
    for array in (np.array([{"a": 1}], dtype=object), np.zeros((2, 2)), np.array([[-1, 3]]), np.array([["a"]])):
        np.save(tmp_path / "tokens.npy", array, allow_pickle=True)
        with pytest.raises(ResultError, match=r"tokens\.npy is damaged"):
            load_tokens(tmp_path / "tokens.npy")


# Overwriting


def test_another_result_is_not_overwritten_unless_asked(tmp_path):
    with_kl(0.5).write(tmp_path)
    with_kl(0.5, seed=7).write(tmp_path, overwrite=False)  # the same table, tokens and summary
    assert Mine.load(tmp_path).provenance["seed"] == 7
    before = everything(tmp_path)
    with pytest.raises(ResultError, match=r"holds another result \(mine\.json\); name another folder or pass --over"):
        with_kl(0.25).write(tmp_path, overwrite=False)
    assert everything(tmp_path) == before
    (tmp_path / "mine.json").write_text("{")
    with pytest.raises(ResultError, match="holds another result"):
        with_kl(0.5).write(tmp_path, overwrite=False)
    with_kl(0.25).write(tmp_path)
    assert Mine.load(tmp_path).frame.kl.tolist() == [0.25]


def test_a_foreign_figure_is_not_overwritten_unless_asked(tmp_path):
    (tmp_path / "mine.png").write_text("a photograph")
    with pytest.raises(ResultError, match=r"holds another result \(mine\.png\)"):
        with_kl(0.5).write(tmp_path, overwrite=False)
    assert everything(tmp_path) == {"mine.png": b"a photograph"}


def test_old_figures_are_deleted_and_nothing_else(tmp_path):
    out = tmp_path / "out"

    @dataclass(frozen=True)
    class Bare(Mine):
        def figures(self):
            return {}

    with_kl(0.5).write(out)
    (tmp_path / "outside.png").write_text("mine")
    (out / "notes.txt").write_text("mine")
    document = json.loads((out / "mine.json").read_text()) | {"figures": ["mine.png", "../outside.png", "notes.txt"]}
    document["sha256"]["mine.json"] = document_digest(document)
    (out / "mine.json").write_text(json.dumps(document))
    Bare(*vars(with_kl(0.5)).values()).write(out)
    assert not (out / "mine.png").exists()
    assert (tmp_path / "outside.png").exists() and (out / "notes.txt").exists()


# Errors of the file system


def test_a_full_disk_leaves_the_old_result(tmp_path):
    resource = pytest.importorskip("resource")
    with_kl(0.5).write(tmp_path)
    before = everything(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # each file may grow to this size
    try:
        message = r"cannot write .*(mine\.parquet|tokens\.npy): .*what was finished stays"
        with pytest.raises(ResultError, match=message) as said:
            with_kl(*np.random.default_rng(0).random(9000)).write(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ".partial" not in str(said.value) and "\n" not in str(said.value)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "\udcff", "file/below", "/proc/nothing"])
def test_an_impossible_folder_raises_with_one_line(tmp_path, name):
    (tmp_path / "file").write_text("no folder")
    for claim in (claim_folder, claim_run):
        with pytest.raises(ResultError, match=r"cannot write to .*name another folder") as said:
            claim(tmp_path / name, ["x.json"], overwrite=False)
        assert "\n" not in str(said.value)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o027])
def test_files_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        with_kl(0.5).write(tmp_path / "out")
        write_json(tmp_path / "x.json", {})
    finally:
        os.umask(before)
    for path in (*(tmp_path / "out").iterdir(), tmp_path / "x.json"):
        assert os.stat(path).st_mode & 0o777 == 0o666 & ~umask
    assert os.stat(tmp_path / "out").st_mode & 0o777 == 0o777 & ~umask


class TwoGroups(Result):
    """Two groups."""

    NAME, NOTE = "found", "what the numbers are"

    @property
    def groups(self):
        share = Estimate(0.5, 0.25, 0.75, 0.1, 9, 30)
        return [{"sae": "one", "share": share}, {"sae": "two", "share": "few"}]

    def plot(self):
        return plt.figure(num="the figure", figsize=(2, 1))


def found(**more):
    return TwoGroups(pd.DataFrame(), [], {"saes": {"one": 1, "two": 2}, "rows_dropped": {}, "why_hooks": None} | more)


def test_tables_show_intervals_and_dropped_rows():
    assert found().saes == ["one", "two"] and list(found().figures()) == ["found"]
    plt.close("the figure")
    lines = found().table().splitlines()
    assert lines[2:] == [
        "sae             share",
        "one  0.5 [0.25, 0.75]",
        "two               few",
        "",
        "what the numbers are",
    ]
    said = found(rows_dropped={"effect not finite": 3}, why_hooks=["no keys"]).table().splitlines()[-2:]
    assert said == ["full forward passes in place of the fast path: no keys", "rows dropped: 3 (effect not finite)"]
    page = page_of(found()._repr_html_())
    assert "0.5 [0.25, 0.75]" in "".join(page.text) and "what the numbers are" in page.text

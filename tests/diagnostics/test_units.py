import errno
import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diagnostics import units as module
from diagnostics.units import Done, Interrupted, Unit, Units, code_version, narrowed, run_units, unlocked
from interventions.errors import ResultError

IDENTITY = {"code": "of the tests", "settings": {"pairs": 200, "layers": [7, 22]}, "texts_sha256": "ab"}
SHARDS = [Unit.of(rows=10 * (shard + 1), context="in_place", shard=shard) for shard in range(4)]


def numbers(unit):
    rng = np.random.default_rng(unit["shard"])
    kl = rng.random(unit.rows).astype(np.float32)
    return pd.DataFrame({"shard": unit["shard"], "kl": kl, "edit": rng.choice(["norm", "full"], unit.rows)})


class Count:
    """A computation that remembers which shards it was asked for."""

    def __init__(self, stop_at=None, error=KeyboardInterrupt):
        self.asked, self.stop_at, self.error = [], stop_at, error

    def __call__(self, unit, tick):
        self.asked.append(unit["shard"])
        if unit["shard"] == self.stop_at:
            raise self.error
        return numbers(unit), {"dropped": unit["shard"], "path": "replay"}


def once(frame, notes=None, folder=None):
    [done] = run_units([Unit.of(shard=0)], folder, lambda unit, tick: (frame, notes or {}), identity=IDENTITY)
    return done


def files(folder):
    return sorted(path.name for path in (folder / "units").iterdir())


def same(a: list[Done], b: list[Done]) -> bool:
    for x, y in zip(a, b, strict=True):
        pd.testing.assert_frame_equal(x.frame, y.frame, check_exact=True, check_index_type=True)
    return [(x.unit, x.notes) for x in a] == [(y.unit, y.notes) for y in b]


# Units and their labels


def test_a_unit_says_what_it_is():
    unit = Unit.of(rows=512, model="trained", site="15.resid_post", shard=0)
    assert unit == Unit((("model", "trained"), ("site", "15.resid_post"), ("shard", 0)), 512)
    assert unit.name == "model=trained site=15.resid_post shard=0"
    assert (unit["site"], unit["shard"]) == ("15.resid_post", 0)
    with pytest.raises(ResultError, match="has no label 'sight'; known: model, site, shard"):
        unit["sight"]


def test_the_name_of_a_file_is_of_identity_and_labels_and_stays(tmp_path):
    def name(identity, *labels):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        run_units([Unit(labels, 5)], folder, lambda unit, tick: (pd.DataFrame({"x": [1]}), {}), identity=identity)
        return files(folder)

    first = name(IDENTITY, ("context", "in_place"), ("shard", 0))
    assert first == ["f0c74d1ef9395318.parquet"]  # what is on users' disks must be found again
    assert name(IDENTITY, ("shard", 0), ("context", "in_place")) == first
    others = [
        name(IDENTITY, ("context", "in_place"), ("shard", 1)),
        name(IDENTITY, ("context", "in_place"), ("shard", "0")),
        name(IDENTITY, ("context", "in_place"), ("shard", False)),
        name(IDENTITY | {"seed": 1}, ("context", "in_place"), ("shard", 0)),
    ]
    assert len({*map(tuple, others), tuple(first)}) == 5


def test_units_that_are_the_same_are_refused():
    with pytest.raises(ResultError, match="two units are the same: shard=0"):
        run_units([Unit.of(shard=0), Unit.of(shard=1), Unit.of(shard=0, rows=9)], None, Count(), identity=IDENTITY)


def test_a_folder_must_be_claimed_before_units_run(tmp_path):
    with pytest.raises(ResultError, match="use `with Units"):
        Units(tmp_path, IDENTITY).run(SHARDS, Count())


# What is stored comes back as it was

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
columns = {
    "float64": st.floats(),
    "float32": st.floats(width=32),
    "int64": st.integers(-(2**63), 2**63 - 1),
    "int8": st.integers(-128, 127),
    "uint64": st.integers(0, 2**64 - 1),
    "bool": st.booleans(),
    "str": text,
    "Int32": st.none() | st.integers(-(2**31), 2**31 - 1),
    "boolean": st.none() | st.booleans(),
}


@st.composite
def frames(draw):
    n = draw(st.integers(0, 6))
    names = draw(st.lists(text, min_size=1, max_size=4, unique=True))
    made = {}
    for name in names:
        dtype = draw(st.sampled_from(sorted(columns)))
        values = draw(st.lists(columns[dtype], min_size=n, max_size=n))
        made[name] = pd.Series(values, dtype=dtype)
    return pd.DataFrame(made)


def bits(frame):
    """Every float's own bits: −0 is not 0."""
    return [column.dropna().to_numpy().tobytes() for _, column in frame.items() if column.dtype.kind == "f"]


@pytest.mark.parametrize("rows", [slice(None), slice(0)])  # without rows the types are the same
def test_a_narrowed_table_holds_four_types_and_the_same_values(tmp_path, rows):
    table = pd.DataFrame(
        {
            "whole": np.array([2**31 - 1, -(2**31) + 1], dtype=np.int64),
            "small": np.array([3, 255], dtype=np.uint8),
            "number": np.array([0.5, np.nan]),
            "half": np.array([0.5, -2], dtype=np.float16),
            "truth": [True, False],
            "name": np.array(["a", "b"], dtype=object),
            "word": pd.array(["a", "1"], dtype="str"),
        }
    ).iloc[rows]
    found = narrowed(table)
    assert [str(kind) for kind in found.dtypes] == ["int32", "int32", "float32", "float32", "bool", "str", "str"]
    pd.testing.assert_frame_equal(found, table, check_dtype=False)
    pd.testing.assert_frame_equal(narrowed(found), found)
    once(found.reset_index(drop=True), folder=tmp_path)


def test_whole_numbers_that_do_not_fit_are_kept():
    large = pd.DataFrame({"key": [2**31, 0], "low": [-(2**40), 1]})
    pd.testing.assert_frame_equal(narrowed(large), large)


@given(frames(), st.dictionaries(text, st.integers() | st.booleans() | text | st.floats(allow_nan=False)))
@settings(max_examples=60)
def test_a_table_and_its_notes_come_back_bit_for_bit(tmp_path_factory, frame, notes):
    folder = tmp_path_factory.mktemp("round")
    notes = {k: v for k, v in notes.items() if not isinstance(v, float) or np.isfinite(v)}
    done = [once(frame, notes, where) for where in (None, folder, folder)]
    for found in done:
        pd.testing.assert_frame_equal(found.frame, frame, check_exact=True, check_column_type=False)
        assert bits(found.frame) == bits(frame)
        assert isinstance(found.frame.index, pd.RangeIndex)
        assert found.notes == notes
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "frame",
    [
        pd.DataFrame({"edit": pd.Series(["norm", None, "full"], dtype=object), "kl": np.float32([1, np.nan, -0.0])}),
        pd.DataFrame({"edit": pd.Series([None, None], dtype=object)}),
        pd.DataFrame({"edit": pd.Series([], dtype=object), "kl": pd.Series([], dtype=np.float32)}),
        pd.DataFrame({"kl": [1.0, 2.0, 3.0]})[[False, True, True]],
        pd.DataFrame(),
    ],
    ids=["strings as objects", "nothing as objects", "empty", "filtered", "no column"],
)
def test_a_table_is_the_same_computed_or_read(tmp_path, frame):
    in_memory, computed, read = (once(frame, {}, where) for where in (None, tmp_path, tmp_path))
    assert same([in_memory], [computed])
    assert same([computed], [read])
    assert list(computed.frame.columns) == list(frame.columns)
    for name in frame:
        assert computed.frame[name].isna().tolist() == frame[name].isna().tolist()
        assert computed.frame[name].dropna().tolist() == frame[name].dropna().tolist()
        if frame[name].dtype != object:
            assert computed.frame[name].dtype == frame[name].dtype


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        (pd.DataFrame({"edit": pd.Categorical(["norm", "full"])}), "column 'edit' is category of categorical; make it"),
        (pd.DataFrame({"edit": pd.Categorical([])}), "column 'edit' is category"),
        (pd.DataFrame({"when": pd.to_datetime(["2020-01-01"])}), "column 'when' is datetime64"),
        (pd.DataFrame({"top": pd.Series([True, None], dtype=object)}), "column 'top' is object of boolean"),
        (pd.DataFrame({"x": [[1, 2], [3]]}), "column 'x' is object of mixed"),
        (pd.DataFrame({"x": [1j]}), "column 'x' is complex128"),
        (pd.DataFrame({0: [1]}), r"columns \[0\]; name each by a string"),
        (pd.DataFrame([[1, 2]], columns=["a", "a"]), "name each by a string of its own"),
        (pd.DataFrame({"x": [1]}, index=pd.Index([3], name="row")), r"index \['row'\] would be lost"),
        (pd.DataFrame(index=range(3)), "3 rows without a column"),
    ],
)
def test_a_table_that_would_come_back_otherwise_is_refused(tmp_path, frame, said):
    for folder in (None, tmp_path):
        with pytest.raises(ResultError, match=f"unit shard=0: .*{said}"):
            once(frame, {}, folder)
    assert files(tmp_path) == []


def test_notes_are_what_json_keeps_of_them(tmp_path):
    notes = {"dropped": {"sink": np.int64(3)}, 7: (1, 2), "delta": np.float32(0.5), "kl": float("nan")}
    kept = {"dropped": {"sink": 3}, "7": [1, 2], "delta": 0.5, "kl": None}
    for folder in (None, tmp_path, tmp_path):
        assert once(pd.DataFrame({"x": [1]}), notes, folder).notes == kept


# Only what is missing is computed


def test_units_come_in_the_order_asked_and_are_computed_once(tmp_path):
    fn = Count()
    first = run_units(SHARDS, tmp_path, fn, identity=IDENTITY)
    assert [done.unit for done in first] == SHARDS
    assert [done.notes["dropped"] for done in first] == fn.asked == [0, 1, 2, 3]
    assert [done.frame["shard"].unique().tolist() for done in first] == [[0], [1], [2], [3]]
    again = run_units(SHARDS[::-1], tmp_path, fn, identity=IDENTITY)
    assert fn.asked == [0, 1, 2, 3]
    assert same(again, first[::-1])
    assert same(run_units(SHARDS, None, Count(), identity=IDENTITY), first)


def test_only_missing_units_are_computed(tmp_path):
    fn = Count()
    with Units(tmp_path, IDENTITY) as units:
        assert units.missing(SHARDS) == SHARDS
        units.run([SHARDS[2], SHARDS[0]], fn)
        assert units.missing(SHARDS) == [SHARDS[1], SHARDS[3]]
        found = units.run(SHARDS, fn)
        assert units.missing(SHARDS) == []
    assert fn.asked == [2, 0, 1, 3]
    assert same(found, run_units(SHARDS, None, Count(), identity=IDENTITY))


def test_in_memory_too(tmp_path):
    fn = Count()
    with Units(None, IDENTITY) as units:
        units.run(SHARDS[1:2], fn)
        assert units.missing(SHARDS) == [SHARDS[0], SHARDS[2], SHARDS[3]]
        units.run(SHARDS, fn)
    assert fn.asked == [1, 0, 2, 3]
    run_units(SHARDS[:1], None, fn, identity=IDENTITY)
    assert fn.asked == [1, 0, 2, 3, 0]


def test_rows_tell_no_units_apart(tmp_path):
    fn = Count()
    run_units([Unit.of(shard=0, rows=7)], tmp_path, fn, identity=IDENTITY)
    [done] = run_units([Unit.of(shard=0, rows=9)], tmp_path, fn, identity=IDENTITY)
    assert fn.asked == [0]
    assert len(done.frame) == 7


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_what_was_done_before_an_error_stays(tmp_path, error):
    fn = Count(stop_at=2, error=error)
    with pytest.raises(error):
        run_units(SHARDS, tmp_path, fn, identity=IDENTITY)
    assert len(files(tmp_path)) == 2
    assert all(name.endswith(".parquet") for name in files(tmp_path))
    fn.stop_at = None
    found = run_units(SHARDS, tmp_path, fn, identity=IDENTITY)
    assert fn.asked == [0, 1, 2, 2, 3]
    assert same(found, run_units(SHARDS, None, Count(), identity=IDENTITY))


def test_an_interruption_says_what_is_kept(tmp_path):
    run_units(SHARDS[3:], tmp_path, Count(), identity=IDENTITY)
    with pytest.raises(Interrupted) as caught:
        run_units(SHARDS, tmp_path, Count(stop_at=1), identity=IDENTITY)
    assert (caught.value.kept, caught.value.total, caught.value.folder) == (2, 4, tmp_path)
    assert str(caught.value) == (
        f"interrupted: 2 of 4 units are kept in {tmp_path}; the same command goes on from there"
    )
    with pytest.raises(Interrupted) as caught:
        run_units(SHARDS, None, Count(stop_at=1), identity=IDENTITY)
    assert str(caught.value) == "interrupted"


def test_an_interruption_within_a_write_keeps_what_was_whole(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    run_units(SHARDS[:1], tmp_path, Count(), identity=IDENTITY)
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, interrupted)
            with pytest.raises(Interrupted) as caught:
                run_units(SHARDS, tmp_path, Count(), identity=IDENTITY)
        assert caught.value.kept == 1
        assert len(files(tmp_path)) == 1


def test_a_full_disk_is_an_error_that_keeps_what_is_there(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    run_units(SHARDS[:1], tmp_path, Count(), identity=IDENTITY)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ResultError, match=r"cannot write unit context=in_place shard=1 .*No space left.*are kept"):
            run_units(SHARDS, tmp_path, Count(), identity=IDENTITY)
    assert len(files(tmp_path)) == 1


# Damage


def damaged(data, how):
    middle = len(data) // 2
    return {
        "empty": b"",
        "half": data[:middle],
        "without its end": data[:-1],
        "a note changed": data.replace(b"replay", b"replax"),
        "zeros at the end": data[:middle] + bytes(len(data) - middle),
        "something else": b"PAR1 not at all PAR1",
    }[how]


@pytest.mark.parametrize(
    "how", ["empty", "half", "without its end", "a note changed", "zeros at the end", "something else"]
)
def test_a_damaged_file_is_named_and_computed_again(tmp_path, how):
    first = run_units(SHARDS, tmp_path, Count(), identity=IDENTITY)
    path = sorted((tmp_path / "units").iterdir())[1]
    whole = path.read_bytes()
    path.write_bytes(damaged(whole, how))
    fn = Count()
    with pytest.warns(UserWarning, match=f"{re.escape(str(path))} is damaged .*computed again") as said:
        found = run_units(SHARDS, tmp_path, fn, identity=IDENTITY)
    assert len(said) == len(fn.asked) == 1
    assert f"shard={fn.asked[0]} is" in str(said[0].message)
    assert same(found, first)
    assert path.read_bytes() == whole


def test_no_truncation_passes_for_a_unit(tmp_path):
    once(pd.DataFrame({"x": [1.5, 2.5], "edit": ["norm", "full"]}), {"dropped": 1}, tmp_path)
    [path] = (tmp_path / "units").iterdir()
    whole = path.read_bytes()
    with Units(tmp_path, IDENTITY) as units, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            assert units.missing([Unit.of(shard=0)]), length
            assert not path.exists()
        path.write_bytes(whole)
        assert not units.missing([Unit.of(shard=0)])


def test_no_flipped_bit_passes_for_a_unit(tmp_path):
    frame = pd.DataFrame({"x": [1.5, 2.5], "top": [True, False], "edit": ["norm", "full"]})
    first = once(frame, {"dropped": 1}, tmp_path)
    [path] = (tmp_path / "units").iterdir()
    whole = path.read_bytes()
    with Units(tmp_path, IDENTITY) as units, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for at in range(0, len(whole), 11):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
            found = units.run([first.unit], lambda unit, tick: (frame, {"dropped": 1}))
            assert same(found, [first]), at


def test_a_file_under_another_name_is_no_unit(tmp_path):
    run_units(SHARDS[:2], tmp_path, Count(), identity=IDENTITY)
    a, b = sorted((tmp_path / "units").iterdir())
    shutil.copy(a, b)
    with pytest.warns(UserWarning, match="damaged"):
        found = run_units(SHARDS[:2], tmp_path, Count(), identity=IDENTITY)
    assert same(found, run_units(SHARDS[:2], None, Count(), identity=IDENTITY))


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    run_units(SHARDS[:1], tmp_path, Count(), identity=IDENTITY)
    (tmp_path / "units" / ".partial-abc.parquet").write_bytes(b"PAR1")
    (tmp_path / "mine.txt").write_text("notes")
    run_units(SHARDS[:1], tmp_path, Count(), identity=IDENTITY)
    assert len(files(tmp_path)) == 1
    assert (tmp_path / "mine.txt").exists()


# Identity


def test_another_identity_is_refused_with_what_differs(tmp_path):
    run_units(SHARDS, tmp_path, Count(), identity=IDENTITY)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = {
        "code": "of the tests",
        "settings": {"pairs": 300, "layers": [7, 22], "noise": {"kind": "x" * 100}},
        "weights_sha256": "cd",
    }
    with pytest.raises(ResultError) as caught:
        run_units(SHARDS, tmp_path, Count(), identity=other)
    assert str(caught.value) == (
        f"{tmp_path} holds units of another run: settings.pairs was 200, is 300; "
        'texts_sha256 was "ab", is (absent); '
        f'settings.noise.kind was (absent), is "{"x" * 36}...; weights_sha256 was (absent), is "cd"; '
        "name another folder, or pass --overwrite to remove them"
    )
    assert {path: path.read_bytes() for path in before} == before
    run_units(SHARDS, tmp_path, Count(stop_at=0, error=AssertionError), identity=IDENTITY)  # the lock is free again


def test_identities_are_compared_as_json(tmp_path):
    run_units(SHARDS[:1], tmp_path, Count(), identity={"code": 1, "a": (1, 2), "b": np.float32(0.5), "c": float("nan")})
    run_units(SHARDS[:1], tmp_path, Count(), identity={"c": None, "b": 0.5, "a": [1, 2], "code": np.int64(1)})
    with pytest.raises(ResultError, match="code was 1, is true"):
        run_units(SHARDS[:1], tmp_path, Count(), identity={"c": None, "b": 0.5, "a": [1, 2], "code": True})


def test_a_folder_without_units_is_anybodys(tmp_path):
    """A run that failed before its first unit leaves nothing that another could spoil."""
    run_units([], tmp_path, Count(), identity={"seed": 0})
    run_units(SHARDS, tmp_path, Count(), identity={"seed": 1})
    with pytest.raises(ResultError, match="seed was 1, is 0"):
        run_units(SHARDS, tmp_path, Count(), identity={"seed": 0})


def test_changed_code_is_another_identity_and_says_so(tmp_path, monkeypatch):
    run_units(SHARDS, tmp_path, Count(), identity={"seed": 0})
    assert json.loads((tmp_path / "run.json").read_text()) == {"code": code_version(), "seed": 0}
    monkeypatch.setattr(module, "code_version", lambda: "0.1.0+other")
    with pytest.raises(ResultError, match=r'the code has changed since: code was ".*", is "0\.1\.0\+other"; name'):
        run_units(SHARDS, tmp_path, Count(), identity={"seed": 0})


def test_the_version_of_the_code_is_of_every_source(tmp_path, monkeypatch):
    for package in ("interventions", "diagnostics"):
        shutil.copytree(Path(module.__file__).parent.parent / package, tmp_path / package)
    monkeypatch.setattr(module, "__file__", str(tmp_path / "diagnostics" / "units.py"))
    monkeypatch.setattr(module.interventions, "__file__", str(tmp_path / "interventions" / "__init__.py"))
    version = code_version.__wrapped__
    first = version()
    assert re.fullmatch(r"\S+\+[0-9a-f]{16}", first)
    found = {first}
    for change in (
        lambda: (tmp_path / "diagnostics" / "statistics.py").open("a").close(),
        lambda: (tmp_path / "diagnostics" / "notes.txt").write_text("no source"),
    ):
        change()
        assert version() == first
    for package, name in (
        ("diagnostics", "statistics.py"),
        ("interventions", "replay.py"),
        ("interventions", "new.py"),
    ):
        with (tmp_path / package / name).open("a") as file:
            file.write("# other\n")
        found.add(version())
    (tmp_path / "interventions" / "new.py").rename(tmp_path / "interventions" / "newer.py")
    found.add(version())
    assert len(found) == 5


def test_overwrite_removes_the_units_of_another_identity_and_no_others(tmp_path):
    other = IDENTITY | {"seed": 1}
    run_units(SHARDS, tmp_path, Count(), identity=other)
    theirs = files(tmp_path)
    (tmp_path / "mine.txt").write_text("notes")
    fn = Count()
    run_units(SHARDS[:3], tmp_path, fn, identity=IDENTITY, overwrite=True)
    assert fn.asked == [0, 1, 2]
    assert len(files(tmp_path)) == 3
    assert not set(theirs) & set(files(tmp_path))
    assert (tmp_path / "mine.txt").exists()
    run_units(SHARDS, tmp_path, fn, identity=IDENTITY, overwrite=True)  # the same command goes on
    assert fn.asked == [0, 1, 2, 3]
    run_units(SHARDS, tmp_path, fn, identity=IDENTITY)
    assert fn.asked == [0, 1, 2, 3]


def test_a_statement_that_cannot_be_read_is_another_identity(tmp_path):
    run_units(SHARDS[:1], tmp_path, Count(), identity=IDENTITY)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ResultError, match=r"its run\.json cannot be read; name another folder"):
        run_units(SHARDS, tmp_path, Count(), identity=IDENTITY)
    run_units(SHARDS, tmp_path, Count(), identity=IDENTITY, overwrite=True)
    run_units(SHARDS, tmp_path, Count(stop_at=0), identity=IDENTITY)


def test_files_are_the_same_whenever_they_are_written(tmp_path):
    for name in ("a", "b"):
        run_units(SHARDS, tmp_path / name, Count(), identity=IDENTITY)
    a, b = ({p.name: p.read_bytes() for p in (tmp_path / n).rglob("*") if p.is_file()} for n in ("a", "b"))
    assert a == b
    assert len(a) == len(SHARDS) + 2
    assert {"run.json", ".lock"} <= set(a)


@pytest.mark.parametrize("folder", ["file", "file/in/it"])
def test_a_folder_that_cannot_be_is_an_error(tmp_path, folder):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ResultError, match=r"cannot write to .*file.*name another folder"):
        run_units(SHARDS, tmp_path / folder, Count(), identity=IDENTITY)


def test_units_that_are_no_folder_is_an_error(tmp_path):
    (tmp_path / "units").write_text("no folder")
    with pytest.raises(ResultError, match=r"cannot write to .*units"):
        run_units(SHARDS, tmp_path, Count(), identity=IDENTITY)


# What another run left


def test_a_finished_result_is_not_replaced_when_its_units_are_gone(tmp_path):
    run_units(SHARDS, tmp_path, Count(), identity=IDENTITY)
    (tmp_path / "mine.json").write_text("a finished result")
    shutil.rmtree(tmp_path / "units")
    with pytest.raises(
        ResultError, match=r"holds files of another run \(mine\.json\): seed was \(absent\), is 1; name"
    ):
        run_units(SHARDS, tmp_path, Count(), identity=IDENTITY | {"seed": 1})
    assert json.loads((tmp_path / "run.json").read_text()) == IDENTITY
    run_units(SHARDS, tmp_path, Count(), identity=IDENTITY)  # its own run goes on
    shutil.rmtree(tmp_path / "units")
    run_units(SHARDS, tmp_path, Count(), identity=IDENTITY | {"seed": 1}, overwrite=True)
    assert (tmp_path / "mine.json").read_text() == "a finished result"  # until the new one is there


@pytest.mark.parametrize("content", ['{"scripts": {}}', "[1]", "no JSON", "[" * 100_000, '{"a":' * 50_000, ""])
def test_a_run_json_of_something_else_is_left_alone(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ResultError, match=r"holds files of something else \(run\.json\): .*--overwrite") as said:
        run_units(SHARDS, tmp_path, Count(), identity=IDENTITY)
    assert "\n" not in str(said.value)
    assert (tmp_path / "run.json").read_text() == content
    run_units(SHARDS, tmp_path, Count(), identity=IDENTITY, overwrite=True)


def test_files_in_units_that_are_no_units_stay(tmp_path):
    run_units(SHARDS, tmp_path, Count(), identity=IDENTITY)
    (tmp_path / "units" / "prices.parquet").write_bytes(b"mine")
    run_units(SHARDS, tmp_path, Count(), identity=IDENTITY | {"seed": 1}, overwrite=True)
    assert (tmp_path / "units" / "prices.parquet").read_bytes() == b"mine" and len(files(tmp_path)) == 5


# Locks


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EIO])
def test_a_folder_that_cannot_be_locked_is_refused_unless_it_is_to_stay_unlocked(tmp_path, monkeypatch, number):
    def refused(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refused)
    with pytest.raises(ResultError, match=rf"cannot be locked \({os.strerror(number)}\): .*pass --no-lock"):
        run_units(SHARDS, tmp_path, Count(), identity=IDENTITY)
    assert not (tmp_path / "units").exists()
    with unlocked():
        run_units(SHARDS, tmp_path, Count(), identity=IDENTITY)
    assert len(files(tmp_path)) == 4
    with pytest.raises(ResultError, match="cannot be locked"):
        run_units(SHARDS, tmp_path, Count(), identity=IDENTITY)


# Progress


def test_rows_that_were_there_come_first_and_in_one_step(tmp_path):
    run_units([SHARDS[1], SHARDS[3]], tmp_path, Count(), identity=IDENTITY)
    seen = []
    run_units(SHARDS, tmp_path, Count(), identity=IDENTITY, progress=lambda n, total: seen.append((n, total)))
    assert seen == [(60, 100), (10, 100), (30, 100)]
    seen.clear()
    run_units(SHARDS, tmp_path, Count(), identity=IDENTITY, progress=lambda n, total: seen.append((n, total)))
    assert seen == [(100, 100)]
    seen.clear()
    run_units(SHARDS, None, Count(), identity=IDENTITY, progress=lambda n, total: seen.append((n, total)))
    assert seen == [(10, 100), (20, 100), (30, 100), (40, 100)]


def test_a_bar_is_told_which_rows_were_there(tmp_path):
    class Bar:
        def __init__(self):
            self.seen = []

        def __call__(self, n, total):
            self.seen.append(("new", n, total))

        def initial(self, n, total):
            self.seen.append(("old", n, total))

    run_units(SHARDS[:2], tmp_path, Count(), identity=IDENTITY, progress=(bar := Bar()))
    run_units(SHARDS[:3], tmp_path, Count(), identity=IDENTITY, progress=bar)
    assert bar.seen == [("new", 10, 30), ("new", 20, 30), ("old", 30, 60), ("new", 30, 60)]


def test_rows_within_a_unit_count_once():
    seen = []

    def fn(unit, tick):
        for n in ticks[unit["shard"]]:
            tick(n)
        seen.append("computed")
        return numbers(unit), {}

    ticks = {0: [4, 4], 1: [5, 0, np.int64(15)], 2: [20, 20, 20], 3: []}
    run_units(SHARDS, None, fn, identity=IDENTITY, progress=lambda n, total: seen.append(n))
    assert seen == [4, 4, "computed", 2, 5, 15, "computed", 20, 10, "computed", "computed", 40]


def test_a_unit_is_reported_when_it_is_stored(tmp_path):
    stored = []
    run_units(SHARDS, tmp_path, Count(), identity=IDENTITY, progress=lambda *_: stored.append(len(files(tmp_path))))
    assert stored == [1, 2, 3, 4]


# Processes: one imports the package, and forks one that is signalled or killed for each task it reads

SERVER = '''
import json, os, signal, sys, time
sys.path.insert(0, sys.argv[1])
import numpy as np, pandas as pd
from diagnostics import command
from diagnostics.results import write_frame
from diagnostics.units import Unit, Units, run_units
from dataclasses import dataclass
from pathlib import Path

@dataclass(frozen=True)
class Settings:
    """A sweep."""
    out: str

def sweep(task):
    units = [Unit.of(shard=shard) for shard in range(task["units"])]
    current = []

    def fn(unit, tick):
        os.write(1, b"start %d\\n" % unit["shard"])
        current.append(unit["shard"])
        time.sleep(task["pause"])
        if task.get("hang") == unit["shard"]:
            while True:
                time.sleep(0.01)
        rng = np.random.default_rng(unit["shard"])
        n = task["rows"]
        columns = {"shard": unit["shard"], "kl": rng.random(n), "dose": rng.random(n).astype(np.float32)}
        return pd.DataFrame(columns | {"edit": rng.choice(["norm", "full"], n), "top": rng.random(n) > 0.5}), {}

    def progress(n, total):
        if current:
            os.write(1, b"done %d\\n" % current[-1])

    done = run_units(units, task["folder"], fn, identity=task["identity"], progress=progress)
    write_frame(Path(task["table"]), pd.concat([d.frame for d in done], ignore_index=True))

def die_at(n):
    """Killed at the nth moment at which the disk is about to change, or has just changed."""
    calls = []

    def moment():
        calls.append(0)
        if len(calls) == n:
            os.kill(os.getpid(), signal.SIGKILL)

    fsync, replace = os.fsync, os.replace

    def dying_fsync(handle):
        size = os.fstat(handle).st_size
        whole = os.pread(os.open(f"/proc/self/fd/{handle}", os.O_RDONLY), size, 0)
        os.ftruncate(handle, size // 2)
        moment()
        os.pwrite(handle, whole, 0)
        moment()
        fsync(handle)

    def dying_replace(a, b):
        moment()
        replace(a, b)
        moment()

    os.fsync, os.replace = dying_fsync, dying_replace

def child(task):
    said = os.open(task["said"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1), os.dup2(said, 2)
    if task.get("die_at"):
        die_at(task["die_at"])
    if task["what"] == "command":
        sys.argv = ["sweep.py", "--out", task["folder"]]
        command.run(Settings, lambda settings: sweep(task))
    elif task["what"] == "hold":
        with Units(task["folder"], task["identity"]):
            os.write(1, b"held\\n")
            time.sleep(600)
    else:
        sweep(task)

print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            child(order)
            status = 0
        except SystemExit as ended:
            status = ended.code
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    print(pid, flush=True)
'''


class Server:
    def __init__(self, folder):
        root = Path(module.__file__).parent.parent
        self.folder, self.n = folder, 0
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, **order):
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, what, folder, **task):
        self.n += 1
        said = self.folder / f"said-{self.n}.txt"
        defaults = {"units": 12, "rows": 10, "pause": 0.0, "identity": IDENTITY, "table": str(self.folder / "table")}
        folder = None if folder is None else str(folder)
        return Task(self, self.ask(what=what, said=str(said), **defaults | {"folder": folder} | task), said)


class Task:
    def __init__(self, server, pid, path):
        self.server, self.pid, self.path = server, pid, path

    def said(self):
        return self.path.read_text() if self.path.exists() else ""

    def shards(self, word):
        return [int(n) for n in re.findall(rf"^{word} (\d+)\n", self.said(), re.M)]

    def until(self, words):
        for _ in range(6000):
            if words in self.said():
                return self
            time.sleep(0.01)
        raise AssertionError(f"{words!r} never came: {self.said()}")

    def wait(self):
        return self.server.ask(wait=self.pid)

    def end(self, number):
        os.kill(self.pid, number)
        return self.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = Server(tmp_path_factory.mktemp("server"))
    yield made
    made.process.stdin.close()
    made.process.stdout.close()
    made.process.wait()


def undisturbed(server, path, **task):
    """The final table of a run that keeps nothing on the disk and that nothing disturbs."""
    assert server.start("sweep", None, table=str(path), **task).wait() == 0
    return path.read_bytes()


def test_one_process_a_folder_and_the_lock_ends_with_its_process(tmp_path, server):
    holder = server.start("hold", tmp_path).until("held")
    with pytest.raises(ResultError, match=f"another process is working in {tmp_path}; wait for it or name another"):
        run_units(SHARDS, tmp_path, Count(), identity=IDENTITY)
    with pytest.raises(ResultError, match="another process"):
        run_units(SHARDS, tmp_path, Count(), identity=IDENTITY | {"seed": 1}, overwrite=True)
    assert json.loads((tmp_path / "run.json").read_text()) == IDENTITY
    assert holder.end(signal.SIGKILL) == -signal.SIGKILL
    run_units(SHARDS, tmp_path, Count(), identity=IDENTITY)
    with Units(tmp_path, IDENTITY), pytest.raises(ResultError, match="another process"):
        Units(tmp_path, IDENTITY).__enter__()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("times", [1, 2])
def test_a_command_that_is_stopped_says_what_it_keeps_and_goes_on(tmp_path, server, number, code, times):
    out, table = tmp_path / "out", str(tmp_path / "table")
    stopped = server.start("command", out, table=table, hang=5).until("start 5")
    for _ in range(times):
        os.kill(stopped.pid, number)
    assert stopped.wait() == code
    [line] = [line for line in stopped.said().splitlines() if not re.match(r"(start|done) \d+$", line)]
    assert line == f"interrupted: 5 of 12 units are kept in {out}; the same command goes on from there"
    assert len(files(out)) == 5
    assert not Path(table).exists()
    again = server.start("command", out, table=table)
    assert again.wait() == 0
    assert again.shards("start") == [5, 6, 7, 8, 9, 10, 11]
    assert Path(table).read_bytes() == undisturbed(server, tmp_path / "whole")


def test_killed_at_every_moment_of_writing(tmp_path, server):
    whole = undisturbed(server, tmp_path / "whole", units=3)
    died, table = 0, tmp_path / "table"
    for n in range(1, 100):
        out = tmp_path / str(n)
        first = server.start("sweep", out, units=3, die_at=n, table=str(table))
        if first.wait() == 0:
            break
        died += 1
        with Units(out, IDENTITY) as units:
            kept = 3 - len(units.missing([Unit.of(shard=shard) for shard in range(3)]))
            assert not list((out / "units").glob(".*"))
        assert set(first.shards("done")) <= set(range(kept))
        assert set(first.shards("start")[:-1]) <= set(range(kept))
        again = server.start("sweep", out, units=3, table=str(table))
        assert again.wait() == 0
        assert again.shards("start") == list(range(kept, 3))
        assert table.read_bytes() == whole
        table.unlink()
    assert died >= 4 * 4 + 2  # half written, written, before and after taking its place; run.json and three units


def test_killed_at_any_moment_and_resumed_to_the_same_bytes(tmp_path, server):
    size = {"units": 8, "rows": 20_000, "pause": 0.02}
    whole = undisturbed(server, tmp_path / "whole", **size)
    rng, kills, finished = random.Random(0), 0, 0
    every = [Unit.of(shard=shard) for shard in range(8)]
    while kills < 6 or not finished:
        out, table, begun = tmp_path / f"out-{finished}", tmp_path / f"table-{finished}", set()
        while True:
            task = server.start("sweep", out, table=str(table), **size)
            time.sleep(rng.uniform(0, 0.15))
            status = task.end(signal.SIGKILL) if kills < 6 else task.wait()
            assert status in (0, -signal.SIGKILL), task.said()
            assert not begun & set(task.shards("start"))
            if status == 0:
                break
            kills += 1
            with Units(out, IDENTITY) as units:
                kept = {unit["shard"] for unit in every} - {unit["shard"] for unit in units.missing(every)}
            assert begun | set(task.shards("done")) <= kept
            assert set(task.shards("start")) - kept <= set(task.shards("start")[-1:])
            begun = kept
        finished += 1
        assert table.read_bytes() == whole
        assert len(files(out)) == 8

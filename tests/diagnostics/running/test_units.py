import errno
import fcntl
import json
import os
import re
import shutil
import signal
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diagnostics.running import units as module
from diagnostics.running.units import Interrupted, Unit, UnitResult, Units, code_version, narrowed, run_units, unlocked
from interventions.errors import ResultError
from tests.diagnostics.unit_processes import IDENTITY, SHARDS, command_that_hangs, context, numbers, work


class Count:
    """A computation that remembers which shards it was asked for."""

    def __init__(self, stop_at=None, error=KeyboardInterrupt):
        self.asked, self.stop_at, self.error = [], stop_at, error

    def __call__(self, unit, tick):
        self.asked.append(unit["shard"])
        if unit["shard"] == self.stop_at:
            raise self.error
        return numbers(unit), {"dropped": unit["shard"], "path": "replay"}


def run(folder, fn=None, units=SHARDS, identity=IDENTITY, **options):
    return run_units(units, folder, fn or Count(), identity=identity, **options)


def once(frame, notes=None, folder=None):
    [done] = run(folder, lambda unit, tick: (frame, notes or {}), [Unit.of(shard=0)])
    return done


def files(folder):
    return sorted(path.name for path in (folder / "units").iterdir())


def same(a: list[UnitResult], b: list[UnitResult]) -> bool:
    for x, y in zip(a, b, strict=True):
        pd.testing.assert_frame_equal(x.frame, y.frame, check_exact=True, check_index_type=True)
    return [(x.unit, x.notes) for x in a] == [(y.unit, y.notes) for y in b]


# Units and their labels


def test_unit_labels():
    unit = Unit.of(rows=512, model="trained", site="15.resid_post", shard=0)
    assert unit == Unit((("model", "trained"), ("site", "15.resid_post"), ("shard", 0)), 512)
    assert unit.name == "model=trained site=15.resid_post shard=0"
    assert (unit["site"], unit["shard"]) == ("15.resid_post", 0)
    with pytest.raises(ResultError, match="has no label 'sight'; known: model, site, shard"):
        unit["sight"]


def test_file_names_depend_on_identity_and_labels_only(tmp_path):
    def name(identity, *labels):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        run(folder, lambda unit, tick: (pd.DataFrame({"x": [1]}), {}), [Unit(labels, 5)], identity)
        return files(folder)

    first = name(IDENTITY, ("context", "in_place"), ("shard", 0))
    assert first == ["f0c74d1ef9395318.parquet"]  # files on users' disks must be found again
    assert name(IDENTITY, ("shard", 0), ("context", "in_place")) == first
    others = [
        name(IDENTITY, ("context", "in_place"), ("shard", 1)),
        name(IDENTITY, ("context", "in_place"), ("shard", "0")),
        name(IDENTITY, ("context", "in_place"), ("shard", False)),
        name(IDENTITY | {"seed": 1}, ("context", "in_place"), ("shard", 0)),
    ]
    assert len({*map(tuple, others), tuple(first)}) == 5


def test_duplicate_units_and_unclaimed_folders_raise(tmp_path):
    with pytest.raises(ResultError, match="two units are the same: shard=0"):
        run(None, units=[Unit.of(shard=0), Unit.of(shard=1), Unit.of(shard=0, rows=9)])
    with pytest.raises(ResultError, match="use `with Units"):
        Units(tmp_path, IDENTITY).run(SHARDS, Count())


# Tables come back as they were stored

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


@pytest.mark.parametrize("rows", [slice(None), slice(0)])  # an empty table keeps its types
def test_narrowed_tables_keep_values_in_four_types(tmp_path, rows):
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
    large = pd.DataFrame({"key": [2**31, 0], "low": [-(2**40), 1]})
    pd.testing.assert_frame_equal(narrowed(large), large)


@given(frames(), st.dictionaries(text, st.integers() | st.booleans() | text | st.floats(allow_nan=False)))
@settings(max_examples=30)
def test_tables_and_notes_roundtrip_bit_for_bit(tmp_path_factory, frame, notes):
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
    ids=["strings as objects", "None only", "empty", "filtered", "no column"],
)
def test_table_is_the_same_computed_or_read(tmp_path, frame):
    in_memory, computed, read = (once(frame, {}, where) for where in (None, tmp_path, tmp_path))
    assert same([in_memory], [computed])
    assert same([computed], [read])
    assert list(computed.frame.columns) == list(frame.columns)
    for name in frame:
        assert computed.frame[name].isna().tolist() == frame[name].isna().tolist()
        assert computed.frame[name].dropna().tolist() == frame[name].dropna().tolist()


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
def test_lossy_roundtrip_is_rejected(tmp_path, frame, said):
    for folder in (None, tmp_path):
        with pytest.raises(ResultError, match=f"unit shard=0: .*{said}"):
            once(frame, {}, folder)
    assert files(tmp_path) == []


def test_notes_are_stored_as_json(tmp_path):
    notes = {"dropped": {"sink": np.int64(3)}, 7: (1, 2), "delta": np.float32(0.5), "kl": float("nan")}
    kept = {"dropped": {"sink": 3}, "7": [1, 2], "delta": 0.5, "kl": None}
    for folder in (None, tmp_path, tmp_path):
        assert once(pd.DataFrame({"x": [1]}), notes, folder).notes == kept


# Only missing units are computed


@pytest.mark.parametrize("on_disk", [True, False])
def test_only_missing_units_are_computed(tmp_path, on_disk):
    fn, whole = Count(), run(None)
    assert [done.unit for done in whole] == SHARDS
    assert [done.frame["shard"].unique().tolist() for done in whole] == [[0], [1], [2], [3]]
    with Units(tmp_path if on_disk else None, IDENTITY) as units:
        assert units.missing(SHARDS) == SHARDS
        units.run([SHARDS[2], SHARDS[0]], fn)
        assert units.missing(SHARDS) == [SHARDS[1], SHARDS[3]]
        assert same(units.run(SHARDS, fn), whole)
        assert units.missing(SHARDS) == []
        other_rows = Unit(SHARDS[0].labels, rows=99)  # rows are no part of what tells units apart
        assert len(units.run([other_rows], fn)[0].frame) == SHARDS[0].rows
    assert fn.asked == [2, 0, 1, 3]
    assert same(run(tmp_path, fn, SHARDS[::-1]), whole[::-1])
    assert fn.asked == ([2, 0, 1, 3] if on_disk else [2, 0, 1, 3, 3, 2, 1, 0])


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_finished_units_survive_an_error(tmp_path, error):
    fn = Count(stop_at=2, error=error)
    with pytest.raises(error) as caught:
        run(tmp_path, fn)
    assert len(files(tmp_path)) == 2
    assert all(name.endswith(".parquet") for name in files(tmp_path))
    if error is KeyboardInterrupt:
        assert (caught.value.kept, caught.value.total, caught.value.folder) == (2, 4, tmp_path)
        assert str(caught.value) == (
            f"interrupted: 2 of 4 units are kept in {tmp_path}; the same command goes on from there"
        )
        with pytest.raises(Interrupted, match=r"^interrupted$"):
            run(None, Count(stop_at=1))
    fn.stop_at = None
    assert same(run(tmp_path, fn), run(None))
    assert fn.asked == [0, 1, 2, 2, 3]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_interrupted_write_keeps_only_complete_units(tmp_path, monkeypatch, call, error):
    def stops(*_):
        raise error

    run(tmp_path, units=SHARDS[:1])
    monkeypatch.setattr(os, call, stops)
    if isinstance(error, OSError):
        with pytest.raises(ResultError, match=r"cannot write unit context=in_place shard=1 .*No space left.*are kept"):
            run(tmp_path)
    else:
        with pytest.raises(Interrupted) as caught:
            run(tmp_path)
        assert caught.value.kept == 1
    assert len(files(tmp_path)) == 1


# Damage


def test_damaged_file_is_named_and_computed_again(tmp_path):
    first = run(tmp_path)
    path = sorted((tmp_path / "units").iterdir())[1]
    whole = path.read_bytes()
    for damaged in (b"PAR1 not at all PAR1", whole.replace(b"replay", b"replax")):
        path.write_bytes(damaged)
        fn = Count()
        with pytest.warns(UserWarning, match=f"{re.escape(str(path))} is damaged .*computed again") as said:
            found = run(tmp_path, fn)
        assert len(said) == len(fn.asked) == 1
        assert f"shard={fn.asked[0]} is" in str(said[0].message)
        assert same(found, first)
        assert path.read_bytes() == whole


def test_truncated_and_bit_flipped_files_are_detected(tmp_path):
    frame = pd.DataFrame({"x": [1.5, 2.5], "top": [True, False], "edit": ["norm", "full"]})
    first = once(frame, {"dropped": 1}, tmp_path)
    [path] = (tmp_path / "units").iterdir()
    whole = path.read_bytes()
    with Units(tmp_path, IDENTITY) as units, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for length in range(0, len(whole), 3):
            path.write_bytes(whole[:length])
            assert units.missing([first.unit]), length
            assert not path.exists()
        for at in range(0, len(whole), 29):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
            assert same(units.run([first.unit], lambda unit, tick: (frame, {"dropped": 1})), [first]), at
        path.write_bytes(whole[:-1])
        assert units.missing([first.unit])
        path.write_bytes(whole)
        assert not units.missing([first.unit])


def test_unit_under_a_wrong_name_is_recomputed(tmp_path):
    run(tmp_path, units=SHARDS[:2])
    a, b = sorted((tmp_path / "units").iterdir())
    shutil.copy(a, b)
    with pytest.warns(UserWarning, match="damaged"):
        found = run(tmp_path, units=SHARDS[:2])
    assert same(found, run(None, units=SHARDS[:2]))


# Identity


def test_another_identity_is_refused_naming_each_difference(tmp_path):
    run(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = {
        "code": "of the tests",
        "settings": {"pairs": 300, "layers": [7, 22], "noise": {"kind": "x" * 100}},
        "weights_sha256": "cd",
    }
    with pytest.raises(ResultError) as caught:
        run(tmp_path, identity=other)
    assert str(caught.value) == (
        f"{tmp_path} holds units of another run: settings.pairs was 200, is 300; "
        'texts_sha256 was "ab", is (absent); '
        f'settings.noise.kind was (absent), is "{"x" * 36}...; weights_sha256 was (absent), is "cd"; '
        "name another folder, or pass --overwrite to remove them"
    )
    assert {path: path.read_bytes() for path in before} == before
    run(tmp_path, Count(stop_at=0, error=AssertionError))  # the lock is free again


def test_identities_are_compared_as_json(tmp_path):
    run(tmp_path, identity={"code": 1, "a": (1, 2), "b": np.float32(0.5), "c": float("nan")})
    run(tmp_path, identity={"c": None, "b": 0.5, "a": [1, 2], "code": np.int64(1)})
    with pytest.raises(ResultError, match="code was 1, is true"):
        run(tmp_path, identity={"c": None, "b": 0.5, "a": [1, 2], "code": True})


def test_folder_without_units_accepts_any_run(tmp_path):
    run(tmp_path, units=[], identity={"seed": 0})
    run(tmp_path, identity={"seed": 1})
    with pytest.raises(ResultError, match="seed was 1, is 0"):
        run(tmp_path, identity={"seed": 0})


def test_changed_code_is_another_identity(tmp_path, monkeypatch):
    run(tmp_path, identity={"seed": 0})
    assert json.loads((tmp_path / "run.json").read_text()) == {"code": code_version(), "seed": 0}
    monkeypatch.setattr(module, "code_version", lambda: "0.1.0+other")
    with pytest.raises(ResultError, match=r'the code has changed since: code was ".*", is "0\.1\.0\+other"; name'):
        run(tmp_path, identity={"seed": 0})


def test_code_version_covers_every_source_file(tmp_path, monkeypatch):
    for package in ("interventions", "diagnostics"):
        shutil.copytree(Path(module.__file__).parents[2] / package, tmp_path / package)
    monkeypatch.setattr(module, "__file__", str(tmp_path / "diagnostics" / "running" / "units.py"))
    monkeypatch.setattr(module.interventions, "__file__", str(tmp_path / "interventions" / "__init__.py"))
    version = code_version.__wrapped__
    first = version()
    assert re.fullmatch(r"\S+\+[0-9a-f]{16}", first)
    (tmp_path / "diagnostics" / "saved.py").touch()
    (tmp_path / "diagnostics" / "notes.txt").write_text("no source")
    assert version() == first
    found = {first}
    for name in ("diagnostics/statistics/jackknife.py", "interventions/replaying/replay.py", "interventions/new.py"):
        with (tmp_path / name).open("a") as file:
            file.write("# other\n")
        found.add(version())
    (tmp_path / "interventions" / "new.py").rename(tmp_path / "interventions" / "newer.py")
    found.add(version())
    assert len(found) == 5


def test_overwrite_removes_units_of_another_identity_only(tmp_path):
    run(tmp_path, identity=IDENTITY | {"seed": 1})
    theirs = files(tmp_path)
    (tmp_path / "mine.txt").write_text("notes")
    (tmp_path / "units" / "prices.parquet").write_bytes(b"mine")
    (tmp_path / "units" / ".partial-abc.parquet").write_bytes(b"PAR1")  # left half written by a killed process
    fn = Count()
    run(tmp_path, fn, SHARDS[:3], overwrite=True)
    assert fn.asked == [0, 1, 2]
    assert len(files(tmp_path)) == 4 and "prices.parquet" in files(tmp_path)
    assert not set(theirs) & set(files(tmp_path))
    assert (tmp_path / "mine.txt").exists() and (tmp_path / "units" / "prices.parquet").read_bytes() == b"mine"
    run(tmp_path, fn, overwrite=True)  # the same command goes on
    run(tmp_path, fn)
    assert fn.asked == [0, 1, 2, 3]


def test_unreadable_run_json_is_another_identity(tmp_path):
    run(tmp_path, units=SHARDS[:1])
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ResultError, match=r"its run\.json cannot be read; name another folder"):
        run(tmp_path)
    run(tmp_path, overwrite=True)
    run(tmp_path, Count(stop_at=0))


def test_two_runs_write_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        run(tmp_path / name)
    a, b = ({p.name: p.read_bytes() for p in (tmp_path / n).rglob("*") if p.is_file()} for n in ("a", "b"))
    assert a == b
    assert len(a) == len(SHARDS) + 2
    assert {"run.json", ".lock"} <= set(a)


@pytest.mark.parametrize(("file", "folder"), [("file", "file"), ("file", "file/in/it"), ("units", "")])
def test_a_folder_that_cannot_be_made_raises(tmp_path, file, folder):
    (tmp_path / file).write_text("no folder")
    with pytest.raises(ResultError, match=rf"cannot write to .*{file}"):
        run(tmp_path / folder)


# Files of another run


def test_finished_result_survives_deletion_of_its_units(tmp_path):
    run(tmp_path)
    (tmp_path / "mine.json").write_text("a finished result")
    shutil.rmtree(tmp_path / "units")
    with pytest.raises(
        ResultError, match=r"holds files of another run \(mine\.json\): seed was \(absent\), is 1; name"
    ):
        run(tmp_path, identity=IDENTITY | {"seed": 1})
    assert json.loads((tmp_path / "run.json").read_text()) == IDENTITY
    run(tmp_path)  # its own run goes on
    shutil.rmtree(tmp_path / "units")
    run(tmp_path, identity=IDENTITY | {"seed": 1}, overwrite=True)
    assert (tmp_path / "mine.json").read_text() == "a finished result"  # until the new one is there


@pytest.mark.parametrize("content", ['{"scripts": {}}', "[1]", "no JSON", "[" * 100_000, '{"a":' * 50_000, ""])
def test_a_foreign_run_json_is_left_alone(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ResultError, match=r"holds files of something else \(run\.json\): .*--overwrite") as said:
        run(tmp_path)
    assert "\n" not in str(said.value)
    assert (tmp_path / "run.json").read_text() == content
    run(tmp_path, overwrite=True)


# Locks


def test_one_run_at_a_time_in_a_folder(tmp_path):
    with Units(tmp_path, IDENTITY):
        with pytest.raises(ResultError, match=f"another process is working in {tmp_path}; wait for it or name another"):
            run(tmp_path)
        with pytest.raises(ResultError, match="another process"):
            run(tmp_path, identity=IDENTITY | {"seed": 1}, overwrite=True)
        assert json.loads((tmp_path / "run.json").read_text()) == IDENTITY
    run(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EIO])
def test_folder_without_locks_is_refused_unless_unlocked(tmp_path, monkeypatch, number):
    def refused(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refused)
    with pytest.raises(ResultError, match=rf"cannot be locked \({os.strerror(number)}\): .*pass --no-lock"):
        run(tmp_path)
    assert not (tmp_path / "units").exists()
    with unlocked():
        run(tmp_path)
    assert len(files(tmp_path)) == 4
    with pytest.raises(ResultError, match="cannot be locked"):
        run(tmp_path)


# Progress


class Bar:
    def __init__(self, folder):
        self.seen, self.folder = [], folder

    def __call__(self, n, total):
        self.seen.append((n, total, len(files(self.folder))))

    def initial(self, n, total):
        self.seen.append(("already", n, total))


def test_progress_counts_stored_rows_first_and_in_one_step(tmp_path):
    run(tmp_path, units=[SHARDS[1], SHARDS[3]])
    run(tmp_path, units=SHARDS[1:], progress=(bar := Bar(tmp_path)))
    run(tmp_path, progress=bar)
    # a unit counts once it is on the disk
    assert bar.seen == [("already", 60, 90), (30, 90, 3), ("already", 90, 100), (10, 100, 4)]
    seen = []
    run(tmp_path, progress=lambda n, total: seen.append((n, total)))
    run(None, progress=lambda n, total: seen.append((n, total)))
    assert seen == [(100, 100), (10, 100), (20, 100), (30, 100), (40, 100)]


def test_rows_within_a_unit_count_once():
    seen = []

    def fn(unit, tick):
        for n in ticks[unit["shard"]]:
            tick(n)
        seen.append("computed")
        return numbers(unit), {}

    ticks = {0: [4, 4], 1: [5, 0, np.int64(15)], 2: [20, 20, 20], 3: []}
    run(None, fn, progress=lambda n, total: seen.append(n))
    assert seen == [4, 4, "computed", 2, 5, 15, "computed", 20, 10, "computed", "computed", 40]


# Processes; `make kills` kills whole commands at random moments


def test_resumes_after_sigkill_at_each_moment_of_writing(tmp_path):
    whole, died, out = [done.frame for done in run(None)], 0, tmp_path / "1"
    for n in range(1, 100):
        out, reported = tmp_path / str(n), tmp_path / f"{n}.txt"
        process = context.Process(target=work, args=(out, reported, n))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        died += 1
        with Units(out, IDENTITY) as units:  # the lock ended with the process
            kept = len(SHARDS) - len(units.missing(SHARDS))
            assert not list((out / "units").glob(".*"))
        counted = reported.read_text().count(".") if reported.exists() else 0
        assert counted <= kept <= counted + 1
        again = run(out, fn := Count())
        assert fn.asked == list(range(kept, len(SHARDS)))
        for found, expected in zip(again, whole, strict=True):
            pd.testing.assert_frame_equal(found.frame, expected, check_exact=True)
    assert died >= 4 * (1 + len(SHARDS))  # half written, written, before and after taking its place; run.json and units


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("times", [1, 2])
def test_a_stopped_command_says_what_it_keeps_and_resumes(tmp_path, number, code, times):
    out, reached = tmp_path / "out", tmp_path / "reached"
    process = context.Process(target=command_that_hangs, args=(out, reached))
    process.start()
    while not reached.exists():
        assert process.is_alive()
        time.sleep(0.01)
    for _ in range(times):
        os.kill(process.pid, number)
    process.join()
    assert process.exitcode == code
    said = reached.with_suffix(".said").read_text()
    assert said == f"interrupted: 2 of 4 units are kept in {out}; the same command goes on from there\n"
    assert len(files(out)) == 2
    again = run(out, fn := Count())
    assert fn.asked == [2, 3]
    assert [done.frame["kl"].tolist() for done in again] == [done.frame["kl"].tolist() for done in run(None)]

"""Resumable sweeps: work is cut into units, and each unit is stored as soon as it is done, so that none is computed twice."""

import errno
import hashlib
import json
import os
import secrets
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

import interventions
import sae_models
from diagnostics.running.ends import Interrupted, PartDone, said_missing
from diagnostics.running.place import parts_of, place, placed_at
from diagnostics.statistics.tables import one_table
from interventions.errors import ResultError
from interventions.files import (
    PARTIAL,
    UNREADABLE,
    claim_folder,
    jsonable,
    place_whole,
    read_json,
    reason,
    remove_partial,
    writing,
)
from interventions.progress import Progressing, followed
from interventions.replaying.certificates import certificates_of_run

Tick = Callable[[int], None]
_UNIT_FILES = "[0-9a-f]" * 16 + ".parquet"
_PARTS = ".parts"
"""A folder that parts share: an empty file `of-N` for each number of parts that the run was cut into, and activations (see `Recordings`)"""
MACHINE = ("processor", "threads")
"""what `mixed` leaves open in an identity"""
_ASIDE, _DIGEST = b"mechdiag", b"mechdiag_sha256"  # in the schema's metadata: what a file holds beside its table


@dataclass(frozen=True)
class Unit:
    """A piece of a sweep: computed in one go, stored in one file."""

    labels: tuple[tuple[str, Any], ...]
    """what tells it from the others, as JSON can say it: (("context", "in_place"), ("shard", 0))"""
    rows: int = 1
    """its cost, for progress and time left; no part of what tells units apart"""
    group: tuple[Any, ...] = ()
    """Units of one group share a recording, and the replay checks of the first of them; (): a group of its own. First in it stands
    what the runner's `prepare`, if it has one, is called with before the unit: it forms what units share. Last stands the number of
    the shard of `Recordings`, where there is one"""

    @classmethod
    def of(cls, *, rows: int = 1, group: tuple[Any, ...] = (), **labels: Any) -> "Unit":
        """`Unit.of(rows=512, context="in_place", shard=0)`."""
        return cls(tuple(labels.items()), rows, group)

    @property
    def name(self) -> str:
        """For people: `context=in_place shard=0`."""
        return " ".join(f"{label}={value}" for label, value in self.labels)

    def __getitem__(self, label: str) -> Any:
        labels = dict(self.labels)
        if label not in labels:
            raise ResultError(f"unit {self.name} has no label {label!r}; known: {', '.join(labels)}")
        return labels[label]


@dataclass(frozen=True)
class UnitResult:
    """A unit and what came of it, the same whether computed now or read from its file."""

    unit: Unit
    frame: pd.DataFrame
    """its rows, numbered from 0"""
    notes: dict[str, Any]
    """what JSON keeps of its notes: counts of dropped rows, the path that ran"""
    certificates: list[dict[str, Any]]
    """where replay was found exact while it was computed: what the units of its group after it rely on, where it is the first"""


Compute = Callable[[Unit, Tick], tuple[pd.DataFrame, dict[str, Any]]]


@cache
def code_version() -> str:
    """The package's version and a hash of the sources of the three packages as they lie on the disk."""
    found = hashlib.sha256()
    for package in (Path(interventions.__file__).parent, Path(sae_models.__file__).parent, Path(__file__).parents[1]):
        for path in sorted(package.rglob("*.py"), key=lambda p: p.relative_to(package).as_posix()):
            source = path.read_bytes()
            found.update(f"{package.name}/{path.relative_to(package).as_posix()} {len(source)}\n".encode())
            found.update(source)
    try:
        number = version("mechdiag")
    except PackageNotFoundError:
        number = "uninstalled"
    return f"{number}+{found.hexdigest()[:16]}"


class Units:
    """The units of one folder, or of none: then they are kept in memory, in the same form, until this object goes.

    On entering: one process a folder (a lock that ends with its process, but see `unlocked`); `identity` must be that of
    the units and results there, as `run.json` says it. The code's version is part of the identity. `overwrite` removes
    the units of another identity; those of the same one are what would be computed again, and stay.

    Each unit is `units/<hash of identity and labels>.parquet`, its notes inside, put in place at once: a process may be
    killed at any moment and loses the unit in progress. Raises `ResultError` on entering when another process is at
    work, the identity differs or the folder cannot be written.
    """

    def __init__(self, folder: str | Path | None, identity: dict[str, Any], overwrite: bool = False):
        self.folder = None if folder is None else Path(folder)
        self.place = replace(place(), shared=self.folder / _PARTS if self.folder and place().part else None)
        either = {name: "any" for name in MACHINE if name in identity} if self.place.mixed else {}
        self.identity: dict[str, Any] = jsonable({"code": code_version(), **identity, **either})
        self.overwrite = overwrite
        self._memory: dict[str, bytes] = {}
        self._lock: int | None = None

    def __enter__(self) -> "Units":
        if self.folder is None:
            if self.place.part is not None:
                raise ResultError("a part of a run needs a folder that all parts share; give folder=")
            return self
        claim_folder(self.folder, (), overwrite=True)
        if self.place.part is None:
            lock, alone = _locked(self.folder), True
        else:
            lock, alone = _locked_with_others(self.folder)
        try:
            with writing(f"to {self.folder}"):
                self._take(self.folder, claim_folder(self.folder / "units", (), overwrite=True), alone)
                if self.place.part is not None:
                    (self.folder / _PARTS).mkdir(exist_ok=True)
                    (self.folder / _PARTS / f"of-{self.place.part[1]}").touch()
                    _share(lock)
        except BaseException:
            os.close(lock)
            raise
        self._lock = lock
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def missing(self, units: Sequence[Unit]) -> list[Unit]:
        """Those of `units` that are not there, in their order. A file that cannot be read is warned of and removed."""
        return [unit for key, unit in self._keyed(units).items() if self._read(key, unit) is None]

    def run(self, units: Sequence[Unit], fn: Compute, progress: Progressing = None) -> list[UnitResult]:
        """`units` in their order; `fn(unit, tick)` gives the table and notes of those that are missing.

        A table has columns of numbers, booleans or strings with unique names and rows without names. Other columns,
        categories among them, are refused: what came back from the file would depend on what a unit happens to hold.
        Strings kept as objects come back as pandas' own strings, and every NaN as the same NaN.
        `fn` may report rows as they come with `tick(n)`; the rest of `unit.rows` counts when the unit is stored.
        `progress` is what `followed` takes and gets rows; what was there already comes first, in one step, to its method
        `initial` if it has one.

        Raises `ResultError` for units that are not distinct, a table that is refused or a folder that takes no more;
        `Interrupted` for a KeyboardInterrupt. The units done stay in each case, and when `fn` raises.
        """
        keyed = self._keyed(units)
        total = sum(unit.rows for unit in units)
        try:
            done = {key: found for key, unit in keyed.items() if (found := self._read(key, unit)) is not None}
            already = sum(found.unit.rows for found in done.values())
            todo, leader = self._asked(keyed, done), _leaders(keyed)
            with followed(progress, str(self.identity.get("diagnostic", "units"))) as told:
                if told is not None and already:
                    getattr(told, "initial", told)(already, total)

                def report(n: int) -> None:
                    if told is not None:
                        told(n, total)

                def relied_on(key: str) -> list[dict[str, Any]] | None:
                    return done[key].certificates if key in done else None

                def store(key: str, data: bytes) -> None:
                    done[key] = self._store(key, keyed[key], data)

                if todo and self.place.pool is not None:

                    def arrived(key: str, data: bytes) -> None:
                        store(key, data)
                        report(keyed[key].rows)

                    self.place.pool.compute(fn, todo, leader, relied_on, arrived)
                else:
                    with certificates_of_run() as run:
                        for key, unit in todo.items():
                            left = _Left(unit.rows, report)
                            run.only(relied_on(leader[key]) or [])
                            store(key, packed(unit, *fn(unit, left.tick), run.taken()))
                            left.tick(unit.rows)
        except KeyboardInterrupt as error:
            kept = sum(self._path(key).exists() for key in keyed) if self.folder is not None else 0
            raise Interrupted(kept, len(keyed), self.folder) from error
        if self.place.part is not None:
            done |= {
                key: found for key in keyed if key not in done and (found := self._read(key, keyed[key])) is not None
            }
        if self.place.part is not None and len(done) < len(keyed):
            assert self.folder is not None
            raise PartDone(self.place.part, len(done), self._lacking(keyed, done, self.place.part[1]), self.folder)
        if self.place.part is None and self.folder is not None:  # joined
            shutil.rmtree(self.folder / _PARTS, ignore_errors=True)
        return [done[key] for key in keyed]

    def _asked(self, keyed: dict[str, Unit], done: Mapping[str, UnitResult]) -> dict[str, Unit]:
        """The units that this call computes. Raises `ResultError` where parts were begun and some are missing."""
        todo = {key: unit for key, unit in keyed.items() if key not in done}
        if self.place.part is None:
            if todo and (begun := self._parts_begun()):
                lacking = self._lacking(keyed, done, begun[-1])
                raise ResultError(
                    f"{self.folder} was begun in parts, and {said_missing(lacking)}; run --part {next(iter(lacking))}, then join"
                )
            return todo
        i, n = self.place.part
        part = dict(zip(keyed, parts_of(_groups(keyed), n), strict=True))
        leader = _leaders(keyed)
        own = {key for key in todo if part[key] == i}
        own |= {leader[key] for key in own}  # whose replay checks they rely on
        return {key: unit for key, unit in todo.items() if key in own}

    def _parts_begun(self) -> list[int]:
        """Into how many parts the run in the folder was cut, the last one begun at the end."""
        if self.folder is None:
            return []
        begun = sorted((self.folder / _PARTS).glob("of-*"), key=lambda path: path.stat().st_mtime)
        return [int(path.name.removeprefix("of-")) for path in begun]

    def _lacking(self, keyed: dict[str, Unit], done: Mapping[str, UnitResult], n: int) -> dict[str, int]:
        """How many units each part lacks, by its name."""
        parts = zip(keyed, parts_of(_groups(keyed), n), strict=True)
        lacking = Counter(part for key, part in parts if key not in done)
        return {f"{part}/{n}": count for part, count in sorted(lacking.items())}

    def _store(self, key: str, unit: Unit, data: bytes) -> UnitResult:
        if self.folder is None:
            self._memory[key] = data
        else:
            try:
                _write_synced(self._path(key), data)
            except OSError as error:
                raise ResultError(
                    f"cannot write unit {unit.name} to {self.folder}: {reason(error)}; "
                    "the units done are kept: make room, and the same command goes on from there"
                ) from error
        return _unpacked(unit, data)

    def _read(self, key: str, unit: Unit) -> UnitResult | None:
        if self.folder is None:
            data = self._memory.get(key)
            return None if data is None else _unpacked(unit, data)
        path = self._path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ResultError(f"cannot read {path}: {reason(error)}; name another folder") from error
        try:
            return _unpacked(unit, data)
        except UNREADABLE as error:
            why = " ".join(str(error).split()) or type(error).__name__
            warnings.warn(f"{path} is damaged ({why}); unit {unit.name} is computed again", stacklevel=3)
            path.unlink(missing_ok=True)
            return None

    def _keyed(self, units: Sequence[Unit]) -> dict[str, Unit]:
        if self.folder is not None and self._lock is None:
            raise ResultError(f"{self.folder} is not claimed; use `with Units(...) as units:`")
        keyed: dict[str, Unit] = {}
        for unit in units:
            said = json.dumps([self.identity, jsonable(dict(unit.labels))], sort_keys=True)
            key = hashlib.sha256(said.encode()).hexdigest()[:16]
            if key in keyed:
                raise ResultError(f"two units are the same: {unit.name}; give each a label of its own")
            keyed[key] = unit
        return keyed

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / "units" / f"{key}.parquet"

    def _take(self, folder: Path, units: Path, alone: bool) -> None:
        """Remove what a killed process left, and see to it that `run.json` and the units there are of this identity.

        alone: no other part is at work there; else nothing is removed.
        """
        for there in (units, folder, folder / _PARTS) if alone else ():
            remove_partial(there)
        stated = folder / "run.json"
        if stated.exists():
            differences = _differences(stated, self.identity)
            if not differences:
                return
            if not (self.overwrite and alone) and (held := _held(folder, units)):
                raise ResultError(
                    f"{folder} holds {held}: {'; '.join(differences)}; "
                    "name another folder, or pass --overwrite to remove them"
                )
            for old in units.glob(_UNIT_FILES):
                old.unlink()
            shutil.rmtree(folder / _PARTS, ignore_errors=True)
        text = json.dumps(self.identity, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        passing = units / f"{PARTIAL}{secrets.token_hex(8)}.run.json"
        _write_synced(passing, text.encode())
        os.replace(passing, stated)  # by way of units/, where what a killed process leaves is removed


def run_units(
    units: Sequence[Unit],
    folder: str | Path | None,
    fn: Compute,
    *,
    identity: dict[str, Any],
    counted: Callable[[], Sequence[Unit]] | None = None,
    overwrite: bool = False,
    progress: Progressing = None,
) -> list[UnitResult]:
    """`Units(folder, identity, overwrite).run(units, fn, progress)`, the folder claimed for as long.

    counted: the same units with their numbers of rows, where these cost a clean pass; asked for only if a unit is missing.
    """
    with Units(folder, identity, overwrite) as claimed, placed_at(claimed.place):
        if counted is not None and claimed.missing(units):
            units = counted()
        return claimed.run(units, fn, progress)


def run_table(
    units: Sequence[Unit],
    folder: str | Path | None,
    fn: Compute,
    merge: Callable[[Sequence[UnitResult]], dict[str, Any]],
    **how: Any,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """`run_units`, their tables as one, and their notes as `merge` makes them one.

    Raises `ResultError` where no row is left, with what the notes say was drawn and dropped, and what `run_units` raises.
    """
    done = run_units(units, folder, fn, **how)
    frame, notes = one_table([one.frame for one in done]), merge(done)
    if frame.empty:
        said = [
            f"{name.replace('_', ' ')}: {notes[name]}" for name in ("drawn", "rows_dropped", "dropped") if name in notes
        ]
        raise ResultError("; ".join(["no row is left", *said]))
    return frame, notes


def narrowed(frame: pd.DataFrame) -> pd.DataFrame:
    """A table in the types that units keep, with rows or without.

    Whole numbers become int32 (int64 where one does not fit), other numbers float32, all else but truth values strings.
    """
    kinds = {}
    for name, column in frame.items():
        kind = column.dtype.kind
        if kind in "iu":
            fits = not len(column) or max(abs(int(column.min())), abs(int(column.max()))) < 2**31
            kinds[name] = "int32" if fits else "int64"
        elif kind != "b":
            kinds[name] = "float32" if kind == "f" else "str"
    return frame.astype(kinds)


def packed(unit: Unit, frame: pd.DataFrame, notes: dict[str, Any], certificates: list[dict[str, Any]]) -> bytes:
    """The unit's file. Whoever asks for a unit gets what this file gives back, so that runs cannot differ by history."""
    names = list(frame.columns)
    if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ResultError(f"unit {unit.name}: columns {names}; name each by a string of its own")
    if any(name is not None for name in frame.index.names):
        raise ResultError(f"unit {unit.name}: the index {frame.index.names} would be lost; make it a column")
    if len(frame) and not names:
        raise ResultError(f"unit {unit.name}: {len(frame)} rows without a column")
    for name, column in frame.items():
        held = pd.api.types.infer_dtype(column, skipna=True)
        if column.dtype.kind not in "biuf" and held not in ("string", "empty"):
            raise ResultError(
                f"unit {unit.name}: column {name!r} is {column.dtype} of {held}; make it numbers, booleans or strings"
            )
    aside = {"labels": jsonable(dict(unit.labels)), "notes": jsonable(notes), "certificates": jsonable(certificates)}
    table = pa.Table.from_pandas(frame, preserve_index=False, nthreads=1)
    said = json.dumps(aside, ensure_ascii=False, allow_nan=False).encode()
    table = table.replace_schema_metadata({**table.schema.metadata, _ASIDE: said})
    table = table.replace_schema_metadata({**table.schema.metadata, _DIGEST: _digest(table)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, write_page_checksum=True)
    return sink.getvalue().to_pybytes()


def _unpacked(unit: Unit, data: bytes) -> UnitResult:
    file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True, pre_buffer=False)
    table = file.read(use_threads=False)
    if table.schema.metadata[_DIGEST] != _digest(table):
        raise ValueError("its rows, names or notes have changed")
    aside = json.loads(table.schema.metadata[_ASIDE])
    if aside["labels"] != jsonable(dict(unit.labels)):
        raise ValueError(f"it holds unit {aside['labels']}")
    return UnitResult(unit, table.to_pandas(use_threads=False), aside["notes"], aside["certificates"])


class _Left:
    """Rows of a unit that are not reported yet."""

    def __init__(self, rows: int, report: Callable[[int], object]):
        self.left, self.report = rows, report

    def tick(self, n: int) -> None:
        n = min(int(n), self.left)
        self.left -= n
        if n > 0:
            self.report(n)


def _groups(keyed: Mapping[str, Unit]) -> list[Any]:
    """Each unit's group, or its key for one of its own."""
    return [unit.group or key for key, unit in keyed.items()]


def _leaders(keyed: Mapping[str, Unit]) -> dict[str, str]:
    """The first unit of each unit's group, by key."""
    first: dict[Any, str] = {}
    return {key: first.setdefault(group, key) for key, group in zip(keyed, _groups(keyed), strict=True)}


def _digest(table: pa.Table) -> bytes:
    """Of what Parquet's checksums of pages leave out."""
    stated = json.dumps([table.num_rows, table.column_names]).encode()
    parts = (stated, table.schema.metadata[b"pandas"], table.schema.metadata[_ASIDE])
    return hashlib.sha256(b"\n".join(parts)).hexdigest().encode()


def _write_synced(path: Path, data: bytes) -> None:
    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    place_whole(path, write)


def _held(folder: Path, units: Path) -> str | None:
    """What another run's folder holds that must not be lost: units, a finished result, a run.json that no `Units` wrote."""
    if any(units.glob(_UNIT_FILES)):
        return "units of another run"
    others = {path.name for path in folder.iterdir() if not path.name.startswith(".")} - {"run.json", "units"}
    if others:
        return f"files of another run ({min(others)})"
    try:
        there = read_json(folder / "run.json")
    except ResultError:
        there = None
    return None if isinstance(there, dict) and "code" in there else "files of something else (run.json)"


_LOCKING: ContextVar[bool] = ContextVar("locking", default=True)


@contextmanager
def unlocked() -> Iterator[None]:
    """Work in folders without locking them, for file systems that have no locks: then two processes must not share a folder."""
    token = _LOCKING.set(False)
    try:
        yield
    finally:
        _LOCKING.reset(token)


def _locked_with_others(folder: Path) -> tuple[int, bool]:
    """The lock of a process that computes a part, and whether it is alone in the folder by now; to be followed by `_share`."""
    try:
        return _locked(folder), True
    except ResultError:
        return _locked(folder, shared=True), False


def _share(handle: int) -> None:
    """Let other parts into the folder, and nobody else."""
    if _LOCKING.get():
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_SH)


def _locked(folder: Path, shared: bool = False) -> int:
    """A handle that holds the folder's lock until it is closed, or its process ends. Raises `ResultError`."""
    with writing(f"to {folder}"):
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    if not _LOCKING.get():
        return handle
    try:
        import fcntl

        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except (OSError, ImportError) as error:
        os.close(handle)
        if isinstance(error, OSError) and error.errno in (errno.EAGAIN, errno.EACCES):
            raise ResultError(f"another process is working in {folder}; wait for it or name another folder") from None
        why = reason(error) if isinstance(error, OSError) else str(error)
        raise ResultError(
            f"{folder} cannot be locked ({why}): its file system may have no locks; name a folder on another one, or pass --no-lock and "
            "see to it that no other process works there"
        ) from error
    return handle


def _differences(stated: Path, identity: dict[str, Any]) -> list[str]:
    """How the identity in the file `stated` differs, a phrase each."""
    try:
        there = _flat(read_json(stated))
    except (ResultError, RecursionError):
        return [f"its {stated.name} cannot be read"]
    here = _flat(identity)
    return [
        f"{'the code has changed since: ' if key == 'code' else ''}{key} was {_short(was)}, is {_short(now)}"
        for key in {**there, **here}
        if (was := there.get(key, "(absent)")) != (now := here.get(key, "(absent)"))
    ]


def _flat(value: Any, at: str = "") -> dict[str, str]:
    """Nested dictionaries as one of JSON texts (1 and true differ), its keys joined with dots."""
    if not isinstance(value, dict) or (at and not value):
        return {at: json.dumps(value, ensure_ascii=False, sort_keys=True)}
    return {key: leaf for k, v in value.items() for key, leaf in _flat(v, f"{at}.{k}" if at else str(k)).items()}


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."

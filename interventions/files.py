"""Files on disk: each whole or not there, with the permissions that the user's umask leaves, and errors that say what was wrong."""

import contextlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from interventions.errors import ResultError

PARTIAL = ".partial-"
"""How the names of unfinished files and folders begin; a killed process leaves them, and the next one removes them."""


def claim_folder(folder: str | Path, names: Iterable[str], overwrite: bool) -> Path:
    """The folder, made if need be, ready to take files of these names.

    Raises `ResultError` when one of them is there already and `overwrite` is not given, or the folder cannot be written.
    """
    folder = Path(folder)
    there = [name for name in names if os.path.lexists(_encoded(folder) / name)]
    if there and not overwrite:
        raise ResultError(f"{folder} holds another run ({there[0]}); name another folder or pass --overwrite")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ResultError(f"cannot write to {folder}: {reason(error)}; name another folder") from error
    return folder


def claim_run(folder: str | Path, names: Iterable[str], overwrite: bool) -> Path:
    """`claim_folder` for a run with units.

    Where a `run.json` is there, `Units` refuses another run's folder, and a result that differs is refused as it is written.
    """
    stated = os.path.lexists(_encoded(Path(folder)) / "run.json")
    return claim_folder(folder, () if stated else names, overwrite)


def _encoded(folder: Path) -> Path:
    """The folder, whose name must be one that files and terminals can hold. Raises `ResultError`."""
    if any(c == "\0" or "\ud800" <= c <= "\udfff" for c in str(folder)):
        raise ResultError(f"cannot write to {str(folder)!a}: its name is no UTF-8 text; name another folder")
    return folder


def made(folder: str | Path) -> Path:
    """The folder, which is there from now on. Raises `ResultError`."""
    return claim_folder(folder, (), overwrite=True)


def reason(error: OSError) -> str:
    """What the system said, on one line."""
    return error.strerror or " ".join(str(error).split()) or type(error).__name__


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, then put it in its place at once; a failure leaves what stood there.

    Raises `ResultError` where the system does not let it be written: a full disk, no permission.
    """
    meant = path.parent.parent / path.name if path.parent.name.startswith(PARTIAL) else path
    with writing(str(meant)):
        place_whole(path, write)


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """`ResultError` for what the system says while something is written."""
    try:
        yield
    except OSError as error:
        raise ResultError(
            f"cannot write {what}: {reason(error)}; what was finished stays: make room, or name another place, and run the same command "
            "again"
        ) from error


def place_whole(path: Path, write: Callable[[Path], object]) -> None:
    """`write_whole` with the system's own errors."""
    partial = path.parent / f"{PARTIAL}{secrets.token_hex(8)}{path.suffix}"
    try:
        write(partial)  # it makes the file itself, so that the system applies the umask
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def place_first(path: Path, write: Callable[[Path], object]) -> None:
    """`place_whole`, unless a file is there by then: of several processes the first one's stays."""

    partial = path.parent / f"{PARTIAL}{secrets.token_hex(8)}{path.suffix}"
    try:
        write(partial)
        with contextlib.suppress(FileExistsError):
            os.link(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def remove_partial(folder: Path) -> None:
    """Remove what a killed process left unfinished."""
    for left in folder.glob(f"{PARTIAL}*"):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def write_frame(path: Path, frame: pd.DataFrame) -> None:
    """A table in Parquet: the same bytes for the same table and version of pyarrow."""
    write_whole(path, lambda p: frame.to_parquet(p, index=False))


def write_json(path: Path, value: Any) -> None:
    """JSON in the order given; what is not finite becomes null."""
    write_whole(path, lambda p: p.write_text(json_text(value), encoding="utf-8"))


def json_text(value: Any) -> str:
    """What `write_json` writes."""
    return json.dumps(jsonable(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises `ResultError` where it cannot be read or is no JSON."""
    try:
        return json.loads(path.read_bytes(), parse_constant=_no_constant)
    except OSError as error:
        raise ResultError(f"cannot read {path}: {reason(error)}") from error
    except (ValueError, RecursionError) as error:
        why = " ".join(str(error).split())
        raise ResultError(f"{path} is damaged: no JSON that was written here ({why})") from error


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


class Json:
    """A dataclass that JSON can hold."""

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them (`jsonable`), without those whose metadata say `json=False`."""
        kept = [f.name for f in fields(self) if f.metadata.get("json", True)]  # type: ignore[arg-type]
        return {name: jsonable(getattr(self, name)) for name in kept}


def jsonable(value: Any) -> Any:
    """Numbers, strings, lists and dictionaries only; what is not finite becomes None, a table the list of its rows."""
    if hasattr(value, "as_dict"):
        return jsonable(value.as_dict())
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    if isinstance(value, pd.DataFrame):
        return jsonable(value.to_dict("records"))
    if isinstance(value, np.generic):
        return jsonable(value.item())
    if isinstance(value, np.ndarray):
        return jsonable(value.tolist())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    if value is None or isinstance(value, (str, int, float)):
        return value
    return str(value)


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    """A table as CSV; text that a spreadsheet would run as a formula gets an apostrophe before it, numbers stay as they are."""
    safe = frame.rename(columns=_quoted)
    for i, column in enumerate(frame.dtypes):
        if column.kind not in "biufcmM":
            safe.isetitem(i, frame.iloc[:, i].astype(object).map(_quoted))
    write_whole(path, lambda p: safe.to_csv(p, index=False))


def _quoted(cell: Any) -> Any:
    if not isinstance(cell, str):
        return cell
    one = cell.replace("\r\n", "\n").replace(
        "\r", "\n"
    )  # a bare \r would end the line: Python's writer does not quote it
    return f"'{one}" if one.startswith(("=", "+", "-", "@", "\t", "\n")) else one


UNREADABLE = (
    ValueError, KeyError, TypeError, AttributeError, IndexError, StopIteration, OSError, NotImplementedError, MemoryError, RecursionError,
    pa.ArrowException,
)  # fmt: skip
"""What libraries raise for files that are not what their names say."""

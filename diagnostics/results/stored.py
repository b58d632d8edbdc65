"""The files of one result: read once, each checked against its digest in the result's JSON.

    <kind>.json     summary, provenance, `figures`: names of its figures, `sha256`: digests of each table,
                    of the tokens, and of this file's own content without the digests
    <kind>.parquet  the table; some kinds have more of them
    tokens.npy      token ids [prompt, pos], right-padded with -1

A JSON without digests was written before there were any. It is loaded if its files can be read and have the rows that it states;
whether they belong together cannot be told.
"""

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from interventions.errors import MechdiagError, ResultError
from interventions.files import UNREADABLE, read_json, reason, write_whole

DIGESTS = "sha256"
"""Key of the digests in a result's JSON, by file."""


def digest(data: bytes) -> str:
    """SHA-256, as hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def document_digest(document: Mapping[str, Any]) -> str:
    """Digest of a JSON document's content but its digests, however its text is laid out."""
    content = {name: value for name, value in document.items() if name != DIGESTS}
    return digest(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


class Stored:
    """One result's files in a folder.

    Raises `ResultError` where a file is missing or damaged, or is not the one that the JSON was written with.
    """

    def __init__(self, folder: str | Path, name: str, files: Iterable[str]):
        self.folder, self.name, self.json = Path(folder), name, f"{name}.json"
        files = tuple(files)
        if missing := [file for file in files if not os.path.exists(self.folder / file)]:
            raise ResultError(f"{self.folder} holds no {name} result: {missing[0]} is missing")
        document = read_json(self.folder / self.json)
        if not isinstance(document, dict):
            raise self.damaged(self.json, "it is no object of JSON")
        self.digests = self._digests(document, files)
        if not isinstance(document.get("provenance"), dict):
            raise self.damaged(self.json, "it has no provenance")
        self.summary: Any = document.get("summary")
        self.provenance: dict[str, Any] = document["provenance"]

    def _digests(self, document: dict[str, Any], files: tuple[str, ...]) -> dict[str, str] | None:
        if DIGESTS not in document:
            return None
        found = document[DIGESTS]
        if not isinstance(found, dict) or found.get(self.json) != document_digest(document):
            raise self.damaged(self.json, "its content is not what it was written with")
        if uncovered := [file for file in files if not any(known.split("/")[0] == file for known in found)]:
            raise self.damaged(self.json, f"it has no digest of {uncovered[0]}")
        return found

    def damaged(self, file: str, why: str) -> ResultError:
        """The error that says which file is damaged, and how."""
        return ResultError(f"{self.folder / file} is damaged: {why}; run the command of this result again")

    def within(self, subfolder: str) -> list[str]:
        """The tables in a subfolder and below it, by their digests (without any: all that lie there), in the order of their names."""
        paths = (self.folder / subfolder).rglob("*.parquet")
        there = sorted(path.relative_to(self.folder).as_posix() for path in paths)
        if self.digests is None:
            return there
        known = sorted(file for file in self.digests if file.startswith(f"{subfolder}/"))
        if missing := [file for file in known if file not in there]:
            raise self.damaged(missing[0], "it is missing")
        return known

    def read(self, file: str) -> bytes:
        """A file's bytes, those that the JSON was written with."""
        try:
            data = (self.folder / file).read_bytes()
        except OSError as error:
            raise ResultError(f"cannot read {self.folder / file}: {reason(error)}") from error
        if self.digests is not None and self.digests.get(file) != digest(data):
            raise ResultError(
                f"{self.folder / file} is not the file that {self.json} was written with (sha256 differs): it was changed, or left by a "
                "run that was killed while it replaced another; run the command of this result again"
            )
        return data

    def table(self, file: str | None = None) -> pd.DataFrame:
        """The table in a file, by default the one of the result's name."""
        file = file or f"{self.name}.parquet"
        data = self.read(file)
        try:
            return pd.read_parquet(io.BytesIO(data))
        except UNREADABLE as error:
            raise self.damaged(file, f"no table can be read from it ({_said(error)})") from error

    def tokens(self) -> list[list[int]]:
        """The prompts as token ids."""
        data = self.read("tokens.npy")
        try:
            return _tokens(data)
        except UNREADABLE as error:
            raise self.damaged("tokens.npy", f"no token ids can be read from it ({_said(error)})") from error

    @contextlib.contextmanager
    def understood(self) -> Iterator[None]:
        """While a result is built from its files, missing keys and wrong types mean damage."""
        try:
            yield
        except MechdiagError:
            raise
        except UNREADABLE as error:
            raise self.damaged(self.json, f"it is not what a {self.name} result holds ({_said(error)})") from error


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def save_tokens(path: Path, tokens: list[list[int]]) -> None:
    """Token ids `[prompt, pos]`, right-padded with −1, as .npy."""
    table = np.full((len(tokens), max(map(len, tokens), default=0)), -1, dtype=np.int32)
    for row, prompt in zip(table, tokens, strict=True):
        row[: len(prompt)] = prompt
    write_whole(path, lambda p: np.save(p, table))


def load_tokens(path: str | Path) -> list[list[int]]:
    """What `save_tokens` kept. Raises `ResultError` for anything else; nothing that is pickled is ever loaded."""
    try:
        return _tokens(Path(path).read_bytes())
    except UNREADABLE as error:
        raise ResultError(f"{path} is damaged: no token ids can be read from it ({_said(error)})") from error


def _tokens(data: bytes) -> list[list[int]]:
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, fortran, dtype = read(file)
    if len(shape) != 2 or dtype.kind not in "iu" or fortran:
        raise ValueError(f"shape {shape}, dtype {dtype}; expected whole numbers [prompt, pos]")
    left = data[file.tell() :]
    if len(left) != shape[0] * shape[1] * dtype.itemsize:
        raise ValueError(f"{len(left)} bytes for shape {shape}, dtype {dtype}")
    table = np.frombuffer(left, dtype=dtype).reshape(shape)
    known = table >= 0
    if (table < -1).any() or (known[:, 1:] & ~known[:, :-1]).any():
        raise ValueError("a number is no token id, or padding stands before one")
    return [row[row >= 0].tolist() for row in table]

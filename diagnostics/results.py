"""Results on disk: a tidy table in Parquet beside its provenance in JSON, each file whole or not there."""

import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from typing_extensions import Self

from interventions.errors import ResultError
from interventions.models import CausalModel
from interventions.sites import Site

_PACKAGES = ("mechdiag", "torch", "transformers", "transformer-lens", "nnsight", "numpy", "pandas", "pyarrow")


def claim_folder(folder: str | Path, names: Iterable[str], overwrite: bool) -> Path:
    """The folder, made if need be, ready to take files of these names.

    Raises `ResultError` when one of them is there already and `overwrite` is not given, or the folder cannot be written.
    """
    folder = Path(folder)
    there = [name for name in names if (folder / name).exists()]
    if there and not overwrite:
        raise ResultError(f"{folder} holds another run ({there[0]}); name another folder or pass --overwrite")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ResultError(f"cannot write to {folder}: {error.strerror}; name another folder") from error
    return folder


def made(folder: str | Path) -> Path:
    """The folder, which is there from now on."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, then put it in its place at once; a failure leaves what stood there."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".partial-", suffix=path.suffix)
    os.close(handle)
    try:
        write(Path(name))
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_frame(path: Path, frame: pd.DataFrame) -> None:
    """A table in Parquet: the same bytes for the same table and version of pyarrow."""
    write_whole(path, lambda p: frame.to_parquet(p, index=False))


def write_json(path: Path, value: Any) -> None:
    """JSON in the order given; what is not finite becomes null."""
    text = json.dumps(jsonable(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(path, lambda p: p.write_text(text, encoding="utf-8"))


def jsonable(value: Any) -> Any:
    """Numbers, strings, lists and dictionaries only; what is not finite becomes None."""
    if hasattr(value, "as_dict"):
        return jsonable(value.as_dict())
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    if isinstance(value, np.generic):
        return jsonable(value.item())
    if isinstance(value, np.ndarray):
        return jsonable(value.tolist())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    if value is None or isinstance(value, (str, int, float)):
        return value
    return str(value)


class Shown:
    """What every kind of result has: a table, a summary, figures, its provenance, and a page of them in a notebook."""

    NAME: ClassVar[str] = ""
    """of its files"""
    NOTE: ClassVar[str] = ""
    """how the numbers of the tables are to be read"""
    provenance: dict[str, Any]

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """A result as the command wrote it. Raises `ResultError` when the folder does not hold one."""
        raise NotImplementedError

    def to_frame(self) -> pd.DataFrame:
        """The tidy table."""
        raise NotImplementedError

    def summary(self) -> pd.DataFrame:
        """Statistics of the table, for a reader."""
        raise NotImplementedError

    def tables(self) -> dict[str, pd.DataFrame]:
        """Short tables for a reader, by title; estimates as text, with their intervals."""
        return {"": self.summary()}

    def table(self) -> str:
        """The summary as text, for a terminal."""
        raise NotImplementedError

    def as_dict(self) -> dict[str, Any]:
        """Summary and provenance, as they stand in the JSON file."""
        raise NotImplementedError

    def plot(self) -> Any:
        """The figure to look at first. Returns a matplotlib Figure."""
        raise NotImplementedError

    def figures(self) -> dict[str, Any]:
        """matplotlib Figures by file name."""
        raise NotImplementedError

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """As IPython shows it where there is no page: the table, not the whole of the frame and of the provenance."""
        printer.text(self.table())

    def _repr_html_(self) -> str:
        from diagnostics.result_html import shown

        return shown(self)


@dataclass(frozen=True)
class Result(Shown):
    """A tidy table, the tokens it speaks of, and how it was made. A diagnostic's result adds statistics and a figure."""

    frame: pd.DataFrame
    """one line a row"""
    tokens: list[list[int]]
    """the prompts, as token ids, that the prompt and position columns refer to"""
    provenance: dict[str, Any]
    """model, text, settings, counts of what was dropped, which path ran and how exact it was"""

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """A result as the command wrote it. Raises `ResultError` when the folder does not hold one."""
        folder = Path(folder)
        if missing := [name for name in result_files(cls) if not (folder / name).is_file()]:
            raise ResultError(f"{folder} holds no {cls.NAME} result: {missing[0]} is missing")
        frame = pd.read_parquet(folder / f"{cls.NAME}.parquet")
        provenance = json.loads((folder / f"{cls.NAME}.json").read_text(encoding="utf-8"))["provenance"]
        return cls(frame, load_tokens(folder / "tokens.npy"), provenance)

    def write(self, folder: str | Path) -> list[str]:
        """Table, tokens, summary with provenance, and figures, into a folder; the names of the files."""
        folder = made(folder)
        write_frame(folder / f"{self.NAME}.parquet", self.frame)
        save_tokens(folder / "tokens.npy", self.tokens)
        write_json(folder / f"{self.NAME}.json", self.as_dict())
        return [*result_files(type(self)), *save_figures(folder, self.figures())]

    def to_frame(self) -> pd.DataFrame:
        """The tidy table: columns that are added to it leave the result as it is."""
        return self.frame.copy(deep=False)

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """Statistics of the table, group by group."""
        raise NotImplementedError

    def as_dict(self) -> dict[str, Any]:
        """Summary and provenance, as they stand in the JSON file."""
        return {"summary": self.groups, "provenance": self.provenance}

    @property
    def points(self) -> list[str]:
        """Where in their blocks activations were edited."""
        return list(dict.fromkeys(Site.parse(site).point for site in self.provenance["sites"]))

    @property
    def null_models(self) -> list[str]:
        """Labels of the untrained networks."""
        return self.provenance["null_models"]


def result_files(kind: type[Result]) -> tuple[str, ...]:
    """The files that every result of a kind has."""
    return (f"{kind.NAME}.parquet", f"{kind.NAME}.json", "tokens.npy")


def save_tokens(path: Path, tokens: list[list[int]]) -> None:
    """Token ids `[prompt, pos]`, right-padded with −1, as .npy."""
    table = np.full((len(tokens), max(map(len, tokens))), -1, dtype=np.int32)
    for row, prompt in zip(table, tokens, strict=True):
        row[: len(prompt)] = prompt
    write_whole(path, lambda p: np.save(p, table))


def load_tokens(path: Path) -> list[list[int]]:
    """What `save_tokens` kept."""
    return [[int(t) for t in row if t >= 0] for row in np.load(path)]


FIGURE_KINDS: dict[str, dict[str, Any]] = {
    "png": {"dpi": 200},
    "svg": {"metadata": {"Date": None}},
    "pdf": {"metadata": {"CreationDate": None}},
}
"""Of files of figures, and how each is saved: without a date, so that the same figure gives the same bytes."""
_FIGURE_FILES: dict[Any, Any] = {
    "pdf.fonttype": 42,
    "svg.hashsalt": "mechdiag",
}  # text stays text in a PDF; ids that do not change


def save_figures(folder: Path, figures: Mapping[str, Any]) -> list[str]:
    """Each figure as PNG (200 dpi), SVG and PDF under its name, laid out once for all three, then closed; the names of the files."""
    names = []
    for name, figure in figures.items():
        figure.set_dpi(FIGURE_KINDS["png"]["dpi"])
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # each draw moves things a little otherwise
        for end, how in FIGURE_KINDS.items():
            with plt.rc_context(_FIGURE_FILES):
                write_whole(folder / f"{name}.{end}", lambda path, figure=figure, how=how: figure.savefig(path, **how))
            names.append(f"{name}.{end}")
        plt.close(figure)
    return names


def model_provenance(model: CausalModel) -> dict[str, Any]:
    """What a reader must know of the model and the machine to make the numbers again."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "model": model.name,
        "model_note": model.note,
        "wrapper": model.wrapper,
        "weights_sha256": model.weights_hash,
        "norm": model.norm_kind,
        "n_layers": model.n_layers,
        "d_model": model.d_model,
        "vocab": model.vocab_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
    }

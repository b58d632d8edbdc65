"""Results on disk: a tidy table in Parquet beside its provenance in JSON, the files of one result together or not at all."""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pandas as pd
from typing_extensions import Self

from diagnostics.figures.by_depth import DepthPlan, DepthPoint
from diagnostics.figures.files import save_figures
from diagnostics.results.headlines import Headline
from diagnostics.results.narrow import text_table
from diagnostics.results.stored import DIGESTS, Stored, digest, document_digest, save_tokens
from diagnostics.results.words import counted, left_out, wrapped
from diagnostics.statistics.tables import with_ends
from interventions.errors import ResultError, count
from interventions.files import PARTIAL, json_text, jsonable, made, read_json, remove_partial, write_frame, writing
from interventions.sites import Site


class BaseResult:
    """Base class of all results: a table, a summary, figures, provenance, and a page of them in a notebook."""

    NAME: ClassVar[str] = ""
    """name of its files"""
    TITLE: ClassVar[str] = ""
    """title on pages"""
    QUESTION: ClassVar[str] = ""
    """the question it answers, in one line"""
    NOTE: ClassVar[str] = ""
    """how to read the tables"""
    TABLES: ClassVar[Mapping[str, str]] = {}
    """Parquet files of further tables, by attribute"""
    DEPTH: ClassVar[Mapping[str, DepthPlan]] = {}
    """figures by depth, by name"""
    NULL_MODELS: ClassVar[bool] = False
    """whether randomly initialised models can be measured too"""
    CALL: ClassVar[str] = ""
    """the function of `diagnostics` that computes it from results of the class `FORMED_OF`"""
    FORMED_OF: ClassVar[str] = ""
    frame: pd.DataFrame
    provenance: dict[str, Any]

    @classmethod
    def files(cls) -> tuple[str, ...]:
        """Names of the files of a result of this class."""
        return (f"{cls.NAME}.parquet", f"{cls.NAME}.json", *cls.TABLES.values())

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a result from its folder.

        Raises `ResultError` where files are missing, damaged or do not belong together (see `stored`).
        """
        stored = Stored(folder, cls.NAME, cls.files())
        with stored.understood():
            return cls.read(stored)

    @classmethod
    def read(cls, stored: Stored) -> Self:
        """Build a result from its files."""
        return cls(**cls._stored(stored))

    @classmethod
    def _stored(cls, stored: Stored) -> dict[str, Any]:
        """The fields of a result, by name."""
        more = {name: stored.table(file) for name, file in cls.TABLES.items()}
        return {"frame": stored.table(), "provenance": stored.provenance, **more}

    def parts(self) -> dict[str, pd.DataFrame | list[list[int]]]:
        """Tables and token ids by the names of their files."""
        return {file: getattr(self, name) for name, file in self.TABLES.items()} | {f"{self.NAME}.parquet": self.frame}

    def write(self, folder: str | Path, *, overwrite: bool = True) -> list[str]:
        """Write tables, tokens, figures, and a JSON of summary, provenance and digests into a folder; returns the names of the files.

        Files are written to a temporary folder and then moved, tables before the JSON: a failure leaves the old result, and a killed
        process leaves no folder that loads as a result. overwrite: False refuses to replace a result with other tables, tokens or
        summary, and figures of others. Raises `ResultError` for that, and for errors of the file system.
        """
        with _placed(made(folder), f"{self.NAME}.json", overwrite) as aside:
            digests = {}
            for name, part in self.parts().items():
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                (write_frame if isinstance(part, pd.DataFrame) else save_tokens)(aside / name, part)  # type: ignore[arg-type]
                digests[name] = digest((aside / name).read_bytes())
            figures = save_figures(aside, self.figures())
            document = jsonable(self.as_dict() | {"figures": figures})
            document[DIGESTS] = {f"{self.NAME}.json": document_digest(document), **digests}
            (aside / f"{self.NAME}.json").write_text(json_text(document), encoding="utf-8")
        return [*self.files(), *figures]

    def to_frame(self) -> pd.DataFrame:
        """A copy of the tidy table."""
        return self.frame.copy(deep=False)

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """Statistics of the table, group by group, as they stand in the JSON file."""
        raise NotImplementedError

    @property
    def defaults(self) -> dict[str, Any]:
        """Values that `select` asks for unless others are named."""
        return {}

    def select(self, **values: Any) -> list[dict[str, Any]]:
        """The groups with these values, such as `select(layer=15, context="single_token")`; `defaults` apply to other names.

        Raises `ResultError` for a name that groups do not have.
        """
        wanted = self.defaults | {name: value for name, value in values.items() if value is not None}
        known = next(iter(self.groups), wanted)
        if unknown := [name for name in wanted if name not in known]:
            raise ResultError(f"groups have no {unknown[0]!r}; known: {', '.join(known)}")
        return [g for g in self.groups if all(g[name] == value for name, value in wanted.items())]

    def summary(self) -> pd.DataFrame:
        """A line for each of `groups`; each estimate x as `x`, `x_low`, `x_high`."""
        return pd.DataFrame([with_ends(group) for group in self.groups])

    def tables(self) -> dict[str, pd.DataFrame]:
        """Short tables for a reader, by title; estimates with their intervals in one cell."""
        return {"": pd.DataFrame(self.groups)}

    def left_out(self) -> list[str]:
        """Dropped rows and fallbacks; a line each."""
        return left_out(self)

    def finding(self) -> str:
        """The first of the `headlines` as a sentence: a number beside its control."""
        first = next(iter(self.headlines()), None)
        return first.sentence if first else f"{self.TITLE or self.NAME}: nothing was measured that gives a number."

    def table(self) -> str:
        """The finding, the tables as text of 100 columns, how to read them and what was left out, for a terminal."""
        parts = [wrapped(self.finding()), ""]
        for title, some in self.tables().items():
            parts += [wrapped(f"{title}:")] * bool(title)
            parts += [text_table(some), ""]
        return "\n".join([*parts, *map(wrapped, filter(None, [" ".join(self.NOTE.split()), *self.left_out()]))])

    def as_dict(self) -> dict[str, Any]:
        """Summary and provenance, as they stand in the JSON file."""
        return {"summary": self.groups, "provenance": self.provenance}

    def headlines(self) -> Iterable[Headline]:
        """The main numbers: those of the middle block, or a line for each SAE."""
        return ()

    def depth_points(self, figure: str) -> list[DepthPoint]:
        """The points of one of the figures by depth in `DEPTH`."""
        return list(self.DEPTH[figure].points(self.groups, self.provenance))

    def counted_in(self) -> Any:
        """The estimates whose numbers of prompts are checked for caveats."""
        return self.groups

    def own_caveats(self) -> list[str]:
        """Caveats of this class, beside those of all results (`caveats.caveats`)."""
        return []

    def plot(self) -> Any:
        """The figure to look at first. Returns a matplotlib Figure."""
        raise NotImplementedError

    def figures(self) -> dict[str, Any]:
        """matplotlib Figures by file name."""
        return {self.NAME: self.plot()}

    def __init_subclass__(cls, **how: Any) -> None:
        super().__init_subclass__(**how)
        cls.__repr__ = (
            BaseResult.__repr__
        )  # a class's own is not replaced by that of `dataclass`, which prints every field

    def __repr__(self) -> str:
        """One line: `DirectionNorm(smollm2-135m, 3 sites, 4,000 rows, 200 prompts)`."""
        return f"{type(self).__name__}({', '.join([*counted(self), count(len(self.frame), 'row')])})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """The table, where IPython shows text."""
        printer.text(self.table())

    def _repr_html_(self) -> str:
        from diagnostics.results.page import shown

        return shown(self)


@dataclass(frozen=True)
class Result(BaseResult):
    """A tidy table, its prompts as token ids, and its provenance. Each diagnostic's result adds statistics and figures."""

    frame: pd.DataFrame
    """one line a row"""
    tokens: list[list[int]]
    """the prompts as token ids, which the columns prompt and position refer to"""
    provenance: dict[str, Any]
    """model, text, settings, counts of dropped rows, the path that ran and its accuracy"""

    @classmethod
    def files(cls) -> tuple[str, ...]:
        """Names of the files of a result of this class."""
        return (f"{cls.NAME}.parquet", f"{cls.NAME}.json", "tokens.npy", *cls.TABLES.values())

    @classmethod
    def _stored(cls, stored: Stored) -> dict[str, Any]:
        """The fields of a result. Raises `ResultError` where the table does not have the number of rows in the JSON."""
        found, rows = super()._stored(stored), stored.provenance.get("rows")
        if isinstance(rows, int) and rows != len(found["frame"]):
            n = len(found["frame"])
            raise stored.damaged(f"{cls.NAME}.parquet", f"it holds {n} rows, {cls.NAME}.json says {rows}")
        return found | {"tokens": stored.tokens()}

    def parts(self) -> dict[str, pd.DataFrame | list[list[int]]]:
        """Tables and token ids by the names of their files."""
        return super().parts() | {"tokens.npy": self.tokens}

    @property
    def points(self) -> list[str]:
        """Points within blocks at which activations were edited."""
        return list(dict.fromkeys(Site.parse(site).point for site in self.provenance["sites"]))

    @property
    def saes(self) -> list[str]:
        """Names of the SAEs (and sets of directions), in the order in which they were given."""
        return list(self.provenance["saes"])

    @property
    def null_models(self) -> list[str]:
        """Labels of the randomly initialised models."""
        return self.provenance["null_models"]


def result_files(kind: type[BaseResult]) -> tuple[str, ...]:
    """The files that every result of a kind has."""
    return kind.files()


@contextlib.contextmanager
def _placed(folder: Path, document: str, overwrite: bool) -> Iterator[Path]:
    """A temporary folder, whose files are moved into `folder` when the block ends, `document` last."""
    remove_partial(folder)
    aside = folder / f"{PARTIAL}{secrets.token_hex(8)}"
    try:
        with writing(f"the result into {folder}"):
            aside.mkdir()
            yield aside
            new, there = read_json(aside / document), _stated(folder / document)
            known = _files(there, document)
            if not overwrite:
                others = [document] if there is not None and not _same(there, new) else []
                others += [name for name in new["figures"] if name not in known and os.path.lexists(folder / name)]
                if others:
                    raise ResultError(
                        f"{folder} holds another result ({others[0]}); name another folder or pass --overwrite"
                    )
            _take_places(aside, folder, document, new["figures"], gone=known - _files(new, document))
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _stated(path: Path) -> Any:
    """The JSON of an existing result: None without one, an empty object where it cannot be read."""
    if not os.path.lexists(path):
        return None
    try:
        found = read_json(path)
    except ResultError:
        return {}
    return found if isinstance(found, dict) else {}


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two results have the same tables, tokens and summary."""
    digests = [p.get(DIGESTS) for p in (one, other)]
    data = [{n: d for n, d in known.items() if not n.endswith(".json")} for known in digests if isinstance(known, dict)]
    return len(data) == 2 and data[0] == data[1] and one.get("summary") == other.get("summary")


_OWN = re.compile(r"([\w-][^/\\\0]*/){0,2}[\w-][^/\\\0]*\.(parquet|npy|png|svg|pdf)")
"""Names that a result's own files may have: none outside of its folder, whatever a JSON says."""


def _files(document: dict[str, Any] | None, own: str) -> set[str]:
    """Data files and figures that a result's JSON lists; none where the JSON was changed."""
    known = (document or {}).get(DIGESTS)
    if not document or not isinstance(known, dict) or known.get(own) != document_digest(document):
        return set()
    named = [name for name in (*known, *document.get("figures", ())) if isinstance(name, str)]
    return {name for name in named if _OWN.fullmatch(name)} - {own}


def _take_places(aside: Path, folder: Path, document: str, figures: list[str], gone: set[str]) -> None:
    """Move tables, then the document, then figures. Without the document a folder is no result."""
    (folder / document).unlink(missing_ok=True)
    for name in gone:
        (folder / name).unlink(missing_ok=True)
    for path in sorted(aside.iterdir(), key=lambda path: (path.name in figures, path.name == document, path.name)):
        if not path.is_dir():
            os.replace(path, folder / path.name)
            continue
        parts = {part.relative_to(aside) for part in path.rglob("*.parquet")}
        for old in {old.relative_to(folder) for old in (folder / path.name).rglob("*.parquet")} - parts:
            (folder / old).unlink()
        for part in parts:
            (folder / part).parent.mkdir(parents=True, exist_ok=True)
            os.replace(aside / part, folder / part)


R = TypeVar("R", bound=BaseResult)


def tables_of(result: BaseResult) -> object:
    """The tables of a result, for `load_result`."""
    return result.tables()


def load_result(kind: type[R], folder: str | Path, use: Callable[[R], object] = tables_of) -> R:
    """`kind.load`; a result without digests (see `stored`) is also tested with `use`. Raises `MechdiagError`."""
    found = kind.load(folder)
    stored = Stored(folder, kind.NAME, kind.files())
    if stored.digests is None:
        with stored.understood():
            use(found)
    return found

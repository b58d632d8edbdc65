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
from diagnostics.results.stored import DIGESTS, Stored, digest, document_digest, save_tokens
from diagnostics.results.words import left_out
from diagnostics.statistics.tables import with_ends
from interventions.errors import ResultError
from interventions.files import PARTIAL, json_text, jsonable, made, read_json, remove_partial, write_frame, writing
from interventions.sites import Site


class BaseResult:
    """Base class of all results: a table, a summary, figures, provenance, and a page of them in a notebook."""

    NAME: ClassVar[str] = ""
    """of its files"""
    TITLE: ClassVar[str] = ""
    """what its question is called"""
    QUESTION: ClassVar[str] = ""
    """the question, in a line"""
    NOTE: ClassVar[str] = ""
    """how the numbers of the tables are to be read"""
    TABLES: ClassVar[Mapping[str, str]] = {}
    """further tables: their files in Parquet, by attribute"""
    DEPTH: ClassVar[Mapping[str, DepthPlan]] = {}
    """the figures by depth that show it, by name"""
    NULL_MODELS: ClassVar[bool] = False
    """whether untrained networks can be measured beside the model"""
    CALL: ClassVar[str] = ""
    """the function of `diagnostics` that forms it of results of the kind `FORMED_OF`"""
    FORMED_OF: ClassVar[str] = ""
    frame: pd.DataFrame
    provenance: dict[str, Any]

    @classmethod
    def files(cls) -> tuple[str, ...]:
        """What every result of this kind has in its folder."""
        return (f"{cls.NAME}.parquet", f"{cls.NAME}.json", *cls.TABLES.values())

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """A result as the command wrote it.

        Raises `ResultError` when the folder does not hold one, or files of it are damaged or do not belong together (see `stored`).
        """
        stored = Stored(folder, cls.NAME, cls.files())
        with stored.understood():
            return cls.read(stored)

    @classmethod
    def read(cls, stored: Stored) -> Self:
        """A result formed of its files."""
        return cls(**cls._stored(stored))

    @classmethod
    def _stored(cls, stored: Stored) -> dict[str, Any]:
        """What a result is made of, by the names of its fields."""
        more = {name: stored.table(file) for name, file in cls.TABLES.items()}
        return {"frame": stored.table(), "provenance": stored.provenance, **more}

    def parts(self) -> dict[str, pd.DataFrame | list[list[int]]]:
        """Tables and token ids by the names of their files."""
        return {file: getattr(self, name) for name, file in self.TABLES.items()} | {f"{self.NAME}.parquet": self.frame}

    def write(self, folder: str | Path, *, overwrite: bool = True) -> list[str]:
        """Tables, tokens, figures, and summary with provenance and digests, into a folder; the names of the files.

        All are written aside first and then put in their places, tables before the JSON: a failure leaves what stood there, and tables
        that a killed process leaves are no result. overwrite: False refuses to replace a result of this kind with other tables, tokens or
        summary, and figures that it did not draw. Raises `ResultError` for that, and where the system does not let files be written.
        """
        with _placed(made(folder), f"{self.NAME}.json", overwrite) as aside:
            digests = {}
            for name, part in self.parts().items():
                (aside / name).parent.mkdir(exist_ok=True)
                (write_frame if isinstance(part, pd.DataFrame) else save_tokens)(aside / name, part)  # type: ignore[arg-type]
                digests[name] = digest((aside / name).read_bytes())
            figures = save_figures(aside, self.figures())
            document = jsonable(self.as_dict() | {"figures": figures})
            document[DIGESTS] = {f"{self.NAME}.json": document_digest(document), **digests}
            (aside / f"{self.NAME}.json").write_text(json_text(document), encoding="utf-8")
        return [*self.files(), *figures]

    def to_frame(self) -> pd.DataFrame:
        """The tidy table: columns that are added to it leave the result as it is."""
        return self.frame.copy(deep=False)

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """Statistics of the table, group by group, as they stand in the JSON file."""
        raise NotImplementedError

    @property
    def defaults(self) -> dict[str, Any]:
        """What `select` looks for in columns that are not named."""
        return {}

    def select(self, **values: Any) -> list[dict[str, Any]]:
        """The groups that have these values: `select(layer=15, context="single_token")`; of what is not named, those of `defaults`.

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
        """What is missing, and what was used in place of the fast path; a line each."""
        return left_out(self)

    def table(self) -> str:
        """The tables as text, for a terminal, with how to read them and what was left out."""
        parts = []
        for title, some in self.tables().items():
            parts += [f"{title}:"] * bool(title)
            parts.append("none" if some.empty else some.to_string(index=False, float_format="{:.3g}".format, na_rep=""))
        return "\n".join([*parts, *filter(None, [self.NOTE]), *self.left_out()])

    def as_dict(self) -> dict[str, Any]:
        """Summary and provenance, as they stand in the JSON file."""
        return {"summary": self.groups, "provenance": self.provenance}

    def headlines(self) -> Iterable[Headline]:
        """The numbers to look at first. Of results by depth those of the middle block, of several SAEs a line for each."""
        return ()

    def depth_points(self, figure: str) -> list[DepthPoint]:
        """The points of one of the figures by depth in `DEPTH`."""
        return list(self.DEPTH[figure].points(self.groups, self.provenance))

    def counted_in(self) -> Any:
        """Where the numbers of prompts behind its estimates stand."""
        return self.groups

    def own_caveats(self) -> list[str]:
        """What a reader must know of this kind of result, beside what every kind has (`caveats.caveats`)."""
        return []

    def plot(self) -> Any:
        """The figure to look at first. Returns a matplotlib Figure."""
        raise NotImplementedError

    def figures(self) -> dict[str, Any]:
        """matplotlib Figures by file name."""
        return {self.NAME: self.plot()}

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """As IPython shows it where there is no page: the table, not the whole of the frame and of the provenance."""
        printer.text(self.table())

    def _repr_html_(self) -> str:
        from diagnostics.results.page import shown

        return shown(self)


@dataclass(frozen=True)
class Result(BaseResult):
    """A tidy table, the tokens it speaks of, and how it was made. A diagnostic's result adds statistics and a figure."""

    frame: pd.DataFrame
    """one line a row"""
    tokens: list[list[int]]
    """the prompts, as token ids, that the prompt and position columns refer to"""
    provenance: dict[str, Any]
    """model, text, settings, counts of what was dropped, which path ran and how exact it was"""

    @classmethod
    def files(cls) -> tuple[str, ...]:
        """What every result of this kind has in its folder."""
        return (f"{cls.NAME}.parquet", f"{cls.NAME}.json", "tokens.npy", *cls.TABLES.values())

    @classmethod
    def _stored(cls, stored: Stored) -> dict[str, Any]:
        """What a result is made of. Raises `ResultError` where the table has not the rows that its JSON states."""
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
        """Where in their blocks activations were edited."""
        return list(dict.fromkeys(Site.parse(site).point for site in self.provenance["sites"]))

    @property
    def saes(self) -> list[str]:
        """Names of the SAEs (and sets of directions), in the order in which they were given."""
        return list(self.provenance["saes"])

    @property
    def null_models(self) -> list[str]:
        """Labels of the untrained networks."""
        return self.provenance["null_models"]


def result_files(kind: type[BaseResult]) -> tuple[str, ...]:
    """The files that every result of a kind has."""
    return kind.files()


@contextlib.contextmanager
def _placed(folder: Path, document: str, overwrite: bool) -> Iterator[Path]:
    """A folder aside, whose files take their places in `folder` as the block ends, `document` last."""
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
    """The JSON of the result that is there: None without one, an empty object where it cannot be read."""
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


_OWN = re.compile(r"([\w-][^/\\\0]*/)?[\w-][^/\\\0]*\.(parquet|npy|png|svg|pdf)")
"""Files that can be a result's own: none outside of its folder, whatever a JSON says."""


def _files(document: dict[str, Any] | None, own: str) -> set[str]:
    """Data files and figures that a result's JSON names; none where the JSON is not as it was written."""
    known = (document or {}).get(DIGESTS)
    if not document or not isinstance(known, dict) or known.get(own) != document_digest(document):
        return set()
    named = [name for name in (*known, *document.get("figures", ())) if isinstance(name, str)]
    return {name for name in named if _OWN.fullmatch(name)} - {own}


def _take_places(aside: Path, folder: Path, document: str, figures: list[str], gone: set[str]) -> None:
    """Move tables, then the document, then figures. Until the document is there, what lies there is no result."""
    (folder / document).unlink(missing_ok=True)
    for name in gone:
        (folder / name).unlink(missing_ok=True)
    for path in sorted(aside.iterdir(), key=lambda path: (path.name in figures, path.name == document, path.name)):
        if not path.is_dir():
            os.replace(path, folder / path.name)
            continue
        (folder / path.name).mkdir(exist_ok=True)
        for old in {old.name for old in (folder / path.name).glob("*.parquet")} - {new.name for new in path.iterdir()}:
            (folder / path.name / old).unlink()
        for part in path.iterdir():
            os.replace(part, folder / path.name / part.name)


R = TypeVar("R", bound=BaseResult)


def tables_of(result: BaseResult) -> object:
    """The tables of a result, which need most of what it holds."""
    return result.tables()


def load_result(kind: type[R], folder: str | Path, use: Callable[[R], object] = tables_of) -> R:
    """`kind.load`, for those who use the result. Raises `MechdiagError`.

    A result without digests (see `stored`) is used once on trial: one that lacks what its kind holds is damaged.
    """
    found = kind.load(folder)
    stored = Stored(folder, kind.NAME, kind.files())
    if stored.digests is None:
        with stored.understood():
            use(found)
    return found

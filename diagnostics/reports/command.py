"""Results of any of the commands as one page: figures, tables, what to know before believing them, how to make them again."""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from diagnostics.commands import command
from diagnostics.commands.inputs import short_names
from diagnostics.results.result import BaseResult
from diagnostics.saved import sound_and_damaged, unfinished
from interventions.errors import ResultError
from interventions.files import read_json, write_whole


@dataclass(frozen=True, kw_only=True)
class ReportOptions(command.Spoken):
    """What did these runs find, and what must a reader know before believing it?

    Takes folders of results, with every result below them, and writes one HTML page that needs no network and no other file: the
    numbers to look at first beside their nulls, each result's question, figures and sortable tables, warnings (full forward passes,
    dropped rows, noise floors, few prompts, different code or weights), settings, and how to make each result again.

    Example: scripts/report.py results --out report.html
    """

    results: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """folders of results; those below them count too"""
    out: Path = Path("report.html")
    """the page"""
    title: str = "Results"
    """of the page"""
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """replace a page that is there"""


def main(settings: ReportOptions) -> command.Document:
    """Everything that can be wrong with the input is looked at before a figure is drawn."""
    from diagnostics.reports.page import report

    if os.path.lexists(settings.out) and not settings.overwrite:
        raise ResultError(f"{settings.out} is there already; name another file or pass --overwrite")
    if not os.path.isdir(settings.out.absolute().parent):
        raise ResultError(f"no folder {settings.out.parent}; expected one to write {settings.out.name} into")
    results, code, begun, damaged = _found(settings.results)
    for name, why in damaged.items():
        warnings.warn(f"{name} is left out: {why}", stacklevel=1)
    page = report(results, title=settings.title, unfinished=begun, damaged=damaged, code=code)
    write_whole(settings.out, lambda path: path.write_text(page, encoding="utf-8"))
    settings.say(
        f"wrote {len(results)} result{'s' * (len(results) > 1)} into {settings.out} ({len(page) / 1e6:.1f} MB)"
    )
    return {
        "out": str(settings.out),
        "results": {name: result.NAME for name, result in results.items()},
        "unfinished": begun,
        "damaged": damaged,
    }


def _found(folders: tuple[Path, ...]) -> tuple[dict[str, BaseResult], dict[str, str], list[str], dict[str, str]]:
    """Results, versions of their code, unfinished runs, and damaged results, by name; of several folders names begin with the folder's.

    Raises `ResultError` where no result is left.
    """
    from diagnostics.reports.page import report

    if not folders:
        raise ResultError("no folder; name at least one that holds results")
    results: dict[str, BaseResult] = {}
    code: dict[str, str] = {}
    begun: list[str] = []
    broken: dict[str, str] = {}
    for folder, short in zip(folders, short_names(tuple(map(str, folders))), strict=True):
        own = folder.resolve().name
        sound, damaged = sound_and_damaged(folder, lambda result: report({"": result}))
        for name, result in sound.items():
            alone = name == own or name == f"{own}/{result.NAME}"
            called = name if len(folders) == 1 else short if alone else f"{short}/{name}"
            results[called] = result
            place = folder if alone else folder / name.removesuffix(f"/{result.NAME}")
            if os.path.isfile(place / "run.json"):
                code[called] = _code(place / "run.json")
        broken |= {name if len(folders) == 1 else f"{short}/{name}": why for name, why in damaged.items()}
        begun += [name if len(folders) == 1 else f"{short}/{name}" for name in unfinished(folder)]
    if not results:
        raise ResultError("; ".join(broken.values()))
    return results, code, begun, broken


def _code(stated: Path) -> str:
    """The version of the code that a run.json states."""
    try:
        there = read_json(stated)
    except ResultError:
        return "unknown"
    return str(there.get("code", "unknown")) if isinstance(there, dict) else "unknown"


def run() -> None:
    """The command line of `scripts/report.py`."""
    command.run(ReportOptions, main)

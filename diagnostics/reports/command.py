"""Results of any of the commands as one page: figures, tables, caveats, and how to reproduce them."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from diagnostics.commands import command
from diagnostics.commands.inputs import short_names
from interventions.errors import ResultError

if TYPE_CHECKING:
    from diagnostics.results.result import BaseResult


@dataclass(frozen=True, kw_only=True)
class ReportOptions(command.CommonOptions):
    """What did these runs find, and what are the caveats?

    Takes folders of results, with every result below them, and writes one HTML page that needs no network and no other file: the
    numbers to look at first beside their nulls, each result's question, figures and sortable tables, warnings (full forward passes,
    dropped rows, noise floors, few prompts, different code or weights), options, and how to make each result again.

    With --latents the page is of one whole-dictionary run: its latents in a table to sort and filter, and a card of each.

    Examples:
      scripts/report.py results --out report.html
      scripts/report.py --latents results/dictionary --out latents.html
    """

    results: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """folders of results, searched with their subfolders"""
    latents: Path | None = None
    """in place of results: folder of mechdiag atlas --all-latents"""
    out: Path = Path("report.html")
    """the page"""
    title: str | None = None
    """of the page (default: Results, or Latents)"""
    overwrite: bool = False
    """replace an existing page"""


def main(options: ReportOptions) -> command.Document:
    """Run the command."""
    if options.latents is not None and options.results:
        raise ResultError("--latents makes a page of its own; name no other folder of results")
    if os.path.lexists(options.out) and not options.overwrite:
        raise ResultError(f"{options.out} already exists; name another file or pass --overwrite")
    if not os.path.isdir(options.out.absolute().parent):
        raise ResultError(f"no folder {options.out.parent} to write {options.out.name} into; make it, or name another")
    return _latents(options, options.latents) if options.latents is not None else _results(options)


def _latents(options: ReportOptions, folder: Path) -> command.Document:
    from diagnostics.reports.latents import latents_page

    page, n = latents_page(folder, title=options.title or "Latents")
    _write(options, page, f"{n:,} latents")
    return {"out": str(options.out), "latents": n}


def _write(options: ReportOptions, page: str, what: str) -> None:
    from interventions.files import write_whole

    write_whole(options.out, lambda path: path.write_text(page, encoding="utf-8"))
    options.say(f"wrote {what} into {options.out} ({len(page.encode()) / 1e6:.1f} MB)")


def _results(options: ReportOptions) -> command.Document:
    from diagnostics.reports.page import report

    results, code, begun, damaged = _found(options.results)
    for name, why in damaged.items():
        warnings.warn(f"{name} is left out: {why}", stacklevel=1)
    page = report(results, title=options.title or "Results", unfinished=begun, damaged=damaged, code=code)
    _write(options, page, f"{len(results)} result{'s' * (len(results) > 1)}")
    return {
        "out": str(options.out),
        "results": {name: result.NAME for name, result in results.items()},
        "unfinished": begun,
        "damaged": damaged,
    }


def _found(folders: tuple[Path, ...]) -> tuple[dict[str, BaseResult], dict[str, str], list[str], dict[str, str]]:
    """Results, versions of their code, unfinished runs, and damaged results, by name; with several folders each name begins with its folder's.

    Raises `ResultError` if no sound result is found.
    """
    from diagnostics.reports.page import report
    from diagnostics.saved import sound_and_damaged, unfinished

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
    from interventions.files import read_json

    try:
        there = read_json(stated)
    except ResultError:
        return "unknown"
    return str(there.get("code", "unknown")) if isinstance(there, dict) else "unknown"


def run() -> None:
    """The command line of `scripts/report.py`."""
    command.run(ReportOptions, main)

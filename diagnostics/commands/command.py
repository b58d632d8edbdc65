"""What every command shares: what it says and where, errors on one line and exit 2, interruption and exit 130 or 143."""

import contextlib
import io
import json
import re
import signal
import sys
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Protocol, TypeVar

import tyro
from transformers.utils import logging as loading

from diagnostics.commands.options import parsed
from diagnostics.results.result import BaseResult
from diagnostics.results.words import provenances
from diagnostics.running.units import Interrupted, unlocked
from interventions.errors import MechdiagError
from interventions.files import jsonable
from interventions.progress import followed

Settings = TypeVar("Settings")
Document = dict[str, Any]
_NOT_THE_RESULT = ("--overwrite", "--no-lock", "--json", "--quiet")


class Finding(Protocol):
    """What a diagnostic found: all results are this."""

    def table(self) -> str: ...

    def as_dict(self) -> Document: ...

    def write(self, folder: Path, *, overwrite: bool = True) -> list[str]: ...


@dataclass(frozen=True, kw_only=True)
class Spoken:
    """Options of every command: what it says."""

    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """print one JSON document on stdout in place of tables: summary, provenance, files"""
    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """print no table and no progress bar, only errors and warnings"""

    def say(self, text: str) -> None:
        """A table or a line for people: on stdout, and not at all with --json or --quiet."""
        if not (self.json or self.quiet):
            print("\n".join(map(printable, text.split("\n"))), flush=True)

    def progress(self, what: str, unit: str = "row") -> AbstractContextManager[Callable[..., object] | None]:
        """A progress bar on stderr, for `progress=` of a diagnostic; none with --quiet."""
        return followed(not self.quiet, what, unit)


@dataclass(frozen=True, kw_only=True)
class Output(Spoken):
    """Options of every command that writes results into a folder."""

    out: Path
    """folder for the results"""
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """replace the results of another run in --out"""

    def finish(self, result: Finding, folder: Path) -> Document:
        """Show the result's table, write its files, and say which; the document that `main` returns for --json.

        Raises `ResultError` where another result is there and --overwrite is not given.
        """
        for run in provenances(result).values() if isinstance(result, BaseResult) else ():
            run.setdefault("command", typed(sys.argv))
        try:
            files = result.write(folder, overwrite=self.overwrite)
        finally:  # after the files, which an error in a table must not cost
            self.say(result.table())
        self.say(f"wrote {', '.join(files)} into {folder}")
        return {**result.as_dict(), "out": str(folder), "files": files}


@dataclass(frozen=True, kw_only=True)
class Resumable(Output):
    """Options of every command that goes on where it was interrupted."""

    out: Path
    """folder for the results and for finished units of work: the same command goes on where it was interrupted"""
    no_lock: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """do not lock --out, for file systems without locks; then no other process may work in it"""


_IMPATIENCE = 1.0  # seconds after a signal in which another one is the same wish, not a new one


def run(settings: type[Settings], main: Callable[[Settings], Document | None]) -> None:
    """Parse the command line into `settings` and call `main`; its docstring is the help text.

    With --json, stdout holds the document that `main` returns and nothing else: what anything prints meanwhile goes to stderr.

    Exit 0 when done, 2 for input that does not serve (one line on stderr, no traceback), 130 when interrupted (SIGINT,
    Ctrl-C), 143 when told to end (SIGTERM); one line says what is kept of a sweep. 1 with a traceback is our mistake.
    """
    with _stoppable() as signals:
        try:
            given = _parsed(settings)
            warnings.showwarning = _warning_line
            with _spoken(given):
                document = main(given)
            if getattr(given, "json", False):
                print(json.dumps(jsonable(document), indent=1, ensure_ascii=False, allow_nan=False))
        except MechdiagError as error:
            print(f"error: {terminal_line(error)}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt as stopped:
            print(terminal_line(stopped) if isinstance(stopped, Interrupted) else "interrupted", file=sys.stderr)
            raise SystemExit(128 + (signals[0] if signals else signal.SIGINT)) from None


@contextlib.contextmanager
def _spoken(given: object) -> Iterator[None]:
    """With --json whatever is printed goes to stderr; with --quiet models load without a bar; with --no-lock folders stay unlocked."""
    with contextlib.ExitStack() as stack:
        if getattr(given, "no_lock", False):
            stack.enter_context(unlocked())
        if getattr(given, "json", False):
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        if getattr(given, "quiet", False) and loading.is_progress_bar_enabled():
            loading.disable_progress_bar()
            stack.callback(loading.enable_progress_bar)
        yield


@contextlib.contextmanager
def _stoppable() -> Iterator[list[int]]:
    """SIGINT and SIGTERM raise KeyboardInterrupt, and the list says which came first.

    Not again within a second of the last one: the first is being answered, and whoever presses Ctrl-C twice wants no
    traceback from the answer. A signal that our parent had us ignore (nohup, a background job) stays ignored.
    """
    came: list[int] = []
    last = float("-inf")

    def stop(number: int, _: FrameType | None) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        came.append(number)
        if last - before > _IMPATIENCE:
            raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    heeded = [number for number in before if before[number] is not signal.SIG_IGN]
    for number in heeded:
        signal.signal(number, stop)
    try:
        yield came
    finally:
        for number in heeded:
            signal.signal(number, before[number])


def _parsed(settings: type[Settings]) -> Settings:
    """The command line as settings; what the parser says in a box over several lines becomes one."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parsed(settings)
    except SystemExit as ended:
        if ended.code != 2:
            raise
        plain = re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯]", " ", said.getvalue())
        parts = [words.rstrip(".") for part in re.split(r"[─-]{5,}", plain) if (words := " ".join(part.split()))]
        told = parts[1:-1]  # without the box's title, and how to get help, which is said shorter
        raise MechdiagError(f"{'; '.join(told)}; see {sys.argv[0]} --help") from None


def _warning_line(message: Warning | str, category: type[Warning], *_: object) -> None:
    print(f"warning: {terminal_line(message)}", file=sys.stderr)


def typed(words: Sequence[str]) -> list[str]:
    """A command line as provenance keeps it: without where its files go and what it says meanwhile, which change no result."""
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "--out":
            next(rest, None)
        elif not word.startswith("--out=") and word not in _NOT_THE_RESULT:
            kept.append(word)
    return kept


def terminal_line(said: object) -> str:
    """What is said as one line that a terminal shows and does not obey."""
    return printable(" ".join(str(said).split()))


def printable(line: str) -> str:
    """A line whose control characters, and those that turn the direction of text, are written out: `\\x1b`."""
    return "".join(c.encode("unicode_escape").decode() if _controls(c) else c for c in line.expandtabs())


def _controls(c: str) -> bool:
    return (
        unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in "\u200c\u200d"
    )  # which join letters and emoji

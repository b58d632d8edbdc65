"""Shared by all commands: what they print, errors on one line with exit code 2, interruption with exit code 130 or 143."""

import contextlib
import difflib
import io
import json
import os
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
from typing import Any, Protocol

from diagnostics.commands.options import Options, option_names, parsed
from diagnostics.commands.ranges import PositiveInt
from diagnostics.results.words import wrapped
from diagnostics.running.ends import Interrupted, PartDone
from interventions.errors import MechdiagError, ResultError

Document = dict[str, Any]
_NOT_THE_RESULT = ("--overwrite", "--no-lock", "--mixed", "--json", "--quiet")
_NOR_WITH_VALUE = ("--out", "--workers", "--ray", "--part")


class Finding(Protocol):
    """What a diagnostic returns: every result has these."""

    def table(self) -> str: ...

    def as_dict(self) -> Document: ...

    def write(self, folder: Path, *, overwrite: bool = True) -> list[str]: ...


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """Options of every command."""

    json: bool = False
    """print one JSON document on stdout in place of tables: summary, provenance, files"""
    quiet: bool = False
    """print errors and warnings only: no table, no progress bar"""

    def say(self, text: str) -> None:
        """Print a table or a line on stdout, unless --json or --quiet is given."""
        if not (self.json or self.quiet):
            try:
                print("\n".join(map(printable, wrapped(text).split("\n"))), flush=True)
            except BrokenPipeError:  # nobody reads on (`| head`): the run goes on
                _close_stdout()

    def progress(self, what: str, unit: str = "row") -> AbstractContextManager[Callable[..., object] | None]:
        """A progress bar on stderr, for `progress=` of a diagnostic; none with --quiet."""
        from interventions.progress import followed

        return followed(not self.quiet, what, unit)

    def named(self, *names: str) -> dict[str, Any]:
        """Options by name, as keyword arguments of a diagnostic. `sink_filter` 0 becomes None (no filter)."""
        given = {name: getattr(self, name) for name in names}
        return given | {"sink_filter": given["sink_filter"] or None} if "sink_filter" in given else given


@dataclass(frozen=True, kw_only=True)
class OutputOptions(CommonOptions):
    """Options of every command that writes results into a folder."""

    out: Path
    """folder for the results"""
    overwrite: bool = False
    """replace the results of another run in --out"""

    def measure(
        self, doing: str, unit: str, diagnostic: Callable[..., Finding], /, *given: object, **how: Any
    ) -> Document:
        """Call a diagnostic under a progress bar, and `finish` with its result, in its `folder` (default: --out).

        doing, unit: what the bar says and counts.
        """
        with self.progress(doing, unit) as progress:
            result = diagnostic(*given, progress=progress, **how)
        return self.finish(result, how.get("folder", self.out))

    def finish(self, result: Finding, folder: Path) -> Document:
        """Write a result's files, then print its table and the names of the files. Returns the document for --json.

        Raises `ResultError` if another result is there and --overwrite is not given.
        """
        try:
            files = self.write(result, folder)
        finally:  # an error in a table must not cost the files
            self.say(result.table())
        self.say(f"wrote {named_files(files)}\ninto {folder}")
        return {**result.as_dict(), "out": str(folder), "files": files}

    def write(self, result: Finding, folder: Path) -> list[str]:
        """Write a result's files, with this command line in its provenance. Raises `ResultError` as `finish` does."""
        from diagnostics.results.result import BaseResult
        from diagnostics.results.words import provenances

        for run in provenances(result).values() if isinstance(result, BaseResult) else ():
            run.setdefault("command", typed(sys.argv))
        return result.write(folder, overwrite=self.overwrite)


@dataclass(frozen=True, kw_only=True)
class ResumableOptions(OutputOptions):
    """Options of every command that continues where it was interrupted."""

    out: Path
    """folder for the results and the finished units of work: after an interruption the same command goes on from there"""
    no_lock: bool = False
    """do not lock --out, for file systems without locks; make sure that no other process works in it"""
    workers: PositiveInt | None = None
    """processes that share the work, one thread each, on a GPU each where there are as many (pip install 'mechdiag[ray]')"""
    ray: str | None = None
    """HOST:PORT of a Ray cluster, or auto: run --workers there (default: one on every GPU, or CPU)"""
    part: str | None = None
    """i/n: compute part i of n and keep it in --out, which all parts share; the same command without --part joins them"""
    mixed: bool = False
    """accept parts and workers with other kinds of processors or numbers of threads, which differ in the last bits"""

    def elsewhere(self) -> AbstractContextManager[object]:
        """`workers` as these options say. Raises `ResultError`."""
        found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", self.part or "1/1")
        if found is None:
            raise ResultError(f"--part {self.part}; expected i/n, such as 1/4")
        part = (int(found[1]), int(found[2])) if self.part else None
        from diagnostics.running.workers import workers

        return workers(self.workers, ray=self.ray, part=part, mixed=self.mixed)


_REPEAT_SECONDS = 1.0  # another signal so soon after the first repeats it


def run(options: type[Options], main: Callable[[Options], Document | None]) -> None:
    """Parse the command line into `options`, whose docstring is the help text, and call `main`.

    With --json, stdout holds the document that `main` returns and nothing else; all other output goes to stderr.

    Exit codes: 0 done; 2 invalid input (one line on stderr, no traceback); 130 interrupted (SIGINT, Ctrl-C); 143 terminated
    (SIGTERM), with one line that says how much of a run is kept; 1 with a traceback: a bug.
    """
    given: Any = None
    with _stoppable() as signals:
        try:
            given = parsed_line(options)
            with _output_of(given), _warned_once():
                document = main(given)
            if getattr(given, "json", False):
                from interventions.files import jsonable

                print(json.dumps(jsonable(document), indent=1, ensure_ascii=False, allow_nan=False), flush=True)
        except PartDone as kept:
            if not (given.json or given.quiet):
                print(terminal_line(kept))
        except MechdiagError as error:
            print(f"error: {terminal_line(error)}", file=sys.stderr)
            raise SystemExit(2) from None
        except BrokenPipeError:  # --help or --json, with nobody reading on
            _close_stdout()
            raise SystemExit(141) from None  # 128 + SIGPIPE, which Windows lacks
        except KeyboardInterrupt as stopped:
            print(terminal_line(stopped) if isinstance(stopped, Interrupted) else "interrupted", file=sys.stderr)
            raise SystemExit(128 + (signals[0] if signals else signal.SIGINT)) from None


@contextlib.contextmanager
def _output_of(given: object) -> Iterator[None]:
    """Apply --json (redirect stdout to stderr), --quiet (load models without a bar), --no-lock, and where the work is done."""
    with contextlib.ExitStack() as stack:
        if getattr(given, "no_lock", False):
            from diagnostics.running.units import unlocked

            stack.enter_context(unlocked())
        if isinstance(given, ResumableOptions):
            stack.enter_context(given.elsewhere())
        if getattr(given, "json", False):
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        if getattr(given, "quiet", False):
            from transformers.utils import logging as loading

            if loading.is_progress_bar_enabled():
                loading.disable_progress_bar()
                stack.callback(loading.enable_progress_bar)
        yield


@contextlib.contextmanager
def _stoppable() -> Iterator[list[int]]:
    """SIGINT and SIGTERM raise KeyboardInterrupt; the list holds the signals received, in order.

    A signal within a second of the last one does nothing: clean-up is running, and a second Ctrl-C must not end it with a
    traceback. A signal that the parent process had us ignore (nohup, a background job) stays ignored.
    """
    came: list[int] = []
    last = float("-inf")

    def stop(number: int, _: FrameType | None) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        came.append(number)
        if last - before > _REPEAT_SECONDS:
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


def _close_stdout() -> None:
    """Send what is still printed nowhere: flushing at exit would raise once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parsed_line(options: type[Options], words: Sequence[str] | None = None) -> Options:
    """The words of a command line (default: this process's) as options; tyro's errors, a box of several lines, become one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parsed(options, words)
    except SystemExit as ended:
        if ended.code != 2:
            raise
        names = option_names(options)
        for word in (w.partition("=")[0] for w in (sys.argv[1:] if words is None else words) if w.startswith("--")):
            if (typed := word.replace("_", "-")) not in names:
                near = difflib.get_close_matches(typed, names, 1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise MechdiagError(f"no option {word}{hint}; see {sys.argv[0]} --help") from None
        plain = re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯]", " ", said.getvalue())
        parts = [words.rstrip(".") for part in re.split(r"[─-]{5,}", plain) if (words := " ".join(part.split()))]
        told = [
            part for part in parts[1:-1] if not part.startswith("Argument helptext")
        ]  # nor title and hint at --help
        raise MechdiagError(f"{'; '.join(told)}; see {sys.argv[0]} --help") from None


@contextlib.contextmanager
def _warned_once() -> Iterator[None]:
    """Warnings on stderr, a line each; of those that differ in numbers only the first, and in the end how many more there were."""
    kinds: dict[str, list[str]] = {}

    def show(message: Warning | str, category: type[Warning], *_: object) -> None:
        said = terminal_line(message)
        told = kinds.setdefault(re.sub(r"\d[\d.,]*(e[-+]?\d+)?", "#", said), [])
        told.append(said)
        if len(told) == 1:
            print(f"warning: {said}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        try:
            yield
        finally:
            for first, *more in kinds.values():
                if more:
                    print(f"warning: {len(more)} more like “{first[:60]}{'…' * (len(first) > 60)}”", file=sys.stderr)


def named_files(files: Sequence[str]) -> str:
    """Names of files, those of one picture in several formats as one: `a.parquet, b.png .svg .pdf`."""
    by: dict[str, list[str]] = {}
    for file in files:
        stem, dot, ending = file.rpartition(".")
        if ending in ("png", "svg", "pdf"):
            by.setdefault(stem, []).append(dot + ending)
        else:
            by[file] = []
    return ", ".join(" ".join([name + "".join(endings[:1]), *endings[1:]]) for name, endings in by.items())


def typed(words: Sequence[str]) -> list[str]:
    """A command line as provenance keeps it: without the options that change no result (--out, --workers, --json, --quiet, ...)."""
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        if word in _NOR_WITH_VALUE:
            next(rest, None)
        elif word.partition("=")[0] not in _NOR_WITH_VALUE and word not in _NOT_THE_RESULT:
            kept.append(word)
    return kept


def terminal_line(said: object) -> str:
    """A message on one line, with control characters escaped."""
    return printable(" ".join(str(said).split()))


def printable(line: str) -> str:
    """A line with control characters, and those that change the direction of text, escaped: `\\x1b`."""
    return "".join(c.encode("unicode_escape").decode() if _controls(c) else c for c in line.expandtabs())


def _controls(c: str) -> bool:
    joins = c in "\u200c\u200d"  # letters and emoji
    return unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and not joins

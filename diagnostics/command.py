"""What every command shares: errors on one line and exit 2, interruption and exit 130, a progress bar."""

import contextlib
import inspect
import io
import re
import sys
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

import tyro
from tqdm import tqdm

from interventions.errors import MechdiagError

Settings = TypeVar("Settings")


def run(settings: type[Settings], main: Callable[[Settings], object]) -> None:
    """Parse the command line into `settings` and call `main`; its docstring is the help text.

    Exit 0 when done, 2 for input that does not serve (one line on stderr, no traceback), 130 when interrupted.
    """
    try:
        given = _parsed(settings)
        warnings.showwarning = _warning_line
        main(given)
    except MechdiagError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        raise SystemExit(130) from None


def _parsed(settings: type[Settings]) -> Settings:
    """The command line as settings; what the parser says in a box over several lines becomes one."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(settings, description=inspect.getdoc(settings))
    except SystemExit as ended:
        if ended.code != 2:
            raise
        words = re.sub(r"\x1b\[[0-9;]*m|[─│╭╮╰╯]+", " ", said.getvalue()).split()
        raise MechdiagError(" ".join(words)) from None


def _warning_line(message: Warning | str, category: type[Warning], *_: object) -> None:
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


class Progress:
    """A progress bar over rows, for `progress=` of diagnostics; it appears with the first rows."""

    def __init__(self, what: str, unit: str = "row"):
        self.what, self.unit, self.bar = what, unit, None

    def __call__(self, n: int, total: int) -> None:
        if self.bar is None:
            self.bar = tqdm(total=total, desc=self.what, unit=self.unit, unit_scale=True)
        self.bar.update(n)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()

"""What every command shares: errors on one line and exit 2, interruption and exit 130 or 143, a progress bar."""

import contextlib
import inspect
import io
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import FrameType, TracebackType
from typing import TypeVar

import tyro
from tqdm import tqdm

from diagnostics.units import Interrupted
from interventions.errors import MechdiagError
from sae_models.errors import SAEError

Settings = TypeVar("Settings")

_IMPATIENCE = 1.0  # seconds after a signal in which another one is the same wish, not a new one


def run(settings: type[Settings], main: Callable[[Settings], object]) -> None:
    """Parse the command line into `settings` and call `main`; its docstring is the help text.

    Exit 0 when done, 2 for input that does not serve (one line on stderr, no traceback), 130 when interrupted (SIGINT,
    Ctrl-C), 143 when told to end (SIGTERM); one line says what is kept of a sweep. 1 with a traceback is our mistake.
    """
    with _stoppable() as signals:
        try:
            given = _parsed(settings)
            warnings.showwarning = _warning_line
            main(given)
        except (MechdiagError, SAEError) as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt as stopped:
            print(stopped if isinstance(stopped, Interrupted) else "interrupted", file=sys.stderr)
            raise SystemExit(128 + (signals[0] if signals else signal.SIGINT)) from None


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
        self._begun(total).update(n)

    def initial(self, n: int, total: int) -> None:
        """Rows that were there before: they count as done, not towards the speed and the time left."""
        bar = self._begun(total)
        bar.initial += n
        bar.n += n
        bar.last_print_n += n
        bar.refresh()

    def training(self, n: int, total: int, said: Mapping[str, float]) -> None:
        """Steps of a training run, with what its metrics say, where they say something."""
        if n > 1:  # a run that goes on
            return self.initial(n, total)
        bar = self._begun(total)
        if said:
            bar.set_postfix(
                {name: f"{said[name]:.3g}" for name in ("fve", "l0", "dead") if name in said}, refresh=False
            )
        bar.update(n)

    def _begun(self, total: int) -> tqdm:
        if self.bar is None:
            self.bar = tqdm(total=total, desc=self.what, unit=self.unit, unit_scale=True)
        return self.bar

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()

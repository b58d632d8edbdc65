"""A progress bar over rows: in a terminal for commands, in a notebook by itself."""

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType

import tqdm as bars

Progressing = Callable[..., object] | bool | None
"""`progress=` of a diagnostic: called with (rows done since the last call, rows in all); True: a bar; False: none; None: a bar in a
notebook, none elsewhere"""


class Progress:
    """A progress bar over rows, for `progress=` of diagnostics; it appears with the first rows, and closes with its block."""

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

    def _begun(self, total: int) -> bars.tqdm:
        if self.bar is None:
            self.bar = _kind()(total=total, desc=self.what, unit=self.unit, unit_scale=True)
        return self.bar

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()


@contextlib.contextmanager
def followed(progress: Progressing, what: str, unit: str = "row") -> Iterator[Callable[..., object] | None]:
    """What to call while something runs: `progress` where it can be called, else a bar or nothing, as `Progressing` says."""
    if callable(progress):
        yield progress
    elif progress or (progress is None and in_notebook()):
        with Progress(what, unit) as bar:
            yield bar
    else:
        yield None


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


def _kind() -> type[bars.tqdm]:
    """The notebook's own bar where there is a notebook with ipywidgets, else text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bars.TqdmWarning)  # no ipywidgets: text does
        from tqdm.auto import tqdm
    return tqdm

"""Where units of work are computed: read by what computes them, set by `workers`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


class Pool(Protocol):
    """Processes that compute units for this one."""

    def record(self, recordings: Any) -> list[dict[Any, Any]]:
        """The activations of every shard, `{site: [prompt, pos, d_model]}`; each worker keeps the keys of those it recorded."""
        ...

    def compute(
        self,
        fn: Any,
        todo: Mapping[str, Any],
        leader: Mapping[str, str],
        certificates: Callable[[str], list[dict[str, Any]] | None],
        store: Callable[[str, bytes], object],
    ) -> None:
        """Hand every unit of `todo` (by key) to a worker and its file to `store`. leader: the first unit of each one's group;
        certificates: of a unit that is done, None of others."""
        ...


@dataclass(frozen=True)
class Place:
    """This process, workers, or this process for a part of the units."""

    pool: Pool | None = None
    part: tuple[int, int] | None = None
    """(i, n): part i of n, from 1"""
    shared: Path | None = None
    """where parts leave for each other the activations that they recorded"""
    mixed: bool = False
    """units of one run may come from other kinds of processors and numbers of threads"""


_HERE = Place()
_place: ContextVar[Place] = ContextVar("place", default=_HERE)


def place() -> Place:
    """Where units are computed now."""
    return _place.get()


@contextmanager
def placed_at(where: Place) -> Iterator[None]:
    """Compute units there."""
    token = _place.set(where)
    try:
        yield
    finally:
        _place.reset(token)


def parts_of(groups: Sequence[Any], n: int) -> list[int]:
    """To which of `n` parts each unit belongs, from 1. groups: of each unit, in order.

    Groups stay whole, about as many units in each part; where there are fewer groups than parts, units are dealt in their order.
    """
    total, size = len(groups), {group: groups.count(group) for group in dict.fromkeys(groups)}
    if len(size) < n:
        return [1 + i * n // max(total, n) for i in range(total)]
    found, before = {}, 0
    for group, units in size.items():
        found[group] = 1 + min(n - 1, (2 * before + units) * n // (2 * total))
        before += units
    return [found[group] for group in groups]


def differences(expected: dict[str, Any], here: dict[str, Any], keys: Sequence[str]) -> str:
    """Entries that differ, in words."""
    return "; ".join(
        f"{key} {_short(here[key])} where {_short(expected[key])} is expected"
        for key in keys
        if here[key] != expected[key]
    )


def _short(value: Any) -> str:
    said = str(value)
    return said if len(said) <= 40 else f"{said[:37]}..."

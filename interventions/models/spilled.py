"""What a clean pass leaves of more prompts than the budget holds: the first on the device, the next in host memory, the others nowhere."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from interventions.models.uploads import upload
from interventions.sites import Site

Name = Any
"""a site, `FINAL`, or ("keys", block), ("values", block)"""
FINAL = "final"


class Part(NamedTuple):
    """A tensor of some prompts."""

    value: Tensor
    pos_axis: int


class Spilled:
    """Tensors by name, each in three ranges of prompts; ranges end where batches do.

    again: records a batch of prompts again; what it gives is held until others are needed.
    """

    def __init__(
        self, n: int, longest: int, batch: int, on_device: int, in_host: int, again: Callable[[int], dict[Name, Part]]
    ):
        self.n, self.longest, self.batch, self.again = n, longest, batch, again
        self.on_device, self.in_host = on_device, in_host
        self.kept = on_device + in_host
        """prompts before this one are kept"""
        self.recorded_again = 0
        """prompts, each time they were"""
        self._held: dict[Name, tuple[int, torch.device, tuple[int, ...], torch.dtype]] = {}
        self._device: dict[Name, Tensor] = {}
        self._host: dict[Name, Tensor] = {}
        self._again: dict[int, dict[Name, Part]] = {}
        self._room = 1

    @property
    def names(self) -> list[Name]:
        return list(self._held)

    @property
    def nbytes(self) -> int:
        """Of what is kept, on the device and in host memory."""
        return sum(x.nbytes for some in (self._device, self._host) for x in some.values())

    def put(self, name: Name, first: int, part: Part) -> None:
        """Keep what a batch gave, prompts from `first` on."""
        value, axis = part
        sizes = self._held[name][2]
        store, start, n = (
            (self._device, 0, self.on_device) if first < self.on_device else (self._host, self.on_device, self.in_host)
        )
        if name not in store:
            where = value.device if store is self._device else torch.device("cpu")
            store[name] = torch.zeros(n, *sizes, dtype=value.dtype, device=where)
        store[name][first - start : first - start + len(value)].narrow(axis, 0, value.shape[axis]).copy_(value)

    def expect(self, parts: Mapping[Name, Part]) -> None:
        """Know what there will be, by what one batch gave."""
        for name, (value, axis) in parts.items():
            sizes = list(value.shape[1:])
            sizes[axis - 1] = self.longest
            self._held[name] = axis, value.device, tuple(sizes), value.dtype

    def forget(self, names: Sequence[Name]) -> None:
        for some in (self._held, self._device, self._host):
            for name in names:
                some.pop(name, None)

    def need(self, prompts: np.ndarray) -> None:
        """Have the prompts that are not kept at hand, and no others."""
        batches = np.unique(prompts[prompts >= self.kept] // self.batch).tolist()
        self._room = max(1, len(batches))
        self._again = {number: some for number, some in self._again.items() if number in batches}
        for number in batches:
            self._of_batch(number)

    def _of_batch(self, number: int) -> dict[Name, Part]:
        if number not in self._again:
            while len(self._again) >= self._room:
                self._again.pop(next(iter(self._again)))
            self._again[number] = self.again(number)
            self.recorded_again += min(self.batch, self.n - number * self.batch)
        return self._again[number]

    def _pieces(self, name: Name, prompts: np.ndarray) -> Iterator[tuple[np.ndarray, Tensor, np.ndarray]]:
        """Which of `prompts` are together, the tensor that holds them, and where in it they are."""
        first = 0
        for store, n in ((self._device, self.on_device), (self._host, self.in_host)):
            if len(here := np.flatnonzero((prompts >= first) & (prompts < first + n))):
                yield here, store[name], prompts[here] - first
            first += n
        for number in np.unique(prompts[prompts >= first] // self.batch).tolist():
            here = np.flatnonzero((prompts >= first) & (prompts // self.batch == number))
            yield here, self._of_batch(number)[name].value, prompts[here] - number * self.batch

    def rows(self, name: Name, prompt: np.ndarray, position: np.ndarray, device: torch.device) -> Tensor:
        """Single tokens, `[row, width]`."""
        _, _, sizes, dtype = self._held[name]
        found = torch.empty(len(prompt), *sizes[1:], dtype=dtype, device=device)
        for here, value, which in self._pieces(name, prompt):
            at = upload(np.stack([which, position[here]]), value.device)
            found.index_copy_(0, upload(here, device), upload(value[at[0], at[1]], device))
        return found

    def of(self, name: Name, prompts: np.ndarray, width: int | None = None) -> Tensor:
        """Whole prompts up to a position, on the device where they were made; 0 beyond what was recorded."""
        axis, device, sizes, dtype = self._held[name]
        sizes = list(sizes)
        sizes[axis - 1] = self.longest if width is None else width
        found = torch.zeros(len(prompts), *sizes, dtype=dtype, device=device)
        for here, value, which in self._pieces(name, prompts):
            part = value.narrow(axis, 0, min(value.shape[axis], sizes[axis - 1]))
            part = upload(part.index_select(0, upload(which, part.device)), device)
            found.narrow(axis, 0, part.shape[axis]).index_copy_(0, upload(here, device), part)
        return found

    def whole(self, name: Name) -> Tensor:
        return self.of(name, np.arange(self.n))


class Sites(Mapping[Site, Tensor]):
    """Activations by site, put together when they are asked for."""

    def __init__(self, spilled: Spilled):
        self._spilled = spilled

    def __getitem__(self, site: Site) -> Tensor:
        if site not in self._spilled.names:
            raise KeyError(site)
        return self._spilled.whole(site)

    def __iter__(self) -> Iterator[Site]:
        return (name for name in self._spilled.names if isinstance(name, Site))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class OfBlocks(Sequence[Tensor]):
    """Keys, or values, of each block, put together when they are asked for."""

    def __init__(self, spilled: Spilled, what: str, n: int):
        self._spilled, self._what, self._n = spilled, what, n

    def __getitem__(self, block: Any) -> Any:
        if isinstance(block, slice):
            return [self[i] for i in range(*block.indices(self._n))]
        return self._spilled.whole((self._what, range(self._n)[block]))

    def __len__(self) -> int:
        return self._n

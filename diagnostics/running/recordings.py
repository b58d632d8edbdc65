"""Clean passes over prompts, in shards that fit in memory."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy import ndarray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diagnostics.running.place import place
from interventions.errors import ResultError, one_line
from interventions.files import UNREADABLE, place_first, writing
from interventions.models.causal_model import CausalModel
from interventions.recording import Recording, record
from interventions.sites import Site

SHARD = 64
"""prompts in a shard"""
CACHE_BYTES = 4 * 2**30
"""of keys and values kept at once"""


def shards(n_prompts: int) -> list[Int[ndarray, "prompt"]]:
    """The indices of the prompts of each shard."""
    return [np.arange(first, min(first + SHARD, n_prompts)) for first in range(0, n_prompts, SHARD)]


class Recordings:
    """The recording of each shard, with keys and values: the first ones are kept up to `cache_bytes`, and the last one asked for;
    the others are recorded again."""

    def __init__(
        self,
        model: CausalModel,
        tokens: Sequence[Sequence[int]],
        sites: Sequence[Site],
        cache_bytes: int = CACHE_BYTES,
    ):
        self.model, self.tokens, self.sites, self.cache_bytes = model, tokens, sites, cache_bytes
        self._kept: dict[int, Recording] = {}

    def activations(self) -> list[dict[Site, Tensor]]:
        """Of every shard, the activations at the sites, `[prompt, pos, d_model]`.

        Workers record them where there are any, and each of several parts what no other has (see `place`), its own shards first.
        """
        here = place()
        if here.pool is not None:
            return here.pool.record(self)
        n = len(shards(len(self.tokens)))
        if here.shared is None or here.part is None:
            return [self.of_shard(number) for number in range(n)]
        first = (here.part[0] - 1) * n // here.part[1]
        found = {number: self._once(here.shared, number) for number in (*range(first, n), *range(first))}
        return [found[number] for number in range(n)]

    def _once(self, folder: Path, number: int) -> dict[Site, Tensor]:
        """A shard's activations as the first part that recorded them left them."""
        said = f"{self.model.weights_hash} {list(map(list, self.tokens))} {list(map(str, self.sites))}"
        path = folder / f"clean-{hashlib.sha256(said.encode()).hexdigest()[:16]}-{number}.safetensors"
        if not path.exists():
            own = {str(site): x.contiguous() for site, x in self.of_shard(number).items()}
            with writing(f"to {folder}"):
                place_first(path, lambda partial: save_file(own, partial))
        try:
            read = load_file(path, device=self.model.device.type)
        except (*UNREADABLE, SafetensorError) as error:
            raise ResultError(f"{path} is damaged ({one_line(error)}); remove it, and run this part again") from error
        return {site: read[str(site)] for site in self.sites}

    def of_shard(self, number: int) -> dict[Site, Tensor]:
        """A shard's activations at the sites."""
        recording = self[number]
        return {site: recording.activations[site.whole] for site in self.sites}

    def __reduce__(self) -> Any:
        """Recordings are not carried to other processes: whoever needs one makes it."""
        return _made, (self.model, self.tokens, self.sites, self.cache_bytes)

    def __getitem__(self, number: int) -> Recording:
        if number not in self._kept:
            new = record(self.model, [self.tokens[i] for i in shards(len(self.tokens))[number]], self.sites)
            size = sum(r.cache_bytes for r in (*self._kept.values(), new))
            if size > self.cache_bytes and self._kept:
                self._kept.pop(max(self._kept))
            self._kept[number] = new
        return self._kept[number]


KEPT: dict[Any, Recordings] | None = None
"""In a worker: one object for each model, text and sites, whatever is sent to it, so that a shard is recorded once."""


def _made(model: CausalModel, tokens: Sequence[Sequence[int]], sites: Sequence[Site], cache_bytes: int) -> Recordings:
    found = Recordings(model, tokens, sites, cache_bytes)
    if KEPT is None:
        return found
    return KEPT.setdefault((id(model), hash(tuple(map(tuple, tokens))), tuple(sites)), found)

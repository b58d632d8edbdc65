"""Edits of one SAE's latents at tokens of one shard: their effects, doses, and random directions as controls."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from diagnostics.latent_edits.firings import Firings
from diagnostics.running.clean import CleanActivations
from diagnostics.running.notes import noted
from diagnostics.running.units import Tick
from diagnostics.sampling.tokens import generator
from interventions.edits import random_like, rotated_edits
from interventions.effects import Effects, intervened_logits, measure
from interventions.metrics import TokenMetric
from interventions.replaying.replay import unembed
from sae_models.dictionaries import Dictionary
from sae_models.sae import SAE

LOGITS, LOGITS_GPU = 2**24, 2**27
"""Logits held at once; what is formed of them takes several times as much."""
ROUNDING = 16
"""Times the dtype's ε, and the sum of both norms: what a difference of two activations must exceed to be one."""


@dataclass(eq=False)
class LatentEdits:
    """Edits at tokens of one shard, of one SAE."""

    clean: CleanActivations
    dictionary: Dictionary
    firings: Firings
    shard: int
    notes: dict[str, Any]
    tick: Tick = field(default=lambda n: None)

    @property
    def sae(self) -> SAE:
        assert self.dictionary.sae is not None
        return self.dictionary.sae

    @property
    def device(self) -> torch.device:
        return self.clean.model.device

    @property
    def at_once(self) -> int:
        """Rows whose logits are held at once."""
        room = LOGITS if self.device.type == "cpu" else LOGITS_GPU
        return max(1, room // self.clean.model.vocab_size)

    def column(self, items: pd.DataFrame, name: str) -> Int[Tensor, "item"]:
        """Whole numbers of the items' table."""
        return torch.from_numpy(items[name].to_numpy(np.int64, copy=True)).to(self.device)

    def x(self, items: pd.DataFrame) -> Float[Tensor, "item d_model"]:
        """What stands at the items' tokens, float32 at least."""
        where = (items[name].to_numpy(np.int64, copy=True) for name in ("target_prompt", "target_position"))
        return _wide(self.clean.at(self.dictionary.site, *where))

    def dose(
        self, x: Float[Tensor, "item d_model"], vectors: Float[Tensor, "item row d_model"]
    ) -> Float[Tensor, "item row"]:
        """‖Δx‖ of each vector as the model takes it, rounded to its dtype (L2)."""
        return (vectors.to(self.clean.model.dtype).to(x) - x[:, None]).norm(dim=-1)

    def measured(
        self,
        items: pd.DataFrame,
        vectors: Float[Tensor, "item row d_model"],
        metrics: Sequence[str | TokenMetric] = ("kl",),
    ) -> Effects:
        """Effects of several vectors at each item's token, `[item · row]`."""
        prompt, position = self._tokens(items, vectors.shape[1])
        settings = self.clean.settings
        effects = measure(
            self.clean.recording(self.shard), self.dictionary.site, prompt, position, vectors.flatten(0, 1).to(self.clean.model.dtype),
            metrics=metrics, path=settings.path, batch_rows=settings.batch_rows, nonfinite="count",
        )  # fmt: skip
        noted(self.notes, effects)
        return effects

    def logits(
        self, items: pd.DataFrame, vectors: Float[Tensor, "item row d_model"], horizon: int = 1
    ) -> Float[Tensor, "item row *read vocab"]:
        """Logits of several vectors at each item's token, float32 at least; for as many as `batches` gives."""
        prompt, position = self._tokens(items, vectors.shape[1])
        found = intervened_logits(
            self.clean.recording(self.shard), self.dictionary.site, prompt, position, vectors.flatten(0, 1).to(self.clean.model.dtype),
            horizon=horizon, path=self.clean.settings.path, nonfinite="count",
        )  # fmt: skip
        return _wide(found).unflatten(0, vectors.shape[:2])

    def clean_logits(self, items: pd.DataFrame, ahead: int = 0) -> Float[Tensor, "item vocab"]:
        """The clean logits, so many positions after the items' own."""
        prompt, position = (t.to(self.device) for t in self._tokens(items, 1))
        recording = self.clean.recording(self.shard)
        return _wide(unembed(recording, recording.final_hidden[prompt, position + ahead]))

    def batches(self, items: pd.DataFrame, rows: int) -> Iterator[pd.DataFrame]:
        """The items, as many at once as leave room for `rows` logits each."""
        return parts(items, max(1, self.at_once // rows))

    def towards(self, kind: str, items: pd.DataFrame, n: int, label: str) -> Float[Tensor, "item n d_model"]:
        """n random directions for each item, of one of `tables.PLACEBOS`, a function of seed, label and the item's token alone.

        nan where the text has no n pairs of tokens whose activations differ.
        """
        drawn = []
        seed, where = self.clean.settings.seed, [int(p) for p in items["target_position"]]
        for prompt, position in zip(items["target_prompt"].tolist(), where, strict=True):
            stream = generator(seed, label, kind, self.dictionary.label, prompt, position)
            if kind == "placebo_token":
                drawn.append(self._differences(n, stream))
            else:
                drawn.append(random_like(torch.empty(n, self.clean.model.d_model), stream).to(self.device))
        return torch.stack(drawn)

    def _differences(self, n: int, stream: torch.Generator) -> Float[Tensor, "n d_model"]:
        """The first n differences of two random usable tokens' activations that are more than rounding.

        Tokens of equal context (prompts that begin alike) and, at the first block, equal tokens have one activation: spare pairs
        are drawn for these.
        """
        prompt, position = self.clean.tokens
        pairs = torch.randint(len(prompt), (2, 4 * n + 16), generator=stream).numpy()
        one, other = (self.clean.at(self.dictionary.site, prompt[i], position[i]) for i in pairs)
        rounding = ROUNDING * torch.finfo(one.dtype).eps
        one, other = one.float(), other.float()
        apart = (one - other).norm(dim=1) > rounding * (one.norm(dim=1) + other.norm(dim=1))
        found = (one - other)[apart][:n]
        return torch.nn.functional.pad(found, (0, 0, 0, n - len(found)), value=torch.nan)

    def _tokens(self, items: pd.DataFrame, repeats: int) -> tuple[Tensor, Tensor]:
        prompt, position = (
            items[name].to_numpy(np.int64).repeat(repeats) for name in ("target_prompt", "target_position")
        )
        return torch.from_numpy(prompt - self.clean.shards[self.shard][0]), torch.from_numpy(position)


def parts(items: pd.DataFrame, size: int) -> Iterator[pd.DataFrame]:
    """The lines, so many at once, each part numbered from 0."""
    for start in range(0, len(items), size):
        yield items.iloc[start : start + size].reset_index(drop=True)


def repeated(items: pd.DataFrame, n: int) -> pd.DataFrame:
    """Each line n times, numbered from 0."""
    return items.loc[items.index.repeat(n)].reset_index(drop=True)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def strongest(
    bench: LatentEdits, x: Float[Tensor, "item d_model"], k: int | None = None, among: np.ndarray | None = None
) -> tuple[Int[Tensor, "item k"], Float[Tensor, "item k"]]:
    """Each token's active latents by falling |z|‖d‖ (None: all of them), padded with −1, and their z, padded with 0."""
    z = bench.sae.encode(x.to(bench.sae.W_dec))
    size = z.abs() * bench.sae.W_dec.norm(dim=1)
    if among is not None:
        allowed = torch.zeros_like(size[0])
        allowed[torch.from_numpy(among).to(size.device)] = 1
        size = size * allowed
    size, index = size.topk(min(k or int((size > 0).sum(1).max().clamp(min=1)), size.shape[1]), dim=1)
    return index.masked_fill(size == 0, -1), z.gather(1, index).masked_fill(size == 0, 0)


def removals(
    bench: LatentEdits, index: Int[Tensor, "item k"], z: Float[Tensor, "item k"]
) -> Float[Tensor, "item k d_model"]:
    """−z_i·d_i of each token's latents; 0 in the padding."""
    return -z[..., None] * bench.sae.W_dec[index.clamp(min=0)]


def turned(
    bench: LatentEdits,
    kind: str,
    items: pd.DataFrame,
    x: Float[Tensor, "item d_model"],
    deltas: Float[Tensor, "item k d_model"],
) -> Float[Tensor, "item k d_model"]:
    """Each token's edits turned about its x as one, in directions of one of `tables.PLACEBOS`; nan where the text has not enough of them."""
    towards = bench.towards(kind, items, 2 * deltas.shape[1], "rotated")  # half of them to spare
    return torch.stack([rotated_edits(*some) for some in zip(x, deltas, towards, strict=True)])

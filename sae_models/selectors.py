"""Which latents are active: from scores to activations. Those with learned thresholds and gates stand in `gates`.

`forward` is what is done at inference: each token by itself. `support` is what a training step selects from a batch.
Everything acts on `strength(s)`, so that latents of either sign (`signed`) need another strength, not another selector.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sae_models.errors import SAEError

Take = Callable[[Tensor], Tensor]
"""Brings a parameter of one number a latent to the entries at hand (all latents of a row, or the selected ones)."""


def everything(parameter: Tensor) -> Tensor:
    """All latents of a row: the parameter as it is."""
    return parameter


class Support(NamedTuple):
    """The selected entries of a batch, sorted by row."""

    row: Int[Tensor, "entry"]
    latent: Int[Tensor, "entry"]
    score: Float[Tensor, "entry"]
    product: Float[Tensor, "entry"]
    """what the score was formed of"""
    n_rows: int


class Scored(NamedTuple):
    """Scores of some rows of a batch."""

    start: int
    """number of the first row"""
    product: Float[Tensor, "row d_sae"]
    score: Float[Tensor, "row d_sae"]


Chunks = Callable[[], Iterable[Scored]]
"""The scores of a batch, some rows at a time; may be asked for again."""


class Selector(nn.Module):
    """Base: z = ReLU(s). Dense: a training step keeps every positive score."""

    kind = "relu"
    sparse = False
    """whether a training step selects few entries; else it keeps all, and a penalty makes them few"""
    signed = False
    """whether latents may be negative"""
    counts = False
    """whether the penalty is on the number of active latents (`indicator`), and not on their size"""

    def strength(self, s: Tensor) -> Tensor:
        """What is compared, never negative; 0 is inactive. (Of signed latents: |s|.)"""
        return s.abs() if self.signed else s.relu()

    def value(self, s: Tensor) -> Tensor:
        """The activation of a selected entry. (Of signed latents: s.)"""
        return s if self.signed else s.relu()

    def forward(self, s: Float[Tensor, "*row d_sae"]) -> Float[Tensor, "*row d_sae"]:
        return self.at(s)

    def at(self, s: Tensor, take: Take = everything) -> Tensor:
        """The activation of entries whose latents `take` picks, whether they are active or not."""
        return self.value(s)

    def open(self, s: Float[Tensor, "row d_sae"]) -> Bool[Tensor, "row d_sae"]:
        """Where an activation is not 0, or has a gradient: all that a training step of a dense selector needs."""
        return self.strength(s) > 0

    def soft(self, s: Tensor, take: Take = everything) -> Tensor | None:
        """Of a gate: its soft copy, which training penalises and lets reconstruct. None where there is none."""
        return None

    def indicator(self, s: Tensor, take: Take = everything) -> Tensor:
        """1 where a latent is active, else 0, with a gradient to what decides it. Of selectors that `counts`."""
        raise NotImplementedError

    def magnitude(self, s: Tensor, take: Take = everything) -> Tensor:
        """The activation of entries that are known to be active, with its gradient."""
        return s

    def constrain(self) -> None:
        """Put parameters back where they must be, after a training step."""

    def support(self, chunks: Chunks, times: int = 1) -> Support:
        """The entries active in a training batch; `times` as many as usual where the selector counts (Multi-TopK)."""
        return _entries(chunks(), lambda s: _where(self.strength(s) > 0))

    def settings(self) -> dict[str, object]:
        """What it takes to make this one again with `selector`, tensors apart."""
        return {"kind": self.kind}


ReLU = Selector


def _where(mask: Tensor) -> tuple[Tensor, Tensor]:
    row, latent = mask.nonzero(as_tuple=True)
    return row, latent


def _entries(chunks: Iterable[Scored], chosen: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Support:
    """The entries (row, latent) that `chosen` picks from the scores of each chunk."""
    found, n_rows = [], 0
    for start, product, score in chunks:
        row, latent = chosen(score)
        found.append((row + start, latent, score[row, latent], product[row, latent]))
        n_rows = start + len(score)
    row, latent, score, product = (torch.cat(column) for column in zip(*found, strict=True))
    return Support(row, latent, score, product, n_rows)


class TopK(Selector):
    """The k strongest of each token, where positive. Source: arXiv:2406.04093."""

    kind = "topk"
    sparse = True

    def __init__(self, k: int):
        super().__init__()
        if k < 1:
            raise SAEError(f"k = {k}; expected at least 1 active latent a token")
        self.k = k

    def forward(self, s: Float[Tensor, "*row d_sae"]) -> Float[Tensor, "*row d_sae"]:
        strongest = self.strength(s).topk(self._among(s), dim=-1, sorted=False).indices
        return torch.zeros_like(s).scatter(-1, strongest, self.value(s.gather(-1, strongest)))

    def support(self, chunks: Chunks, times: int = 1) -> Support:
        def strongest(s: Tensor) -> tuple[Tensor, Tensor]:
            strength, latent = self.strength(s).topk(self._among(s, times), dim=-1, sorted=False)
            row, place = (strength > 0).nonzero(as_tuple=True)
            return row, latent[row, place]

        return _entries(chunks(), strongest)

    def _among(self, s: Tensor, times: int = 1) -> int:
        return min(times * self.k, s.shape[-1])

    def settings(self) -> dict[str, object]:
        return {"kind": self.kind, "k": self.k}


class AbsTopK(TopK):
    """The k entries of each token with the largest |s|, their sign kept. Source: arXiv:2510.00404."""

    kind = "abstopk"
    signed = True


class BatchTopK(Selector):
    """Training: the k·rows strongest of a batch. Inference: z = s·1[s > threshold], each token by itself.

    The threshold is learned while training (a moving average of each batch's weakest active strength); before it is known,
    inference raises `SAEError`. Source: arXiv:2606.15054 (recipe).
    """

    kind = "batchtopk"
    sparse = True
    threshold: Tensor

    def __init__(self, k: float, threshold: float = math.nan):
        super().__init__()
        if not k > 0:
            raise SAEError(f"k = {k}; expected a positive mean number of active latents a token")
        self.k = k
        self.register_buffer("threshold", torch.tensor(float(threshold)))
        self._hint = 0.0  # where the last batch's weakest stood: speeds up the next search, never changes what it finds

    def forward(self, s: Float[Tensor, "*row d_sae"]) -> Float[Tensor, "*row d_sae"]:
        if bool(self.threshold.isnan()):
            raise SAEError(
                "this BatchTopK SAE has no threshold yet; train it past threshold_from, or set selector.threshold"
            )
        return self.value(s) * (self.strength(s) > self.threshold)

    def support(self, chunks: Chunks, times: int = 1) -> Support:
        def above(least: float) -> Support:
            return _entries(chunks(), lambda s: _where(self.strength(s) > least))

        least = 0.95 * self._hint if times == 1 else 0.0
        found = above(least)
        wanted = round(times * self.k * found.n_rows)
        if len(found.row) < wanted and least > 0:  # the hint was too high
            found = above(0.0)
        strength = self.strength(found.score)
        if len(strength) > wanted:
            strongest = strength.topk(wanted, sorted=False).indices.sort().values
            found = Support(*(column[strongest] for column in found[:4]), found.n_rows)
            strength = strength[strongest]
        if times == 1 and len(strength):
            self._hint = float(strength.min())
        return found

    def settings(self) -> dict[str, object]:
        return {"kind": self.kind, "k": self.k}

"""JᵀMJ of single tokens: J the derivative of the next-token logits at the token's own position in its activation at a site.

    fisher   JᵀFJ,  F = diag(p) − ppᵀ          of log-probabilities, nats² a squared unit of the activation
    logits   JᵀCJ,  C = I − 11ᵀ/V              of the logits less their mean over the V tokens of the vocabulary

With every direction of a basis J comes in full, by forward-mode products through replay; with fewer directions Ω `[k, d_model]` the
matrices are ΩJᵀMJΩᵀ. Source: the Fisher information, as commonly known; through replay, ours.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interventions.effects import check_rows, choose_path, in_chunks
from interventions.recording import Recording
from interventions.replaying.chunks import Asked
from interventions.replaying.rows import Rows
from interventions.second_order import SecondOrder, Tangents, choose_method
from interventions.sites import Site

METRICS = ("fisher", "logits")
Receive = Callable[[int, Mapping[str, Float[Tensor, "direction direction"]]], object]
"""Called with the number of a token and its matrices by metric, tokens in the order of prompts and positions; not for those of which a number
is not finite."""


@torch.no_grad()
def jacobian_products(
    recording: Recording,
    site: Site,
    prompt: Int[Tensor, "token"],
    position: Int[Tensor, "token"],
    directions: Float[Tensor, "direction d_model"],
    receive: Receive,
    *,
    path: str = "auto",
    batch_rows: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> SecondOrder:
    """ΩJᵀMJΩᵀ of every token and metric, handed to `receive`; Ω = `directions`, a row each; the identity gives JᵀMJ.

    What is returned says how, and which tokens are `finite`; it has no values. A token costs as many rows of `second_order` as there are directions; JΩᵀ `[direction, vocab]` is held for one token at a time.
    path, batch_rows (default: as `second_order`), progress: see `measure`. Forward mode, checked against central differences on 8 rows;
    these, with a warning, where it does not run. Tokens of the vocabulary whose p is 0 in floating point count as unmoved.
    Raises what `measure` raises.
    """
    k = len(directions)

    def change(which: Int[Tensor, "some_row"]) -> Float[Tensor, "some_row d_model"]:
        return directions[(which % k).to(directions.device)]

    with recording.held():
        rows = check_rows(recording, site, prompt.repeat_interleave(k), position.repeat_interleave(k), change)
        size = batch_rows or (256 if recording.model.device.type == "cpu" else 2048)
        chosen = choose_path(rows, path, size)
        size = size if chosen.path == "replay" else min(size, 16)
        run = partial(Tangents, replays=chosen.path == "replay")
        method, why, agreement = choose_method(rows, "auto", run)
        waiting = _Tokens(rows, k, receive, torch.ones(len(prompt), dtype=torch.bool))
        one_chunk = partial(_slopes, run=run, method=method)
        _, halvings = in_chunks(rows, waiting, one_chunk, size, progress)
    bad = int((~waiting.finite).sum())
    return SecondOrder(
        {}, position, chosen.path, chosen.delta, chosen.why_hooks, halvings, bad, waiting.finite, method, why, agreement
    )


def _slopes(
    rows: Rows, chunk: np.ndarray, _: Asked, run: Callable[..., Tangents], method: str
) -> tuple[Tensor, Tensor, Tensor]:
    """JΔ `[row, vocab]` of some rows, p of each row's token, and which rows could not be computed."""
    work = run(rows, chunk)
    slopes, p = zip(*((slopes, p) for _, slopes, p in work.slopes(method)), strict=True)
    return torch.cat(slopes), torch.cat(p), work.bad


@dataclass
class _Tokens(Asked):
    """The rows of a token, until all are there."""

    rows: Rows
    k: int
    receive: Receive
    finite: Bool[Tensor, "token"]
    parts: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def store(self, chunk: np.ndarray, slopes: Tensor, p: Tensor, bad: Tensor) -> None:  # type: ignore[override]
        slopes = slopes.masked_fill(bad[:, None], torch.nan)
        token = chunk // self.k  # rows of a token stand together, in the order of directions
        for one in dict.fromkeys(token.tolist()):
            here = np.flatnonzero(token == one)
            self.parts.append((slopes[here[0] : here[-1] + 1], p[here[0]]))
            if sum(len(some) for some, _ in self.parts) == self.k:
                matrices = grams(torch.cat([some for some, _ in self.parts]), self.parts[0][1])
                self.finite[one] = all(bool(matrix.isfinite().all()) for matrix in matrices.values())
                if self.finite[one]:
                    self.receive(one, matrices)
                self.parts = []


def grams(
    slopes: Float[Tensor, "direction vocab"], p: Float[Tensor, "vocab"]
) -> dict[str, Float[Tensor, "direction direction"]]:
    """SFSᵀ and SCSᵀ of derivatives S of the logits along directions, in float64."""
    centred = (slopes - (slopes @ p)[:, None]) * p.sqrt()
    found = {"fisher": centred @ centred.T}
    centred = slopes - slopes.mean(1, keepdim=True)
    return {name: gram.double() for name, gram in (found | {"logits": centred @ centred.T}).items()}

"""JᵀMJ of single tokens: J the derivative of the next-token logits at the token's own position in its activation at a site.

    fisher   JᵀFJ,  F = diag(p) − ppᵀ          of log-probabilities, nats² a squared unit of the activation
    logits   JᵀCJ,  C = I − 11ᵀ/V              of the logits less their mean over the V tokens of the vocabulary

With every direction of a basis J comes in full, by forward-mode products through replay; with fewer directions Ω `[k, d_model]` the
matrices are ΩJᵀMJΩᵀ. Source: the Fisher information, as commonly known; through replay, ours.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interventions.effects import check_rows, choose_path, in_chunks
from interventions.recording import Recording
from interventions.replaying.chunks import Asked
from interventions.replaying.replay import unembed
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

    What is returned says how, and which tokens are `finite`; it has no values. A token costs as many rows of `second_order` as there are
    directions, less where the unembedding is linear: then its weight W gives WᵀMW once a token, and no derivative of logits is formed;
    else JΩᵀ `[direction, vocab]` of one token is held, in which next tokens whose p is 0 in floating point count as unmoved.
    path, batch_rows (default: as `second_order`), progress: see `measure`. Forward mode, checked against central differences on 8 rows;
    these, with a warning, where it does not run.
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
        weight = linear_head(run(rows, rows.order[:8])) if (chosen.path, method) == ("replay", "forward") else None
        waiting = _Tokens(rows, k, receive, torch.ones(len(prompt), dtype=torch.bool), weight)
        one_chunk = partial(_slopes, run=run, method=method, linear=weight is not None)
        _, halvings = in_chunks(rows, waiting, one_chunk, size, progress)
    bad = int((~waiting.finite).sum())
    return SecondOrder(
        {}, position, chosen.path, chosen.delta, chosen.why_hooks, halvings, bad, waiting.finite, method, why, agreement
    )


def linear_head(work: Tangents) -> Float[Tensor, "vocab d_model"] | None:
    """W of the unembedding, where the derivatives of the logits along some rows are W times those of the final states, else None."""
    weight = getattr(work.rows.recording.model.hf.get_output_embeddings(), "weight", None)
    _, tangents = work.forward()
    if weight is None or weight.ndim != 2 or weight.shape[1] != tangents.shape[1]:
        return None
    exact = torch.cat([slopes for _, slopes, _ in work.slopes("forward")])
    found = (tangents @ weight.T.to(tangents)).to(exact)
    if found.shape != exact.shape:
        return None
    allowed = 64 * torch.finfo(tangents.dtype).eps * exact.abs().amax()
    return weight.detach().to(exact) if bool((found - exact).abs().amax() <= allowed) else None


def _slopes(
    rows: Rows, chunk: np.ndarray, _: Asked, run: Callable[..., Tangents], method: str, linear: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """JΔ `[row, vocab]` of some rows and p of each row's token (linear: the final states' derivatives, and None); which rows cannot be used."""
    work = run(rows, chunk)
    if linear:
        return work.forward()[1], None, work.bad
    slopes, p = zip(*((slopes, p) for _, slopes, p in work.slopes(method)), strict=True)
    return torch.cat(slopes), torch.cat(p), work.bad


@dataclass
class _Tokens(Asked):
    """The rows of a token, until all are there."""

    rows: Rows
    k: int
    receive: Receive
    finite: Bool[Tensor, "token"]
    weight: Float[Tensor, "vocab d_model"] | None
    parts: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)

    def store(self, chunk: np.ndarray, slopes: Tensor, p: Tensor | None, bad: Tensor) -> None:  # type: ignore[override]
        slopes = slopes.masked_fill(bad[:, None], torch.nan)
        token = chunk // self.k  # rows of a token stand together, in the order of directions
        for one in dict.fromkeys(token.tolist()):
            here = np.flatnonzero(token == one)
            self.parts.append((slopes[here[0] : here[-1] + 1], None if p is None else p[here[0]]))
            if sum(len(some) for some, _ in self.parts) == self.k:
                matrices = self._matrices(one, torch.cat([some for some, _ in self.parts]), self.parts[0][1])
                self.finite[one] = all(bool(matrix.isfinite().all()) for matrix in matrices.values())
                if self.finite[one]:
                    self.receive(one, matrices)
                self.parts = []

    def _matrices(self, token: int, slopes: Tensor, p: Tensor | None) -> dict[str, Tensor]:
        if p is not None:
            return {"fisher": fisher_gram(slopes, p), "logits": logits_gram(slopes)}
        assert self.weight is not None
        recording, row = self.rows.recording, token * self.k
        hidden = recording.final_hidden[int(self.rows.prompt[row]), int(self.rows.start[row])]
        p = unembed(recording, hidden[None])[0].to(self.weight).softmax(-1)
        inner, outer = {"fisher": fisher_gram(self.weight.T, p), "logits": self._of_logits}, slopes.double()
        return {name: outer @ gram @ outer.T for name, gram in inner.items()}

    @cached_property
    def _of_logits(self) -> Float[Tensor, "d_model d_model"]:
        assert self.weight is not None
        return logits_gram(self.weight.T)


def fisher_gram(
    slopes: Float[Tensor, "direction vocab"], p: Float[Tensor, "vocab"]
) -> Float[Tensor, "direction direction"]:
    """SFSᵀ of derivatives S of the logits, in float64."""
    centred = (slopes - (slopes @ p)[:, None]) * p.sqrt()
    return (centred @ centred.T).double()


def logits_gram(slopes: Float[Tensor, "direction vocab"]) -> Float[Tensor, "direction direction"]:
    """SCSᵀ of derivatives S of the logits, in float64."""
    centred = slopes - slopes.mean(1, keepdim=True)
    return (centred @ centred.T).double()

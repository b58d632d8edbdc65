"""Effects of changing the residual stream at many tokens of a text at once, text by text."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interventions.errors import EditError
from interventions.metrics import CleanRows, CleanSide, Comparison
from interventions.replaying.replay import unembed
from interventions.spliced import COMPARED, LOGITS, LOGITS_GPU, Passes

Change = Callable[[Int[Tensor, "text"]], Float[Tensor, "row d_model"]]
"""Δx at the edited tokens of the given texts, text after text; a row of zeros leaves its token unchanged."""


@dataclass(frozen=True)
class StreamEffects:
    """Effects and doses of each change, a number a text, on the CPU.

    Means are over the reads with finite values: 0 where the text is unchanged up to its last read, nan where no read is left. Doses are of Δx
    after rounding to the model's dtype.
    """

    kl: Float[Tensor, "change text"]
    """KL(clean ‖ changed) of the next-token distribution, nats, mean over the reads"""
    target_fall: Float[Tensor, "change text"]
    """fall of the mean vocabulary-centred logit of the target tokens, mean over the reads"""
    other_square: Float[Tensor, "change text"]
    """squared change of vocabulary-centred logits, mean over all other tokens and the reads"""
    n_reads: Int[Tensor, "change text"]
    """number of reads in the means"""
    n_edited: Int[Tensor, "change text"]
    """tokens with Δx ≠ 0"""
    norm_sum: Float[Tensor, "change text"]
    """Σ ‖Δx‖ over the text's tokens"""
    square_sum: Float[Tensor, "change text"]
    """Σ ‖Δx‖²"""
    shift: Float[Tensor, "change text d_model"]
    """Σ Δx"""
    n_nonfinite: int
    """reads left out because a value is not finite"""
    passed: int
    """texts that passed through the blocks, over all changes"""
    untouched: int
    """unchanged texts, which need no pass"""


@torch.no_grad()
def stream_effects(
    passes: Passes,
    texts: Sequence[int],
    reads: Bool[Tensor, "prompt pos"],
    changes: Mapping[str, Change],
    targets: Sequence[int],
    *,
    through_blocks: bool = True,
    batch_tokens: int | None = None,
    tick: Callable[[int], object] | None = None,
) -> StreamEffects:
    """Add each change to the residual stream at the edited tokens of `passes` in some texts, and measure the effect at `reads`.

    An unchanged text needs no pass, and effects before the first changed token are exactly 0, since attention is causal. Other texts
    cost a pass through the blocks above the site and one unembedding a read; the clean unembedding is shared by all changes.
    through_blocks: False runs full forward passes. batch_tokens: tokens in one pass (default 384 on the CPU, 8192 elsewhere). tick:
    called with the number of (change, text) done. Raises `EditError` for targets outside the vocabulary and changes of another shape.
    """
    device, vocab = passes.device, passes.model.vocab_size
    ids = torch.as_tensor(list(targets), dtype=torch.long)
    if not len(ids) or int(ids.min()) < 0 or int(ids.max()) >= vocab or len(ids) == vocab:
        raise EditError(f"target tokens {ids.tolist()[:5]}; expected one or more of the vocabulary of {vocab}, not all")
    index = torch.as_tensor(list(texts), device=device)
    sums = torch.zeros(len(changes), len(index), 4, dtype=torch.float64, device=device)
    doses = torch.zeros(len(changes), len(index), 3, dtype=torch.float64, device=device)
    shift = torch.zeros(len(changes), len(index), passes.model.d_model, dtype=torch.float64, device=device)
    passed = untouched = 0
    tokens = batch_tokens or (384 if device.type == "cpu" else None)  # few: texts of unequal length would be padded
    for place in passes.batches(tokens, through_blocks, len(changes), index):
        batch = _Batch(passes, index[place], reads, through_blocks)
        hidden = []
        for i, (name, change) in enumerate(changes.items()):
            delta = batch.checked(name, change(batch.texts))
            done = batch.realised(delta)
            length = done.norm(dim=-1)
            dose = torch.stack([length != 0, length, length.square()], dim=-1)
            doses[i, place] = torch.zeros_like(doses[i, place]).index_add(0, batch.text, dose)
            shift[i, place] = torch.zeros_like(shift[i, place]).index_add(0, batch.text, done)
            hidden.append(batch.through(name, delta, (done != 0).any(-1)))
            touched = int((doses[i, place, 0] > 0).sum())
            passed, untouched = passed + touched, untouched + len(place) - touched
            if tick is not None:
                tick(len(place))
        for i, read, numbers in batch.compared(hidden, ids.to(device)):
            lost = ~numbers.isfinite().all(-1, keepdim=True)
            numbers = torch.cat([numbers.masked_fill(lost, 0), lost], dim=-1)
            sums[i, place] += torch.zeros_like(sums[i, place]).index_add(0, batch.read_text[read], numbers)
    n_reads = reads[index].sum(-1) - sums[..., 3]
    kl, target_fall, other_square = (sums[..., :3] / n_reads[..., None]).cpu().unbind(-1)
    n_edited, norm_sum, square_sum = doses.cpu().unbind(-1)
    return StreamEffects(
        kl,
        target_fall,
        other_square,
        n_reads.long().cpu(),
        n_edited.long(),
        norm_sum,
        square_sum,
        shift.cpu(),
        int(sums[..., 3].sum()),
        passed,
        untouched,
    )


class _Batch:
    """A batch of texts, its edited tokens (`row`), and where effects are read."""

    def __init__(self, passes: Passes, texts: Tensor, reads: Tensor, through_blocks: bool):
        self.passes, self.texts, self.through_blocks = passes, texts, through_blocks
        self.width = int(passes.length[texts].max())
        self.text, self.position = passes.edited[texts, : self.width].nonzero(as_tuple=True)
        self.old = passes.recording.activations[passes.site][texts[self.text], self.position]
        self.read_text, self.read_position = reads[texts, : self.width].nonzero(as_tuple=True)
        at = texts[self.read_text], self.read_position
        if through_blocks:
            self.clean = passes.recording.final_hidden[at]
        else:
            self.clean = passes.full(texts, self.width)[self.read_text, self.read_position]

    def checked(self, name: str, delta: Tensor) -> Tensor:
        if delta.shape != (len(self.text), self.passes.model.d_model):
            raise EditError(
                f"change {name!r} gave shape {list(delta.shape)}; expected {[len(self.text), self.passes.model.d_model]}"
            )
        return delta

    def realised(self, delta: Tensor) -> Float[Tensor, "row d_model"]:
        """Δx after rounding of x + Δx to the model's dtype."""
        return (self.old + delta.to(self.old.device)).to(self.old).double() - self.old.double()

    def through(self, name: str, delta: Tensor, changed: Bool[Tensor, "row"]) -> tuple[Tensor, Tensor]:
        """Final hidden states (or logits) at the reads that the change can affect, and the indices of these reads."""
        first = torch.full((len(self.texts),), self.width, device=changed.device)
        first = first.scatter_reduce(0, self.text[changed], self.position[changed], "amin")
        some = (first < self.width).nonzero()[:, 0]
        if not len(some):
            return self.clean[:0], some
        mine = (first < self.width)[self.text]
        put = lambda old: (old + delta[mine].to(old.device)).to(old)  # noqa: E731
        run = self.passes.above if self.through_blocks else self.passes.full
        found = run(self.texts[some], self.width, name, put)
        read = (self.read_position >= first[self.read_text]).nonzero()[:, 0]
        line = torch.searchsorted(some, self.read_text[read])
        return found[line, self.read_position[read]], read

    def compared(
        self, hidden: list[tuple[Tensor, Tensor]], targets: Tensor
    ) -> Iterator[tuple[int, Int[Tensor, "read"], Float[Tensor, "read 3"]]]:
        """For each change and chunk of reads: KL, fall of the targets' centred logits, mean square of the others'."""
        cpu, vocab = self.passes.device.type == "cpu", self.passes.model.vocab_size
        many = max(1, (LOGITS if cpu else LOGITS_GPU) // vocab)
        few = max(1, COMPARED // vocab) if cpu else many
        for start in range(0, len(self.clean), many):
            clean = self._logits(self.clean[start : start + many])
            sides = [CleanSide(part) for part in clean.split(few)]
            for i, (states, read) in enumerate(hidden):
                low, high = torch.searchsorted(read, torch.tensor([start, start + many], device=read.device)).tolist()
                if low == high:
                    continue
                logits, which = self._logits(states[low:high]), read[low:high] - start
                ends = torch.searchsorted(which, torch.arange(0, len(clean) + few, few, device=read.device)).tolist()
                parts = [
                    _numbers(Comparison(_rows(side, which[a:b] - j * few), logits[a:b]), targets)
                    for j, (side, a, b) in enumerate(zip(sides, ends, ends[1:], strict=False))
                    if a < b
                ]
                yield i, read[low:high], torch.cat(parts).double()

    def _logits(self, states: Tensor) -> Tensor:
        return unembed(self.passes.recording, states) if self.through_blocks else states


def _rows(side: CleanSide, which: Int[Tensor, "read"]) -> CleanSide | CleanRows:
    return side if len(which) == len(side.logits) else CleanRows(side, which)


def _numbers(comparison: Comparison, targets: Int[Tensor, "token"]) -> Float[Tensor, "read 3"]:
    change = comparison.d
    change = change - change.mean(-1, keepdim=True)  # of vocabulary-centred logits
    own = change[:, targets]
    rest = (change.square().sum(-1) - own.square().sum(-1)).clamp(min=0) / (change.shape[1] - len(targets))
    return torch.stack([comparison.kl, -own.mean(-1), rest], dim=-1)

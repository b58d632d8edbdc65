"""What a model does when vectors are taken from its stream at many tokens of a text at once, text by text."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diagnostics.sae_sites import Passes
from interventions.errors import EditError
from interventions.metrics import CleanRows, CleanSide, Comparison
from interventions.replay import unembed

Change = Callable[[Int[Tensor, "text"]], Float[Tensor, "row d_model"]]
"""Δx at the edited tokens of the texts asked for, text after text; a row of zeros leaves its token as it is."""
_LOGITS, _LOGITS_GPU = 2**24, 2**26  # formed at once
_COMPARED = 2**18  # on the CPU: what fits its caches is several times faster


@dataclass(frozen=True)
class StreamEffects:
    """What came of each change, a number a text, on the CPU; means over the reads are 0 where the change is 0 before them all."""

    kl: Float[Tensor, "change text"]
    """KL(clean ‖ changed) of the next-token distribution, nats, mean over the reads"""
    target_fall: Float[Tensor, "change text"]
    """how far the mean vocabulary-centred logit of the target tokens falls, mean over the reads"""
    other_square: Float[Tensor, "change text"]
    """squared change of a vocabulary-centred logit, mean over all other tokens and the reads"""
    n_edited: Int[Tensor, "change text"]
    """tokens with Δx ≠ 0"""
    norm_sum: Float[Tensor, "change text"]
    """Σ ‖Δx‖ over the text's tokens"""
    square_sum: Float[Tensor, "change text"]
    """Σ ‖Δx‖²"""
    shift: Float[Tensor, "change text d_model"]
    """Σ Δx"""
    n_nonfinite: int
    """reads with a KL that is not finite"""
    passed: int
    """texts that went through the blocks, all changes together"""
    untouched: int
    """texts in which nothing changed: no effect, and no pass"""


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
    """Add each change to the stream of some texts at the site of `passes`, at its edited tokens, and read the effect at `reads`.

    A text in which a change is 0 costs nothing, and reads before its first changed token are 0 exactly: causal attention. Each
    other text costs the blocks above the site and one unembedding a read; the clean unembedding is shared by all changes.
    through_blocks: else full forward passes. batch_tokens: through the blocks at once (default 384 on the CPU, 8192 elsewhere).
    tick: called with a number of (change, text). Raises `EditError` for targets outside the vocabulary and changes of another shape.
    """
    device, vocab = passes.device, passes.model.vocab_size
    ids = torch.as_tensor(list(targets), dtype=torch.long)
    if not len(ids) or int(ids.min()) < 0 or int(ids.max()) >= vocab or len(ids) == vocab:
        raise EditError(f"target tokens {ids.tolist()[:5]}; expected one or more of the vocabulary of {vocab}, not all")
    index = torch.as_tensor(list(texts), device=device)
    sums = torch.zeros(len(changes), len(index), 6, dtype=torch.float64, device=device)
    shift = torch.zeros(len(changes), len(index), passes.model.d_model, dtype=torch.float64, device=device)
    n_reads = reads[index].sum(-1)
    counts = [0, 0, 0]
    for place in _batches(passes, index, len(changes), through_blocks, batch_tokens):
        batch = _Batch(passes, index[place], reads, through_blocks)
        hidden = []
        for i, (name, change) in enumerate(changes.items()):
            delta = batch.checked(name, change(batch.texts))
            length = delta.double().norm(dim=-1)
            doses = torch.stack([length > 0, length, length.square()], dim=-1)
            sums[i, place, 3:] = torch.zeros_like(sums[i, place, 3:]).index_add(0, batch.text, doses)
            shift[i, place] = torch.zeros_like(shift[i, place]).index_add(0, batch.text, delta.double())
            hidden.append(batch.through(name, delta))
            touched = int((sums[i, place, 3] > 0).sum())
            counts = [counts[0], counts[1] + touched, counts[2] + len(place) - touched]
            if tick is not None:
                tick(len(place))
        for i, read, numbers in batch.compared(hidden, ids.to(device)):
            counts[0] += int((~numbers[:, 0].isfinite()).sum())
            sums[i, place, :3] += torch.zeros_like(sums[i, place, :3]).index_add(0, batch.read_text[read], numbers)
    means = (sums[..., :3] / n_reads.clamp(min=1)[:, None]).cpu().unbind(-1)
    n_edited, norm_sum, square_sum = sums[..., 3:].cpu().unbind(-1)
    kl, target_fall, other_square = means
    n_nonfinite, passed, untouched = counts
    return StreamEffects(
        kl,
        target_fall,
        other_square,
        n_edited.long(),
        norm_sum,
        square_sum,
        shift.cpu(),
        n_nonfinite,
        passed,
        untouched,
    )


def _batches(
    passes: Passes, index: Tensor, n_changes: int, through_blocks: bool, tokens: int | None
) -> Iterator[Int[Tensor, "text"]]:
    """Places in `index` of texts that go together, the longest first: what is to run out of memory does so at once."""
    cpu = passes.device.type == "cpu"
    most = tokens or (384 if cpu else 8192)  # few on the CPU: texts of unequal length would be padded
    if not through_blocks:  # all logits of a batch are held
        most = min(most, 8 * (_LOGITS if cpu else _LOGITS_GPU) // ((n_changes + 1) * passes.model.vocab_size))
    order = passes.length[index].argsort(descending=True, stable=True)
    while len(order):
        size = max(1, most // int(passes.length[index[order[0]]]))
        yield order[:size]
        order = order[size:]


class _Batch:
    """Some texts: their edited tokens (`row`), and where effects are read."""

    def __init__(self, passes: Passes, texts: Tensor, reads: Tensor, through_blocks: bool):
        self.passes, self.texts, self.through_blocks = passes, texts, through_blocks
        self.width = int(passes.length[texts].max())
        self.text, self.position = passes.edited[texts, : self.width].nonzero(as_tuple=True)
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

    def through(self, name: str, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Final hidden states (or logits) of the changed stream, and the reads that they belong to; the others are as they were."""
        changed = (delta != 0).any(-1)
        first = torch.full((len(self.texts),), self.width, device=delta.device)
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
        """KL, fall of the targets' and mean square of the other tokens' centred logits, of some reads of some change at a time."""
        cpu, vocab = self.passes.device.type == "cpu", self.passes.model.vocab_size
        many = max(1, (_LOGITS if cpu else _LOGITS_GPU) // vocab)
        few = max(1, _COMPARED // vocab) if cpu else many
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
    change = comparison.d - comparison.d.mean(-1, keepdim=True)  # of vocabulary-centred logits
    own = change[:, targets]
    rest = (change.square().sum(-1) - own.square().sum(-1)).clamp(min=0) / (change.shape[1] - len(targets))
    return torch.stack([comparison.kl, -own.mean(-1), rest], dim=-1)

"""Streams of activations of several sites, from one pass over a text: what sparse autoencoders are trained and judged on."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from interventions.anatomy import at_site, check_site
from interventions.errors import HookError, MechdiagError, SiteError, TextError
from interventions.models import CausalModel, wrap
from interventions.sites import Site
from interventions.texts import Prompts, as_prompts

Autocast = Literal["auto", "bfloat16", "none"]
"""`bfloat16`: the blocks' matrix products run in it; `none`: all in the model's own dtype; `auto`: `bfloat16` where the
hardware multiplies matrices of it (CUDA from compute capability 8, ROCm, CPUs with AMX), else `none`. Only a float32 model
is autocast; any other keeps its dtype."""


class _AllSeen(Exception):
    """Ends a forward pass whose sites have all been seen: no block above the deepest of them runs."""


@dataclass
class _Buffer:
    """Activations of consecutive prompts and of the tokens carried over, and the order in which the kept ones go out."""

    rows: dict[Site, Float[Tensor, "row d_model"]]
    index: Int[Tensor, "row 2"]
    """prompt and position (CPU)"""
    order: Int[Tensor, "kept"]
    """rows (CPU)"""
    n_prompts: int


class ActivationStream(Iterator[Any]):
    """Batches of activations at several sites, from one pass over a text, shuffled in a buffer.

        for batch in ActivationStream(model, prompts, [Site(7), Site(15)]):
            batch[Site(7)]   # Float[Tensor, "row d_model"]

    A batch has exactly `batch_tokens` rows, the same tokens in the same order at every site; on the model's device, float32
    (float64 for a float64 model), detached, a copy of its own. With `with_index` it is `(batch, index)`: index
    `Int[Tensor, "row 2"]` on the CPU, the prompt's place in `prompts` and the position in it.

    A forward pass stops once it has passed the last of the sites: no block above runs, no logits are formed.

    Order: an epoch goes through the prompts in an order drawn from (seed, epoch). Consecutive prompts fill a buffer until it
    holds `buffer_tokens`, or the epoch ends; the buffer is permuted with a generator of (seed, buffer number) and cut into
    batches; what is left over, less than a batch, goes into the next buffer, also across epochs. So every kept token goes out
    once an epoch, but for those of a last short batch, which are dropped and counted. All is drawn on the CPU: the same order
    on every device.

    Memory: a buffer holds (buffer_tokens + the longest prompt) × sites × d_model numbers, 4 bytes each, on the model's
    device; 0.3 GB a site for the default and d_model 576.

    It is an iterator: breaking off and going on loses nothing, and it can be gone through once; make another for a second
    pass. Between two batches no hook stands on the model.

    Raises on making: `TextError` for no prompts, ids outside the vocabulary and a text with less than a batch of tokens;
    `SiteError` for no sites or one that the model does not have; `MechdiagError` for an option out of its range.
    Raises on iterating: `TextError` at the end of a text whose dropped tokens left less than a batch.
    """

    def __init__(
        self,
        model: Any,
        prompts: Prompts | Sequence[Sequence[int]] | Sequence[str],
        sites: Sequence[Site],
        batch_tokens: int = 2048,
        buffer_tokens: int = 131_072,
        sink_filter: float | None = 10.0,
        epochs: int = 1,
        seed: int = 0,
        autocast: Autocast = "auto",
        batch_prompts_tokens: int = 4096,
        skip_first: int = 0,
        with_index: bool = False,
    ):
        """model: anything that `wrap` takes. prompts: `Prompts`, whose special tokens are left out, or lists of token ids.

        sink_filter: a token is dropped at all sites when ‖x‖ > sink_filter × median ‖x‖ at any of them; a site's median
        is that of the first buffer's tokens and is kept from then on; None or 0 keeps all. Tokens not finite at some site are dropped.
        batch_prompts_tokens: tokens of one forward pass, padding included (one prompt at least). skip_first: leaves out the
        first tokens of each prompt.
        """
        self.model: CausalModel = wrap(model)
        self.prompts = as_prompts(prompts, self.model.tokenizer)
        self.sites = tuple(dict.fromkeys(sites))
        self.batch_tokens, self.buffer_tokens, self.batch_prompts_tokens = (
            batch_tokens,
            buffer_tokens,
            batch_prompts_tokens,
        )
        self.sink_filter, self.skip_first = sink_filter or None, skip_first
        self.epochs, self.seed, self.with_index = epochs, seed, with_index
        self._check_options(autocast)
        self.autocast: str = _resolved(autocast, self.model)
        self._read_prompts()
        self._medians: dict[Site, float] | None = None
        self._epoch = self._place = self._number = self._emitted = self._batches = 0
        self._counts = dict.fromkeys(("seen", "special", "skip_first", "not_finite", "sink", "kept"), 0)
        self._counts |= {f"{reason} {site}": 0 for reason in ("not_finite", "sink") for site in self.sites}
        self._counts_before = dict(self._counts)
        empty = torch.empty(0, self.model.d_model, dtype=self.dtype, device=self.model.device)
        self._carried = dict.fromkeys(self.sites, empty)
        self._carried_index = torch.empty(0, 2, dtype=torch.long)
        self._buffer: _Buffer | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations: float32, or float64 for a model that computes in it."""
        return torch.promote_types(self.model.dtype, torch.float32)

    @property
    def max_batches(self) -> int:
        """Batches that all epochs give if the sink filter drops nothing."""
        return self.epochs * int(self._n_candidates.sum()) // self.batch_tokens

    def __iter__(self) -> "ActivationStream":
        return self

    def __next__(self) -> Any:
        while self._buffer is None:  # what the filters leave of a buffer may be less than a batch
            if self._epoch >= self.epochs:
                if self._batches == 0:
                    raise TextError(
                        f"{self._counts['kept']} tokens kept, less than one batch of {self.batch_tokens}; "
                        f"{self.provenance()['tokens']}; give more text, a smaller batch or another filter"
                    )
                raise StopIteration
            self._fill()
            self._leave_spent_buffer()
        start = self._emitted * self.batch_tokens
        which = self._buffer.order[start : start + self.batch_tokens]
        batch, index = _taken(self._buffer.rows, which), self._buffer.index[which]
        self._emitted += 1
        self._batches += 1
        self._leave_spent_buffer()
        return (batch, index) if self.with_index else batch

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on from here; tensors (on the CPU) and plain values, less than one batch in size.

        Where the buffer began, the tokens carried into it, how many batches it has given, the medians, the counts; and what
        the stream was made with, weights' hash included (formed once).
        """
        return {
            "made_with": self._made_with(),
            "epoch": self._epoch,
            "place": self._place,
            "buffer": self._number,
            "emitted": self._emitted,
            "batches": self._batches,
            "carried": {str(site): values.cpu() for site, values in self._carried.items()},
            "carried_index": self._carried_index,
            "medians": None if self._medians is None else {str(site): m for site, m in self._medians.items()},
            "counts": dict(self._counts_before),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken: the batches to come are those that an undisturbed stream would have given.

        Bit for bit on the same machine, device and threads. The buffer that was being read is computed again, here.
        Raises `MechdiagError` for a state of a stream made with other arguments (`epochs` and `with_index` may differ).
        """
        mine, theirs = self._made_with(), state["made_with"]
        if differ := [name for name in mine if mine[name] != theirs.get(name)]:
            seen = "; ".join(f"{name} {theirs.get(name)!r}, here {mine[name]!r}" for name in differ)
            raise MechdiagError(f"the state is of another stream: {seen}; make the stream with the state's arguments")
        self._epoch, self._place, self._number = state["epoch"], state["place"], state["buffer"]
        self._batches, self._emitted = state["batches"], state["emitted"]
        medians = state["medians"]
        self._medians = None if medians is None else {site: medians[str(site)] for site in self.sites}
        self._carried = {
            site: state["carried"][str(site)].to(self.model.device, self.dtype, copy=True) for site in self.sites
        }
        self._carried_index = state["carried_index"].clone()
        self._counts, self._counts_before = dict(state["counts"]), dict(state["counts"])
        self._buffer = None
        if self._emitted:
            self._fill()

    def provenance(self) -> dict[str, Any]:
        """How the stream is made and what became of the tokens so far (of whole buffers): plain values.

        `tokens`: seen = kept + those dropped by `special`, `skip_first`, `not_finite`, `sink`, each token under the first
        reason that holds; kept = emitted + waiting + dropped with the last short batch. `by_site`: the tokens not finite there, the
        sinks among those finite everywhere (a token may be counted at several sites), and the median norm (L2).
        """
        done = self._epoch >= self.epochs
        emitted = self._batches * self.batch_tokens
        left = self._counts["kept"] - emitted
        reasons = ("special", "skip_first", "not_finite", "sink")
        return {
            "text": self.prompts.provenance,
            "model": self.model.name,
            "sites": list(map(str, self.sites)),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            **{name: getattr(self, name) for name in (*_OPTIONS, "epochs")},
            "epochs_done": self._epoch,
            "buffers": self._number + (self._buffer is not None),
            "batches": self._batches,
            "tokens": {
                "seen": self._counts["seen"],
                "kept": self._counts["kept"],
                "emitted": emitted,
                "waiting": 0 if done else left,
                "dropped": {name: self._counts[name] for name in reasons} | {"last short batch": left if done else 0},
            },
            "by_site": {
                str(site): {name: self._counts[f"{name} {site}"] for name in ("not_finite", "sink")}
                | {"median_norm": None if self._medians is None else self._medians[site]}
                for site in self.sites
            },
        }

    def _check_options(self, autocast: str) -> None:
        if not self.sites:
            raise SiteError("no sites; give at least one, such as Site(15)")
        for site in self.sites:
            check_site(self.model, site)
        lowest = {"batch_tokens": 1, "batch_prompts_tokens": 1, "epochs": 1, "skip_first": 0, "sink_filter": 0}
        for name, least in lowest.items():
            if not (getattr(self, name) or 0) >= least:
                raise MechdiagError(f"{name} {getattr(self, name)}; expected {least} or more")
        if self.buffer_tokens < self.batch_tokens:
            raise MechdiagError(
                f"buffer_tokens {self.buffer_tokens} is below batch_tokens {self.batch_tokens}; a buffer holds one batch at "
                "least, and shuffles well when it holds many"
            )
        if autocast not in (known := ("auto", "bfloat16", "none")):
            raise MechdiagError(f"unknown autocast {autocast!r}; known: {', '.join(known)}")

    def _read_prompts(self) -> None:
        """Tokens end to end, which of them may go out, and how many of each prompt do and do not."""
        tokens, special = self.prompts.tokens, self.prompts.special
        length = torch.tensor([len(ids) for ids in tokens], dtype=torch.long)
        if not len(length) or length.tolist() != [len(marks) for marks in special]:
            raise TextError(f"{len(tokens)} prompts, {len(special)} lists of special marks; expected one mark a token")
        self._ids = torch.tensor(list(chain.from_iterable(tokens)), dtype=torch.long)
        n_embed = self.model.hf.get_input_embeddings().weight.shape[0]
        if bool((wrong := (self._ids < 0) | (self._ids >= n_embed)).any()):
            raise TextError(f"token id {int(self._ids[wrong][0])} is outside the vocabulary of {n_embed}")
        start = length.cumsum(0) - length
        prompt = torch.repeat_interleave(torch.arange(len(tokens)), length)
        is_special = torch.tensor(list(chain.from_iterable(special)), dtype=torch.bool)
        skipped = ~is_special & (torch.arange(len(prompt)) - start[prompt] < self.skip_first)
        self._candidate: Bool[Tensor, "token"] = ~(is_special | skipped)
        self._start, self._length = start, length
        self._n_special, self._n_skipped, self._n_candidates = (
            torch.bincount(prompt[which], minlength=len(tokens)) for which in (is_special, skipped, self._candidate)
        )
        if not self.max_batches:
            raise TextError(
                f"{int(self._n_candidates.sum())} tokens in {len(tokens)} prompts ({int(is_special.sum())} special, "
                f"{int(skipped.sum())} skipped beside them), {self.epochs} times, are less than one batch of "
                f"{self.batch_tokens}; give more text or a smaller batch"
            )

    def _made_with(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for part in (self._ids, self._length, self._candidate.long()):
            digest.update(part.numpy().data)
        return {
            "tokens_sha256": digest.hexdigest(),
            "weights_sha256": self.model.weights_hash,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "sites": list(map(str, self.sites)),
            **{name: getattr(self, name) for name in _OPTIONS},
        }

    def _fill(self) -> None:
        """Run the model over the prompts of the buffer that begins here."""
        order = torch.randperm(len(self._length), generator=_generator("prompts", self.seed, self._epoch))[
            self._place :
        ]
        n_carried = len(self._carried_index)
        filled = n_carried + self._n_candidates[order].cumsum(0)
        prompts = order[: int((filled < self.buffer_tokens).sum()) + 1]
        n_rows = n_carried + int(self._n_candidates[prompts].sum())
        size = (n_rows, self.model.d_model)
        rows = {site: torch.empty(size, dtype=self.dtype, device=self.model.device) for site in self.sites}
        for site, values in self._carried.items():
            rows[site][:n_carried] = values
        index = [self._carried_index]
        start = n_carried
        for batch in self._alike(prompts):
            spans = [slice(s, s + n) for s, n in torch.stack([self._start[batch], self._length[batch]], 1).tolist()]
            ids = pad_sequence([self._ids[span] for span in spans], batch_first=True)
            candidate = pad_sequence([self._candidate[span] for span in spans], batch_first=True)
            row, position = candidate.nonzero(as_tuple=True)
            part = {site: values[start : start + len(row)] for site, values in rows.items()}
            self._run(ids, row * ids.shape[1] + position, part)
            index.append(torch.stack([batch[row], position], 1))
            start += len(row)
        self._counts["seen"] += int(self._length[prompts].sum())
        self._counts["special"] += int(self._n_special[prompts].sum())
        self._counts["skip_first"] += int(self._n_skipped[prompts].sum())
        kept = torch.ones(n_rows, dtype=torch.bool)
        if n_rows > n_carried:
            kept[n_carried:] = self._kept({site: values[n_carried:] for site, values in rows.items()})
        # The filters take rows out of an order that does not depend on them.
        shuffled = torch.randperm(n_rows, generator=_generator("buffer", self.seed, self._number))
        self._buffer = _Buffer(rows, torch.cat(index), shuffled[kept[shuffled]], len(prompts))

    def _alike(self, prompts: Int[Tensor, "prompt"]) -> Iterator[Int[Tensor, "batch"]]:
        """The prompts that have a token to give, in batches of similar length."""
        prompts = prompts[self._n_candidates[prompts] > 0]
        prompts = prompts[self._length[prompts].sort(descending=True, stable=True).indices]
        while len(prompts):
            n = max(1, self.batch_prompts_tokens // int(self._length[prompts[0]]))
            yield prompts[:n]
            prompts = prompts[n:]

    @torch.no_grad()
    def _run(
        self, ids: Int[Tensor, "prompt pos"], which: Int[Tensor, "row"], rows: dict[Site, Float[Tensor, "row d_model"]]
    ) -> None:
        """Copy the activations of the tokens `which`, counted through `ids` (padded on the right), to `rows`."""
        device = self.model.device
        ids, which = ids.to(device), which.to(device)
        missing = set(rows)

        def see(hidden: Tensor, site: Site) -> None:
            rows[site].copy_(hidden.flatten(0, 1)[which.to(hidden.device)])
            missing.discard(site)
            if not missing:
                raise _AllSeen

        with ExitStack() as stack:
            # Entered also where it is off: the caller may be in an autocast of their own.
            enabled = self.autocast == "bfloat16"
            stack.enter_context(torch.autocast(device.type, torch.bfloat16, enabled=enabled))
            for site in rows:
                stack.enter_context(at_site(self.model, site, partial(see, site=site)))
            with suppress(_AllSeen):
                self.model.base(input_ids=ids, use_cache=False)
        if missing:
            raise HookError(f"nothing was seen at {', '.join(map(str, sorted(missing)))}: the model did not run there")

    def _kept(self, rows: dict[Site, Float[Tensor, "row d_model"]]) -> Bool[Tensor, "row"]:
        """Which rows are finite everywhere and a sink nowhere, on the CPU; what is dropped is counted."""
        norm = torch.stack([values.norm(dim=-1) for values in rows.values()])
        finite = norm.isfinite()
        whole = finite.all(0)
        if self._medians is None:
            if not bool(whole.any()):
                raise MechdiagError(f"none of the first {len(whole)} tokens is finite at every site; look at the model")
            self._medians = dict(zip(rows, norm[:, whole].median(1).values.tolist(), strict=True))
        sink = torch.zeros_like(finite)
        if self.sink_filter is not None:
            limit = self.sink_filter * torch.tensor([self._medians[site] for site in rows]).to(norm)
            sink = (norm > limit[:, None]) & whole
        kept = whole & ~sink.any(0)
        totals = torch.stack([(~whole).sum(), sink.any(0).sum(), kept.sum(), *(~finite).sum(1), *sink.sum(1)])
        names = [f"{reason} {site}" for reason in ("not_finite", "sink") for site in rows]
        for name, n in zip(["not_finite", "sink", "kept", *names], totals.tolist(), strict=True):
            self._counts[name] += n
        return kept.cpu()

    def _leave_spent_buffer(self) -> None:
        """Carry over what is left of a buffer that has no further batch."""
        buffer = self._buffer
        if buffer is None or (self._emitted + 1) * self.batch_tokens <= len(buffer.order):
            return
        left = buffer.order[self._emitted * self.batch_tokens :]
        self._carried, self._carried_index = _taken(buffer.rows, left), buffer.index[left]
        self._place += buffer.n_prompts
        if self._place == len(self._length):
            self._epoch, self._place = self._epoch + 1, 0
        self._number += 1
        self._emitted = 0
        self._counts_before = dict(self._counts)
        self._buffer = None


_OPTIONS = (
    *("batch_tokens", "buffer_tokens", "sink_filter", "seed", "autocast", "batch_prompts_tokens", "skip_first"),
)
"""What the vectors and their order depend on, beside model, text and sites."""


def _taken(rows: dict[Site, Tensor], which: Int[Tensor, "row"]) -> dict[Site, Float[Tensor, "row d_model"]]:
    """Copies of some rows at every site."""
    on_device = {site: which.to(values.device) for site, values in list(rows.items())[:1]}
    (where,) = on_device.values()
    return {site: values[where] for site, values in rows.items()}


def _generator(*labels: object) -> torch.Generator:
    """A CPU generator whose stream depends on its labels alone."""
    digest = hashlib.blake2b("/".join(map(str, labels)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _resolved(autocast: str, model: CausalModel) -> str:
    """`bfloat16` or `none`."""
    if model.dtype != torch.float32 or autocast == "none":
        return "none"
    return "bfloat16" if autocast == "bfloat16" or _multiplies_bfloat16(model.device) else "none"


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has matrix units for bfloat16."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if hasattr(torch.cpu, "get_capabilities"):
        return bool(torch.cpu.get_capabilities().get("amx_bf16", False))
    asks = getattr(torch.cpu, "_is_amx_tile_supported", None)  # before torch made it public
    return asks is not None and bool(asks())

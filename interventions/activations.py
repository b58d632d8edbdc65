"""Streams of activations of several sites, from one pass over a text: what sparse autoencoders are trained and judged on."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from interventions.errors import HookError, MechdiagError, SiteError, TextError
from interventions.models.anatomy import at_site, check_site
from interventions.models.causal_model import CausalModel
from interventions.models.compat import without_cache
from interventions.models.exclusive import exclusive
from interventions.models.fingerprint import depends_on_batch
from interventions.models.rotary import forget_longer_passes
from interventions.models.wrapping import wrap
from interventions.sites import Site, SiteLike, as_sites
from interventions.texts.prompts import Prompts, prompts_for

AUTOCASTS = ("auto", "bfloat16", "none")
"""`bfloat16`: the blocks' matrix products run in it; `none`: all in the model's own dtype; `auto`: `bfloat16` where the
hardware multiplies matrices of it (CUDA from compute capability 8, ROCm, CPUs with AMX), else `none`. Only a float32 model
is autocast; any other keeps its dtype."""
_OPTIONS = (
    *("batch_tokens", "buffer_tokens", "sink_filter", "seed", "autocast", "batch_prompts_tokens", "skip_first"),
)
"""What the vectors and their order depend on, beside model, text and sites."""
_REASONS = ("special", "skip_first", "not_finite", "sink")


class ActivationStream(Iterator[Any]):
    """Batches of activations at several sites, from one pass over a text, shuffled in a buffer.

        for batch in ActivationStream(model, prompts, [Site(7), Site(15)]):
            batch[Site(7)]   # Float[Tensor, "row d_model"]

    A batch has exactly `batch_tokens` rows, the same tokens in the same order at every site; on the model's device, float32
    (float64 for a float64 model), detached, a copy of its own. With `with_index` it is `(batch, index)`: index
    `Int[Tensor, "row 2"]` on the CPU, the prompt's place in `prompts` and the position in it.

    A forward pass ends once every site has been seen: no block above the deepest runs, no logits are formed.

    Order: an epoch goes through the prompts in an order drawn from (seed, epoch). Consecutive prompts fill a buffer until it
    holds `buffer_tokens`, or the epoch ends; the buffer is permuted with a generator of (seed, buffer number) and cut into
    batches; what is left over, less than a batch, goes into the next buffer, also across epochs. So every kept token goes out
    once for each epoch, but for those of a last short batch, which are dropped and counted. All is drawn on the CPU: the
    same order on every device.

    Memory: a buffer holds (buffer_tokens + the longest prompt) × sites × d_model numbers, 4 bytes each, on the model's
    device; 0.3 GB a site for the default and d_model 576.

    It is an iterator: breaking off and going on loses nothing, and it is gone through once; make another for a second pass.
    Between batches no hook stands on the model.

    Raises on making: `TextError` for no prompts, ids outside the vocabulary and a text of less than a batch of tokens;
    `SiteError` for no sites or one that the model does not have; `MechdiagError` for an option out of its range.
    Raises on iterating: `TextError` at the end of a text of which the filters left less than a batch; `MechdiagError` when
    no token of the first buffer is finite at every site.
    """

    def __init__(
        self,
        model: Any,
        prompts: Any,
        sites: SiteLike | Sequence[SiteLike],
        batch_tokens: int = 2048,
        buffer_tokens: int = 131_072,
        sink_filter: float | None = 10.0,
        epochs: int | None = 1,
        seed: int = 0,
        autocast: str = "auto",
        batch_prompts_tokens: int | None = None,
        skip_first: int = 0,
        with_index: bool = False,
    ):
        """model: anything that `wrap` takes. prompts: `Prompts`, whose special tokens are left out, or what `as_prompts` takes.

        epochs: how often the text is gone through; None: without end, for a consumer that stops by itself.
        sink_filter: a token is dropped at all sites when ‖x‖ > sink_filter × median ‖x‖ at any of them (L2); a site's
        median is that of the first buffer's tokens, fixed from then on; None or 0: no such filter. A token that is not
        finite at some site is dropped at all of them. autocast: one of `AUTOCASTS`. batch_prompts_tokens: tokens of one
        forward pass, padding included, one prompt at least; None takes 1,024 on the CPU, where what fits its caches is
        faster, else 16,384. skip_first: leaves out so many first tokens of each prompt.
        """
        self.model: CausalModel = wrap(model)
        self.prompts = prompts_for(self.model, prompts)
        self.sites = as_sites(sites)
        self.batch_tokens, self.buffer_tokens = batch_tokens, buffer_tokens
        if batch_prompts_tokens is None:
            batch_prompts_tokens = 1024 if self.model.device.type == "cpu" else 16_384
        self.batch_prompts_tokens = batch_prompts_tokens
        self.sink_filter, self.skip_first = sink_filter or None, skip_first
        self.epochs, self.seed, self.with_index = epochs, seed, with_index
        self._check_options(autocast)
        self.autocast = _resolved(autocast, self.model)
        self._text = _Text(self.prompts, skip_first)
        self._check_text()
        self._medians: dict[Site, float] | None = None
        self._epoch = self._place = self._number = 0  # where the buffer begins: in the text, and its number
        self._emitted = self._batches = 0  # batches given by this buffer, by all
        self._counts: Counter[str] = Counter()
        self._counts_before: dict[str, int] = {}
        none = torch.empty(0, self.model.d_model, dtype=self.dtype, device=self.model.device)
        self._carried = dict.fromkeys(self.sites, none)
        self._carried_index = torch.empty(0, 2, dtype=torch.long)
        self._buffer: _Buffer | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations: float32, or float64 for a model that computes in it."""
        return torch.promote_types(self.model.dtype, torch.float32)

    @property
    def _ended(self) -> bool:
        """Whether the text has been gone through as often as it should be; nothing comes of one that gave nothing once."""
        if self.epochs is None:
            return self._epoch > 0 and self._counts["kept"] == 0
        return self._epoch >= self.epochs

    @property
    def max_batches(self) -> int | None:
        """Batches that all epochs give when the sink filter drops nothing and all is finite; None: as many as are asked for."""
        return None if self.epochs is None else self.epochs * int(self._text.n_candidates.sum()) // self.batch_tokens

    def __iter__(self) -> "ActivationStream":
        return self

    def __next__(self) -> Any:
        while self._buffer is None:  # what the filters leave of a buffer may be less than a batch
            if self._ended:
                if self._batches == 0:
                    raise TextError(
                        f"{self._counts['kept']} of {self._counts['seen']} tokens kept, less than one batch of "
                        f"{self.batch_tokens}; dropped: {self.provenance()['tokens']['dropped']}; give more text, a smaller "
                        "batch or another sink_filter"
                    )
                raise StopIteration
            self._fill()
            self._leave_spent_buffer()
        which = self._buffer.order[self._emitted * self.batch_tokens :][: self.batch_tokens]
        batch, index = _taken(self._buffer.rows, which), self._buffer.index[which]
        self._emitted += 1
        self._batches += 1
        self._leave_spent_buffer()
        return (batch, index) if self.with_index else batch

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on from here: tensors (CPU, less than one batch) and plain values.

        Where the buffer began, the tokens carried into it, how many batches it has given, the medians, the counts; and what
        the stream was made with, hashes of text and weights included.
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

        Bit for bit on the same hardware with as many threads. The buffer that was being read is computed again, here.
        Raises `MechdiagError` for a state of a stream made with other arguments (`epochs` and `with_index` may differ).
        """
        mine, theirs = self._made_with(), state["made_with"]
        if differ := [name for name in mine if mine[name] != theirs.get(name)]:
            seen = "; ".join(f"{name} {theirs.get(name)!r}, here {mine[name]!r}" for name in differ)
            raise MechdiagError(f"the state is of another stream: {seen}; make the stream with the state's arguments")
        self._epoch, self._place, self._number = state["epoch"], state["place"], state["buffer"]
        self._emitted, self._batches = state["emitted"], state["batches"]
        medians = state["medians"]
        self._medians = None if medians is None else {site: medians[str(site)] for site in self.sites}
        self._carried = {site: state["carried"][str(site)].to(self.model.device, self.dtype) for site in self.sites}
        self._carried_index = state["carried_index"]
        self._counts, self._counts_before = Counter(state["counts"]), dict(state["counts"])
        self._buffer = None
        if self._emitted:
            self._fill()
            self._leave_spent_buffer()

    def provenance(self) -> dict[str, Any]:
        """How the stream is made, and what became of the tokens of all buffers so far: plain values.

        `tokens`: seen = kept + dropped as `special`, `skip_first`, `not_finite` or `sink`, each token under the first that
        holds; kept = emitted + waiting, or + dropped as `last_short_batch` at the end. `by_site`: tokens not finite there,
        sinks there among those finite everywhere (a token may count at several sites), and the filter's median norm (L2).
        """
        done = self._ended
        emitted = self._batches * self.batch_tokens
        left = self._counts["kept"] - emitted
        return {
            "text": self.prompts.provenance,
            "model": self.model.name,
            "sites": list(map(str, self.sites)),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.model.device),
            **{name: getattr(self, name) for name in (*_OPTIONS, "epochs")},
            "epochs_done": self._epoch,
            "buffers": self._number + (self._buffer is not None),
            "batches": self._batches,
            "tokens": {
                "seen": self._counts["seen"],
                "kept": self._counts["kept"],
                "emitted": emitted,
                "waiting": 0 if done else left,
                "dropped": {name: self._counts[name] for name in _REASONS} | {"last_short_batch": left if done else 0},
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
        lowest = {"batch_tokens": 1, "batch_prompts_tokens": 1, "skip_first": 0, "sink_filter": 0}
        if self.epochs is not None:
            lowest["epochs"] = 1
        for name, least in lowest.items():
            if not (getattr(self, name) or 0) >= least:
                raise MechdiagError(f"{name} {getattr(self, name)}; expected {least} or more")
        if self.buffer_tokens < self.batch_tokens:
            raise MechdiagError(
                f"buffer_tokens {self.buffer_tokens} is below batch_tokens {self.batch_tokens}; expected a buffer of one "
                "batch or more: it shuffles well when it holds many"
            )
        if autocast not in AUTOCASTS:
            raise MechdiagError(f"unknown autocast {autocast!r}; known: {', '.join(AUTOCASTS)}")

    def _check_text(self) -> None:
        text = self._text
        if self.max_batches == 0 or not bool(self._text.n_candidates.any()):
            raise TextError(
                f"{int(text.n_candidates.sum())} tokens in {len(text.length)} prompts ({int(text.n_special.sum())} special "
                f"and {int(text.n_skipped.sum())} skipped ones left out), {self.epochs or 1} times, are less than one batch of "
                f"{self.batch_tokens}; give more text or a smaller batch"
            )

    def _made_with(self) -> dict[str, Any]:
        return {
            "tokens_sha256": self._text.sha256,
            "weights_sha256": self.model.weights_hash,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "sites": list(map(str, self.sites)),
            **{name: getattr(self, name) for name in _OPTIONS},
        }

    def _fill(self) -> None:
        """Run the model over the prompts of the buffer that begins here."""
        text, n_carried = self._text, len(self._carried_index)
        prompts = torch.randperm(len(text.length), generator=_generator("prompts", self.seed, self._epoch))
        prompts = prompts[self._place :]
        filled = n_carried + text.n_candidates[prompts].cumsum(0)
        prompts = prompts[: int((filled < self.buffer_tokens).sum()) + 1]
        n_rows = n_carried + int(text.n_candidates[prompts].sum())
        rows = {site: values.new_empty(n_rows, self.model.d_model) for site, values in self._carried.items()}
        for site, values in self._carried.items():
            rows[site][:n_carried] = values
        index, start = [self._carried_index], n_carried
        most = 1 if depends_on_batch(self.model.hf, int(text.length.max())) else self.batch_prompts_tokens
        for ids, which, found in text.batches(prompts, most):
            part = {site: values[start : start + len(which)] for site, values in rows.items()}
            _run(self.model, ids, which, part, self.autocast == "bfloat16")
            index.append(found)
            start += len(which)
        kept = torch.ones(n_rows, dtype=torch.bool)
        kept[n_carried:] = self._kept({site: values[n_carried:] for site, values in rows.items()})
        self._counts["seen"] += int(text.length[prompts].sum())
        self._counts["special"] += int(text.n_special[prompts].sum())
        self._counts["skip_first"] += int(text.n_skipped[prompts].sum())
        # The filters take rows out of an order that does not depend on them.
        order = torch.randperm(n_rows, generator=_generator("buffer", self.seed, self._number))
        self._buffer = _Buffer(rows, torch.cat(index), order[kept[order]], len(prompts))

    def _kept(self, rows: dict[Site, Float[Tensor, "row d_model"]]) -> Bool[Tensor, "row"]:
        """Which rows are finite everywhere and a sink nowhere (CPU); those and the others are counted."""
        norm = torch.stack([values.norm(dim=-1) for values in rows.values()])
        finite = norm.isfinite()
        everywhere = finite.all(0)
        if self._medians is None:
            if not bool(everywhere.any()):
                raise MechdiagError(
                    f"of the first {len(everywhere)} tokens none is finite at all of {', '.join(map(str, rows))}; run the "
                    "model in a wider dtype, or look at its weights"
                )
            self._medians = dict(zip(rows, norm[:, everywhere].median(1).values.tolist(), strict=True))
        sink = torch.zeros_like(finite)
        if self.sink_filter is not None:
            limit = self.sink_filter * torch.tensor([self._medians[site] for site in rows]).to(norm)
            sink = (norm > limit[:, None]) & everywhere
        kept = everywhere & ~sink.any(0)
        names = ["kept", "not_finite", "sink", *(f"{name} {site}" for name in ("not_finite", "sink") for site in rows)]
        counts = torch.stack([kept.sum(), (~everywhere).sum(), sink.any(0).sum(), *(~finite).sum(1), *sink.sum(1)])
        self._counts.update(dict(zip(names, counts.tolist(), strict=True)))
        return kept.cpu()

    def _leave_spent_buffer(self) -> None:
        """Carry over what is left of a buffer that has no further batch."""
        buffer, start = self._buffer, self._emitted * self.batch_tokens
        if buffer is None or start + self.batch_tokens <= len(buffer.order):
            return
        left = buffer.order[start:]
        self._carried, self._carried_index = _taken(buffer.rows, left), buffer.index[left]
        self._place += buffer.n_prompts
        if self._place == len(self._text.length):
            self._epoch, self._place = self._epoch + 1, 0
        self._number, self._emitted = self._number + 1, 0
        self._counts_before = dict(self._counts)
        self._buffer = None


@dataclass
class _Buffer:
    """Activations of consecutive prompts, after those carried over, and the order in which the kept ones go out."""

    rows: dict[Site, Float[Tensor, "row d_model"]]
    index: Int[Tensor, "row 2"]
    """prompt and position (CPU)"""
    order: Int[Tensor, "kept"]
    """rows (CPU)"""
    n_prompts: int


class _Text:
    """Prompts end to end (CPU), and which of their tokens may go out."""

    def __init__(self, prompts: Prompts, skip_first: int):
        self.length = torch.tensor([len(ids) for ids in prompts.tokens], dtype=torch.long)
        n = len(self.length)
        if not n or self.length.tolist() != [len(marks) for marks in prompts.special]:
            raise TextError(
                f"{n} prompts and {len(prompts.special)} lists of special marks; expected at least one prompt, and as "
                "many marks as tokens in each"
            )
        self.ids = torch.tensor(list(chain.from_iterable(prompts.tokens)), dtype=torch.long)
        self.start = self.length.cumsum(0) - self.length
        prompt = torch.repeat_interleave(torch.arange(n), self.length)
        special = torch.tensor(list(chain.from_iterable(prompts.special)), dtype=torch.bool)
        skipped = ~special & (torch.arange(len(prompt)) - self.start[prompt] < skip_first)
        self.candidate = ~(special | skipped)
        self.n_special, self.n_skipped, self.n_candidates = (
            torch.bincount(prompt[which], minlength=n) for which in (special, skipped, self.candidate)
        )
        digest = hashlib.sha256()
        for part in (self.ids, self.length, self.candidate):
            digest.update(part.numpy().data)
        self.sha256 = digest.hexdigest()

    def batches(
        self, prompts: Int[Tensor, "some"], most: int
    ) -> Iterator[tuple[Int[Tensor, "prompt pos"], Int[Tensor, "row"], Int[Tensor, "row 2"]]]:
        """Prompts that have a token to give, in batches of similar length and `most` tokens with their padding.

        Ids padded on the right; the tokens to give, counted through them; and their prompts and positions.
        """
        prompts = prompts[self.n_candidates[prompts] > 0]
        prompts = prompts[self.length[prompts].sort(descending=True, stable=True).indices]
        while len(prompts):
            batch = prompts[: max(1, most // int(self.length[prompts[0]]))]
            prompts = prompts[len(batch) :]
            spans = [slice(s, s + n) for s, n in torch.stack([self.start[batch], self.length[batch]], 1).tolist()]
            # Attention is causal, so what stands on the right of a prompt changes nothing in it.
            ids = pad_sequence([self.ids[span] for span in spans], batch_first=True)
            candidate = pad_sequence([self.candidate[span] for span in spans], batch_first=True)
            row, position = candidate.nonzero(as_tuple=True)
            yield ids, row * ids.shape[1] + position, torch.stack([batch[row], position], 1)


class _AllSeen(Exception):
    """Ends a forward pass whose sites have all been seen."""


@torch.no_grad()
def run_to_sites(
    model: CausalModel,
    ids: Int[Tensor, "prompt pos"],
    sites: Iterable[Site],
    see: Callable[[Site, Float[Tensor, "prompt pos d_model"]], object],
) -> None:
    """A forward pass that hands what stands at each site to `see`, and ends with the last of the sites.

    Raises `HookError` where the pass did not run through one of them. Check sites (`check_site`) before.
    """
    missing = set(sites)

    def take(hidden: Tensor, site: Site) -> None:
        see(site, hidden)
        missing.discard(site)
        if not missing:
            raise _AllSeen

    with exclusive(model), ExitStack() as stack:
        for site in dict.fromkeys(sites):
            stack.enter_context(at_site(model, site, partial(take, site=site)))
        forget_longer_passes(model.hf)
        with suppress(_AllSeen):
            model.base(input_ids=ids, **without_cache(model.base))
    if missing:
        raise HookError(
            f"nothing was seen at {', '.join(map(str, sorted(missing)))}; the forward pass did not run there"
        )


def _run(
    model: CausalModel,
    ids: Int[Tensor, "prompt pos"],
    which: Int[Tensor, "row"],
    rows: dict[Site, Float[Tensor, "row d_model"]],
    bfloat16: bool,
) -> None:
    """Copy the activations of the tokens `which`, counted through `ids`, to `rows`."""
    ids, which = ids.to(model.device), which.to(model.device)
    # `exclusive` first: it takes away an autocast that the caller may stand in, and would take away this one.
    with exclusive(model), torch.autocast(model.device.type, torch.bfloat16 if bfloat16 else None, enabled=bfloat16):
        run_to_sites(
            model, ids, rows, lambda site, hidden: rows[site].copy_(hidden.flatten(0, 1)[which.to(hidden.device)])
        )


def _taken(rows: dict[Site, Tensor], which: Int[Tensor, "row"]) -> dict[Site, Float[Tensor, "row d_model"]]:
    """Copies of some rows at every site."""
    which = which.to(next(iter(rows.values())).device)
    return {site: values[which] for site, values in rows.items()}


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
    asked = getattr(torch.cpu, "_is_amx_tile_supported", None)  # all there is before torch made it public
    return asked is not None and bool(asked())

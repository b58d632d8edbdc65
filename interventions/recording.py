"""One clean pass, kept: activations at the sites asked for, keys and values, final hidden states."""

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutputWithPast

from interventions.errors import MechdiagError, ModelError, SiteError, TextError, count, is_out_of_memory, one_line
from interventions.models.anatomy import at_site, check_site, site_columns
from interventions.models.causal_model import CausalModel
from interventions.models.causality import LEAK, check_causal
from interventions.models.compat import cache_name, cache_understood
from interventions.models.exclusive import exclusive, holding
from interventions.models.fingerprint import Fingerprint, fingerprint, own_code
from interventions.models.memory import Budget
from interventions.models.remote import NO_KEYS, recorded
from interventions.models.rotary import depends_on_length, forget_longer_passes
from interventions.models.spilled import FINAL, Name, OfBlocks, Part, Sites, Spilled
from interventions.models.uploads import upload
from interventions.models.wrapping import wrap
from interventions.sites import Site
from interventions.texts.inputs import check_prompts, read_prompts
from interventions.texts.prompts import Prompts

_AS_RECORDED = "as recorded"


@dataclass(eq=False)
class Recording:
    """What is kept of the clean pass over some prompts.

    A position counts from the prompt's own first token, whatever padding it came with; beyond a prompt's length every
    tensor here is padding. Everything is on the model's device and in its dtype, but `length`, which is on the CPU, and each block's
    keys and values, which are on the block's. Of more prompts than its budget holds, tensors of all prompts are put together each time
    they are asked for (see `Budget`).
    """

    model: CausalModel
    tokens: Int[Tensor, "prompt pos"]
    """token ids, right-padded with 0"""
    length: Int[Tensor, "prompt"]
    """tokens of each prompt (CPU)"""
    activations: Mapping[Site, Float[Tensor, "prompt pos width"]]
    """at each site asked for (of a head or some neurons: all of them), at the beginning of its block (where replay of sites inside a block enters), and after
    the last block (where direct effects start)"""
    final_hidden: Float[Tensor, "prompt pos d_model"]
    """after the final norm: the unembedding turns it into the clean next-token distribution"""
    keys: Sequence[Tensor] | None
    """for each block `[prompt, kv_head, pos, d_head]`; None when the model has none or they were not asked for"""
    values: Sequence[Tensor] | None
    output_type: type = BaseModelOutputWithPast
    """what the model without its unembedding returns"""
    why_no_keys: str | None = None
    """why keys and values could not be kept although they were asked for, or None"""
    fingerprint: Fingerprint | None = None
    """what the model was when it was recorded"""
    unsteady: frozenset[str] = frozenset()
    """parts of the fingerprint that the clean pass itself changed; these are not compared"""
    by_length: str | None = None
    """the kind of rotary embedding whose frequencies differ between prompts of these lengths, or None"""
    own_code: tuple[str, ...] = ()
    """modules that have hooks or a `forward` of the user's own. Such code may count positions or prompts, so every full pass
    takes one prompt alone"""
    spilled: Spilled | None = None
    """what is kept, where it is more than the budget; None: everything is above"""

    def __repr__(self) -> str:
        counts = (len(self.length), "prompt"), (int(self.length.sum()), "token"), (len(self.activations), "site")
        return f"Recording({', '.join(count(*each) for each in counts)})"

    def __getattr__(self, name: str) -> Any:
        if name != "final_hidden" or self.__dict__.get("spilled") is None:
            raise AttributeError(name)
        return self.__dict__["spilled"].whole(FINAL)

    @property
    def recorded_again(self) -> int:
        """Prompts that were recorded again because they were beyond the budget, each time."""
        return 0 if self.spilled is None else self.spilled.recorded_again

    @property
    def cache_bytes(self) -> int:
        """What keys and values take, and, of a recording beyond its budget, everything else that is kept."""
        if self.spilled is not None:
            return self.spilled.nbytes
        return sum(t.nbytes for t in (*(self.keys or ()), *(self.values or ())))

    def __getstate__(self) -> dict[str, Any]:
        """A copy is of its own copy of the model, which has another fingerprint: kept is whether this one is still what it was."""
        state = {**vars(self)}
        if self.fingerprint is not None and not self._changed():
            state["fingerprint"] = _AS_RECORDED
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if state["fingerprint"] == _AS_RECORDED:
            self.fingerprint = fingerprint(self.model.hf)

    def check_rows(self, prompt: Tensor, position: Tensor) -> None:
        """Raise `SiteError` when a row lies outside its prompt."""
        if prompt.numel() == 0:
            raise SiteError("no rows; give at least one (prompt, position)")
        if prompt.shape != position.shape or prompt.ndim != 1:
            raise SiteError(
                f"prompts {tuple(prompt.shape)} and positions {tuple(position.shape)}; expected one of each a row"
            )
        n_prompt = len(self.length)
        absent = (prompt < 0) | (prompt >= n_prompt)
        if bool(absent.any()):
            raise SiteError(
                f"prompt {int(prompt[absent][0])} does not exist; the recording has {n_prompt} prompts, from 0"
            )
        outside = (position < 0) | (position >= self.length[prompt])
        if bool(outside.any()):
            i = int(outside.nonzero()[0])
            raise SiteError(
                f"position {int(position[i])} lies outside prompt {int(prompt[i])}, which has {int(self.length[prompt[i]])} tokens"
            )

    def held(self, *, traces: bool = False) -> AbstractContextManager[object]:
        """Hold the model for one thread (see `exclusive`). traces: a model that runs remotely will do.

        Raises `ModelError` when it is not what was recorded.
        """
        return holding(self.model) if traces and self.model.remote else exclusive(self.model, self._check_model)

    def _check_model(self) -> None:
        if changed := self._changed():
            raise ModelError(
                f"the model's {' and '.join(sorted(changed))} changed after it was recorded; record it again, with everything "
                "in place that should act during the measurement"
            )

    def _changed(self) -> set[str]:
        """What of the model is not as it was recorded."""
        if self.fingerprint is None:
            return set()
        return set(self.fingerprint.changed(fingerprint(self.model.hf))) - self.unsteady

    def has(self, site: Site) -> bool:
        """Whether a site was recorded."""
        return site.whole in self.activations

    def of(self, site: Site) -> Float[Tensor, "prompt pos width"]:
        """Activations at a site. Raises `SiteError` for one that was not recorded."""
        self._check_recorded(site)
        return self._part(site, self.activations[site.whole])

    def at(self, site: Site, prompt: Tensor, position: Tensor) -> Float[Tensor, "row width"]:
        """Activations of single tokens. Raises `SiteError` for a site that was not recorded or a row outside its prompt."""
        self._check_recorded(site)
        prompt, position = prompt.cpu(), position.cpu()
        self.check_rows(prompt, position)
        return self._part(site, self.rows((site.whole,), torch.stack([prompt, position]).numpy())[0])

    def rows(self, names: Sequence[Site | str], at: Int[np.ndarray, "2 row"]) -> list[Float[Tensor, "row width"]]:
        """What is kept of single tokens at sites, and `FINAL` (after the final norm); prompts and positions on the CPU."""
        if self.spilled is not None:
            return [self.spilled.rows(name, at[0], at[1], self.tokens.device) for name in names]
        prompt, position = upload(at, self.tokens.device)
        found = [self.activations[name] if isinstance(name, Site) else self.final_hidden for name in names]
        return [whole[prompt, position] for whole in found]

    def clean_keys(
        self, layer: int, prompts: Int[np.ndarray, "group"], on_device: Int[Tensor, "group"], n: int
    ) -> list[Float[Tensor, "group kv_head n d_head"]]:
        """A block's keys and values of some prompts' first `n` tokens. on_device: the prompts again, where the block is."""
        if self.spilled is not None:
            return [self.spilled.of((what, layer), prompts, n) for what in ("keys", "values")]
        assert self.keys is not None and self.values is not None
        return [kept[layer][:, :, :n].index_select(0, on_device) for kept in (self.keys, self.values)]

    def _check_recorded(self, site: Site) -> None:
        if not self.has(site):
            raise SiteError(
                f"site {site} was not recorded; recorded: {', '.join(map(str, self.activations)) or 'none'}"
            )

    def _part(self, site: Site, values: Float[Tensor, "*any whole"]) -> Float[Tensor, "*any width"]:
        """The numbers of one head, or of some neurons."""
        if site.whole == site:
            return values
        check_site(self.model, site, may_run=False)
        columns = site_columns(self.model, site, self.tokens.shape[1])
        return values if columns is None else values[..., upload(columns, values.device)]

    def entering(self, first_block: int, prompt: Tensor, position: Tensor) -> Float[Tensor, "row d_model"]:
        """What block `first_block` reads at single tokens. Raises `SiteError` where neither side of it was recorded."""
        site = Site(first_block, "resid_pre")
        if site not in self.activations and first_block:
            below = Site(first_block - 1)
            site = below if below in self.activations else site
        return self.at(site, prompt, position)


def record(
    model: Any,
    tokens: Any,
    sites: Sequence[Site] = (),
    *,
    attention_mask: Any = None,
    keep_cache: bool = True,
    batch_prompts: int = 16,
    budget: Budget | None = None,
) -> Recording:
    """One clean pass over the prompts, without computing logits.

    tokens: `Prompts`, texts, lists or arrays of token ids, or a tokenizer's output; attention_mask: ones for tokens, zeros for
    padding on either side, which is taken off: positions count from a prompt's own first token (see `read_prompts`).
    sites: where to keep activations. `keep_cache=False` leaves out keys and values (no replay then).
    batch_prompts: prompts in one pass; 1 is used where a prompt's activations depend on the others of its batch.
    Memory: keys and values take 2 · blocks · kv_heads · d_head numbers a token. Beyond a budget of bytes, prompts are kept in host
    memory, then recorded again when they are needed, with a warning (see `Budget`; default: a share of free memory).
    Hooks of your own that should act during the measurement must be on the model now: a model that changes afterwards is refused.
    Raises `ModelError` for a model that is not causal (see `check_causal`); `SiteError` for a site the model does not have;
    `TextError` for what is no list of prompts, an empty prompt, ids outside the vocabulary and more tokens than the model has
    positions, and `batch_prompts` below 1. Warns as `check_prompts` does, and where it had to record each prompt alone.
    """
    model = wrap(model)
    model.shapes = check_causal(model)  # again: it may have been changed since it was wrapped
    for site in sites:
        check_site(model, site)
    every = [site.whole for site in sites] + [site.entry for site in sites]
    kept = tuple(dict.fromkeys([*every, Site(model.n_layers - 1)]))
    if batch_prompts < 1:
        raise TextError(f"batch_prompts = {batch_prompts}; expected 1 or more prompts in a pass")
    prompts, _ = read_prompts(tokens.tokens if isinstance(tokens, Prompts) else tokens, model.tokenizer, attention_mask)
    check_prompts(model, prompts)
    length = torch.tensor([len(p) for p in prompts])
    ids = pad_sequence([torch.tensor(p) for p in prompts], batch_first=True).to(model.device)
    recording = Recording(model, ids, length, {}, torch.empty(*ids.shape, 0, device=ids.device), None, None)
    recording.why_no_keys = NO_KEYS if model.remote else None
    recording.own_code = () if model.remote else tuple(own_code(model.hf))
    recording.by_length = depends_on_length(model.hf, int(length.max()))
    with holding(model):
        before = None if model.remote else fingerprint(model.hf)
        with nullcontext() if model.remote else exclusive(model):
            if recording.own_code or recording.by_length:
                batch_prompts = 1
            budget = budget or Budget()
            _fill(recording, kept, keep_cache, batch_prompts, budget)
            if off := _off_alone(recording, batch_prompts):
                warnings.warn(
                    f"{model.name} gives a prompt beside longer ones other activations than alone (off by {off:.1e} of their norm): "
                    "each prompt is recorded alone, which takes longer",
                    stacklevel=2,
                )
                _fill(recording, kept, keep_cache, 1, budget)
        if before is not None:
            recording.fingerprint = fingerprint(model.hf)
            recording.unsteady = frozenset(before.changed(recording.fingerprint))
    if recording.spilled is not None:
        recording.spilled.need(np.zeros(0, dtype=int))
    if (spilled := recording.spilled) is not None and spilled.kept < spilled.n:
        warnings.warn(
            f"{model.name}: {spilled.n - spilled.kept} of {spilled.n} prompts do not fit the budget for what is recorded "
            f"({spilled.on_device} are on the device, {spilled.in_host} in host memory); they are recorded again each time that they are "
            "needed, which is slow: record fewer prompts at once, or raise MECHDIAG_HOST_BYTES",
            stacklevel=2,
        )
    return recording


def _fill(recording: Recording, kept: Sequence[Site], keep_cache: bool, batch_prompts: int, budget: Budget) -> None:
    """The clean pass, some prompts at a time, as far as they are kept."""
    model, ids, length = recording.model, recording.tokens, recording.length
    recording.activations, recording.keys, recording.values, recording.spilled = {}, None, None, None
    recording.final_hidden = torch.empty(*ids.shape, 0, device=ids.device)

    for start in range(0, len(length), batch_prompts):
        parts = _run(recording, kept, keep_cache, slice(start, start + batch_prompts))
        if start == 0:
            recording.spilled = _spilled(
                recording, parts, batch_prompts, budget, partial(_again, recording, kept, keep_cache, batch_prompts)
            )
        if (spilled := recording.spilled) is None:
            _store(recording, start, parts)
            continue
        for name, part in parts.items() if start < spilled.kept else ():
            spilled.put(name, start, part)
        if start + batch_prompts >= spilled.kept:
            break
    if recording.why_no_keys is not None:
        recording.keys = recording.values = None
    if (spilled := recording.spilled) is not None:
        of_blocks = [name for name in spilled.names if isinstance(name, tuple)]
        if recording.why_no_keys is not None:
            spilled.forget(of_blocks)
        elif of_blocks:
            recording.keys, recording.values = (OfBlocks(spilled, what, model.n_layers) for what in ("keys", "values"))
        recording.activations = Sites(spilled)
        del recording.final_hidden


def _run(recording: Recording, kept: Sequence[Site], keep_cache: bool, batch: slice) -> dict[Name, Part]:
    """The clean pass over a batch of prompts; without keys and values where the model does not give them."""
    width = int(recording.length[batch].max())
    one_pass = partial(_clean_pass, recording.model, recording.tokens[batch, :width], kept)
    if keep_cache and recording.why_no_keys is None:
        try:
            parts = _parts(recording, *one_pass(True))
            if recording.why_no_keys is None:
                return parts  # else blocks may have shared a cache, and what they gave is not theirs
        except (
            TypeError,
            ValueError,
            IndexError,
            RuntimeError,
            AttributeError,
            KeyError,
            NotImplementedError,
        ) as error:
            if isinstance(error, MechdiagError) or is_out_of_memory(error):
                raise
            recording.why_no_keys = f"its forward pass does not take an ordinary cache ({one_line(error)})"
    return _parts(recording, *one_pass(False))


def _again(recording: Recording, kept: Sequence[Site], keep_cache: bool, size: int, number: int) -> dict[Name, Part]:
    """A batch of `size` prompts recorded again. Raises `ModelError` where the model is not what it was."""
    with recording.held():
        return _run(recording, kept, keep_cache, slice(number * size, (number + 1) * size))


def _spilled(
    recording: Recording, parts: dict[Name, Part], batch: int, budget: Budget, again: Callable[[int], dict[Name, Part]]
) -> Spilled | None:
    """Where prompts are to be kept, by the first batch's tensors; None where everything fits on the devices."""
    n, longest = recording.tokens.shape
    each: Counter[torch.device] = Counter()
    for value, axis in parts.values():
        each[value.device] += value[0].nbytes // value.shape[axis] * longest
    fit = lambda room, size: min(n, room // max(1, size) // batch * batch)  # noqa: E731
    full = lambda room, size: room >= n * size  # noqa: E731
    if all(full(budget.on(device), size) for device, size in each.items()):
        return None
    on_device = min(fit(budget.on(device), size) for device, size in each.items())
    room = budget.in_host_memory(recording.model.device)
    total = sum(each.values())
    in_host = n - on_device
    once = (
        recording.own_code or recording.model.remote
    )  # code of the user's own may count passes; remote ones wait their turn
    if not once and not full(room, total * in_host / n):
        in_host = min(in_host, fit(room, total))
    spilled = Spilled(n, longest, batch, on_device, in_host, again)
    spilled.expect(parts)
    return spilled


def _off_alone(recording: Recording, batch_prompts: int) -> float:
    """How far a recorded prompt is from what the model gives it alone, as a share of the norm; 0.0 where rounding explains it.

    Compares the shortest prompt of the first batch that holds prompts of several lengths.
    """
    model, length = recording.model, recording.length
    for start in range(0, len(length), batch_prompts):
        some = length[start : start + batch_prompts]
        if int(some.min()) < int(some.max()):
            prompt = start + int(some.argmin())
            ids = recording.tokens[prompt : prompt + 1, : int(some.min())]
            alone = _clean_pass(model, ids, (), False)[1].last_hidden_state[0].float()
            at = np.stack([np.full(len(alone), prompt), np.arange(len(alone))])
            off = (recording.rows((FINAL,), at)[0].float() - alone).norm(dim=-1)
            leak = float((off / alone.norm(dim=-1).clamp(min=1e-30)).max())
            return leak if leak > LEAK.get(model.dtype, max(LEAK.values())) else 0.0
    return 0.0


@torch.no_grad()
def _clean_pass(model: CausalModel, ids: Tensor, sites: Sequence[Site], keep_cache: bool):
    from transformers import DynamicCache

    if model.remote:
        return recorded(model, ids, sites)
    seen: dict[Site, Tensor] = {}
    with ExitStack() as stack:
        for site in sites:

            def keep(hidden: Tensor, site: Site = site) -> None:
                seen[site] = hidden

            stack.enter_context(at_site(model, site, keep))
        # No config: layers of full length, also where the model would slide.
        cache, name = DynamicCache() if keep_cache else None, cache_name(model.base)
        stack.enter_context(cache_understood(model.base))
        kept = {} if name is None else {name: cache, "use_cache": keep_cache}
        forget_longer_passes(model.hf)
        output = model.base(input_ids=ids, **kept)
    output.last_hidden_state = output.last_hidden_state.to(model.device)
    missing = [str(site) for site in sites if site not in seen]
    if missing:
        raise SiteError(f"block did not run, nothing recorded at {', '.join(missing)}")
    return seen, output, cache


def _parts(recording: Recording, seen: dict[Site, Tensor], output: Any, cache: Any) -> dict[Name, Part]:
    """What a pass over some prompts gave, by name."""
    recording.output_type = type(output)
    final, longest = output.last_hidden_state, recording.tokens.shape[1]
    parts: dict[Name, Part] = {FINAL: Part(final, 1)}
    for site, value in seen.items():
        if site.point == "pattern":  # as many weights as the longest of all prompts has tokens
            width = final.shape[1]
            value = pad(value.unflatten(-1, (-1, width)), (0, longest - width)).flatten(-2)
        parts[site] = Part(value, 1)
    if cache is None:
        return parts
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    if len(layers) != recording.model.n_layers or any(
        k is None or k.ndim != 4 or k.shape[2] != final.shape[1] for k, _ in layers
    ):
        recording.why_no_keys = "not every block keeps keys and values, one of each a token"
        return parts
    for i, (keys, values) in enumerate(layers):
        parts |= {("keys", i): Part(keys, 2), ("values", i): Part(values, 2)}
    return parts


def _store(recording: Recording, first: int, parts: dict[Name, Part]) -> None:
    """Keep what a batch gave, prompts from `first` on, in tensors of all prompts."""
    shape = recording.tokens.shape

    def put(whole: Tensor | None, part: Part) -> Tensor:
        value, axis = part
        if whole is None:
            sizes = [shape[0], *value.shape[1:]]
            sizes[axis] = shape[1]
            whole = value.new_zeros(sizes)
        whole[first : first + len(value)].narrow(axis, 0, value.shape[axis]).copy_(value)
        return whole

    final = recording.final_hidden
    recording.final_hidden = put(final if final.shape[2] else None, parts[FINAL])
    kept: Any = recording.activations
    for name, part in parts.items():
        if isinstance(name, Site):
            kept[name] = put(kept.get(name), part)
    for what in ("keys", "values"):
        layers = [parts[what, i] for i in range(recording.model.n_layers) if (what, i) in parts]
        if layers:
            old = getattr(recording, what) or [None] * len(layers)
            setattr(recording, what, [put(*each) for each in zip(old, layers, strict=True)])

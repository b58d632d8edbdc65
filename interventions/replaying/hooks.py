"""The reference path: the same rows through full forward passes, with each framework's own hooks.

Replay is checked against it, and models that replay does not support use it. `fwd_hooks` and `edit_in_trace` put any edit
into a TransformerLens run or an nnsight trace of the user's own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interventions.errors import EditError, HookError
from interventions.models.anatomy import adder, at_site, check_site
from interventions.models.causal_model import CausalModel
from interventions.models.exclusive import exclusive
from interventions.models.rotary import forget_longer_passes
from interventions.models.wrapping import wrap
from interventions.recording import Recording
from interventions.replaying.replay import Branches
from interventions.sites import Site

Edit = Callable[[Tensor], Tensor]
"""A pure function of vectors `[prompt, d_model]`, one for each prompt of the batch (or `[prompt, pos, d_model]`: every position)."""
Position = int | Int[Tensor, "prompt"] | None
"""The same token index for each prompt (negative: from the end), one for each, or None for every position at once."""


def edit_at(
    hidden: Float[Tensor, "prompt pos d_model"], edit: Edit, position: Position
) -> Float[Tensor, "prompt pos d_model"]:
    """A copy of the stream with `edit` applied at a position. Raises `EditError` when the edit gives another shape."""
    if position is None:
        new = edit(hidden)
        if new.shape != hidden.shape:
            raise EditError(f"the edit gave shape {tuple(new.shape)}; expected {tuple(hidden.shape)}")
        return new.to(hidden)
    row = torch.arange(len(hidden), device=hidden.device)
    where = torch.as_tensor(position, device=hidden.device).expand(len(hidden))
    old = hidden[row, where]
    new = edit(old)
    if new.shape != old.shape:
        raise EditError(
            f"the edit gave shape {tuple(new.shape)}; expected {tuple(old.shape)}, one vector for each prompt"
        )
    return hidden.index_put((row, where), new.to(hidden))


@contextmanager
def fwd_hooks(
    site: Site, edit: Edit, position: Position = None, *, may_change_nothing: bool = False
) -> Iterator[list[tuple[str, Any]]]:
    """TransformerLens hooks that apply `edit` at a site, for `run_with_hooks(fwd_hooks=…)`.

        with fwd_hooks(Site(15), lambda x: swap_norm(x, source), position=7) as hooks:
            logits = bridge.run_with_hooks(tokens, fwd_hooks=hooks)

    Raises on leaving: `HookError` when the hook did not fire, `EditError` when the edit changed nothing.
    """
    changed: list[Tensor] = []
    entered: list[Tensor] = []
    thread = get_ident()

    def enter(hidden: Tensor, hook: Any) -> None:
        if get_ident() == thread:
            entered[:] = [hidden]

    def apply(added: Tensor, hook: Any) -> Tensor | None:
        if get_ident() != thread:  # another thread's own forward pass
            return None
        before = entered[0] if entered else None
        new = _edited(site, added, before, edit, position)
        changed.append((new != added).any())
        return new

    if site.point == "resid_mid":
        yield [(site.entry.hook_name, enter), (Site(site.layer, "attn_out").hook_name, apply)]
    else:
        yield [(site.hook_name, apply)]
    if not changed:
        raise HookError(f"the hook at {site.hook_name} did not fire; check that the run reaches block {site.layer}")
    if not may_change_nothing and not bool(torch.stack(changed).any()):
        raise EditError(f"the edit at {site.hook_name} changed nothing; if that is meant, pass may_change_nothing=True")


def _edited(site: Site, added: Tensor, entered: Tensor | None, edit: Edit, position: Position) -> Tensor:
    """The value at a site after an edit. At `resid_mid`, where only the output of attention can be changed, the changed output."""
    if site.point != "resid_mid":
        return edit_at(added, edit, position)
    assert entered is not None
    stream = entered + added
    return added + (edit_at(stream, edit, position) - stream)


def edit_in_trace(
    model: Any, site: Site, edit: Edit, position: Position = None, *, may_change_nothing: bool = False
) -> None:
    """Apply `edit` at a site inside an nnsight trace.

        with model.trace(tokens):
            edit_in_trace(model, Site(15), lambda x: swap_norm(x, source), position=7)
            logits = model.output.logits.save()

    nnsight itself raises when the block does not run, or had already run. Raises `EditError` when the edit changed nothing.
    """
    causal = wrap(model)
    check_site(causal, site, may_run=False)
    block = _envoy(causal, model, causal.blocks[site.layer])
    if site.point == "resid_pre":
        hidden = block.input
        new = edit_at(hidden, edit, position)
        block.input = new
    else:
        entered = None if site.point == "resid_post" else block.input
        module = block if site.point == "resid_post" else _envoy(causal, model, adder(causal, site))
        output = module.output
        value = output[0] if isinstance(output, tuple) else output
        hidden = value if entered is None else value.view(entered.shape)
        new = _edited(site, hidden, entered, edit, position)
        whole = new.reshape(value.shape)
        module.output = (whole, *output[1:]) if isinstance(output, tuple) else whole
    if not may_change_nothing and not bool((new != hidden).any()):
        raise EditError(f"the edit at {site.hook_name} changed nothing; if that is meant, pass may_change_nothing=True")


def _envoy(model: CausalModel, handle: Any, module: nn.Module) -> Any:
    path = next(name for name, found in model.hf.named_modules() if found is module)
    envoy = handle
    for part in path.split("."):
        envoy = envoy[int(part)] if part.isdigit() else getattr(envoy, part)
    return envoy


@contextmanager
def torch_hook(model: CausalModel, site: Site, edit: Edit, position: Position = None) -> Iterator[None]:
    """Apply `edit` at a site of the plain module in every pass of this thread. Raises `HookError` on leaving when it did not fire."""
    fired: list[bool] = []

    def apply(hidden: Tensor) -> Tensor:
        fired.append(True)
        return edit_at(hidden, edit, position)

    with at_site(model, site, apply):
        yield
    if not fired:
        raise HookError(f"the hook at {site} did not fire; check that the run reaches block {site.layer}")


def hooked_logits(
    model: CausalModel,
    tokens: Int[Tensor, "prompt pos"],
    site: Site | None,
    edit: Edit | None,
    position: Position = None,
) -> Float[Tensor, "prompt pos vocab"]:
    """Logits of one full forward pass with `edit` at a site, by the wrapper's own hooks (no edit: clean)."""
    with exclusive(model):
        forget_longer_passes(model.hf)
        if site is None or edit is None:
            if model.wrapper == "transformer_lens":
                return model.handle(tokens)
            return model.hf(input_ids=tokens).logits
        if model.wrapper == "transformer_lens":
            with fwd_hooks(site, edit, position, may_change_nothing=True) as hooks:
                return model.handle.run_with_hooks(tokens, fwd_hooks=hooks)
        if model.wrapper == "nnsight":
            with model.handle.trace(tokens):
                edit_in_trace(model.handle, site, edit, position, may_change_nothing=True)
                logits = model.handle.output.logits.save()
            return logits
        with torch_hook(model, site, edit, position):
            return model.hf(input_ids=tokens).logits


class Forwarded(NamedTuple):
    """What full forward passes gave at the tokens that are read."""

    logits: Float[Tensor, "read vocab"]
    stream: Float[Tensor, "read d_model"]
    """after the last block, before the final norm"""


def reference_forward(
    recording: Recording,
    site: Site,
    branches: Branches,
    vectors: Float[Tensor, "edit d_model"] | None,
    read: Int[np.ndarray, "read"],
) -> Forwarded:
    """One full forward pass of each row's prompt with `vectors` at its edited tokens (None: clean), seen at the tokens `read`.

    One pass for all rows given, whose prompts must be equally long; the caller bounds their number. Prompts are run whole,
    whatever is read of them, since a hook of the user's own may count from the end.
    """
    model = recording.model
    device, last = model.device, Site(model.n_layers - 1)
    tokens = recording.tokens[torch.from_numpy(branches.prompt).to(device), : _lengths(recording, branches)[0]]

    def at(which: np.ndarray) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(np.stack([branches.row, branches.position])[:, which]).to(device))

    def put(hidden: Tensor) -> Tensor:
        assert vectors is not None
        return hidden.index_put(at(branches.edited), vectors)

    stream: list[Tensor] = []
    with at_site(model, last, lambda x: stream.append(x)):
        logits = hooked_logits(model, tokens, site, None if vectors is None else put)
    after = (
        put(stream[-1]) if site == last and vectors is not None else stream[-1]
    )  # an edit there may come after `append`
    return Forwarded(logits[at(read)], after[at(read)])


def _lengths(recording: Recording, branches: Branches) -> Int[np.ndarray, "row"]:
    """Tokens of each row's prompt."""
    return recording.length.numpy()[branches.prompt]


def full_forwards(
    recording: Recording, site: Site, branches: Branches, vectors: Tensor | None, read: np.ndarray
) -> Forwarded:
    """`reference_forward` of prompts of equal length, 16 at a time or fewer, so that the logits of every position stay below 2^28 numbers.

    One at a time where hooks of the user's own are on the model, which may treat the prompts of a pass differently. read: tokens
    in the order of their rows, some of every row.
    """
    length, found, order = _lengths(recording, branches), [], []
    for tokens in np.unique(length):
        alike = np.flatnonzero(length == tokens)
        batch = 1 if recording.own_code else int(max(1, min(16, 2**28 // (int(tokens) * recording.model.vocab_size))))
        for rows in np.split(alike, np.arange(batch, len(alike), batch)):
            among, reads = (
                np.isin(branches.row[branches.edited], rows),
                np.flatnonzero(np.isin(branches.row[read], rows)),
            )
            own = None if vectors is None else vectors[torch.from_numpy(among).to(vectors.device)]
            part, token = branches.take(rows), read[reads]
            of = np.searchsorted(rows, branches.row[token])
            found.append(reference_forward(recording, site, part, own, part.first[of] + branches.place[token]))
            order.append(reads)
    back = torch.from_numpy(np.argsort(np.concatenate(order), kind="stable"))
    return Forwarded(*(torch.cat(column)[back.to(column[0].device)] for column in zip(*found, strict=True)))

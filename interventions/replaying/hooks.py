"""The reference path: the same rows through full forward passes, with each framework's own hooks.

Replay is checked against it, and models that replay does not support use it. `fwd_hooks` and `edit_in_trace` put any edit
into a TransformerLens run or an nnsight trace of the user's own.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import get_ident
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interventions.errors import EditError, HookError, SiteError
from interventions.models.anatomy import adder, at_site, check_site
from interventions.models.causal_model import CausalModel
from interventions.models.exclusive import exclusive
from interventions.models.inside import check_inside, columns
from interventions.models.remote import envoy
from interventions.models.rotary import forget_longer_passes
from interventions.models.uploads import upload
from interventions.models.wrapping import wrap
from interventions.recording import Recording
from interventions.replaying.placed import Placed
from interventions.replaying.replay import Branches
from interventions.sites import Site, SiteLike, as_site

Edit = Callable[[Tensor], Tensor]
"""A pure function of vectors `[prompt, d_model]`, one for each prompt of the batch (or `[prompt, pos, d_model]`: every position)."""
Position = int | Int[Tensor, "prompt"] | Sequence[int] | None
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
    site: SiteLike, edit: Edit, position: Position = None, *, may_change_nothing: bool = False
) -> Iterator[list[tuple[str, Any]]]:
    """TransformerLens hooks that apply `edit` at a site, for `run_with_hooks(fwd_hooks=…)`.

        with fwd_hooks(Site(15), lambda x: swap_norm(x, source), position=7) as hooks:
            logits = bridge.run_with_hooks(tokens, fwd_hooks=hooks)

    Raises on leaving: `HookError` when the hook did not fire, `EditError` when the edit changed nothing.
    """
    site = as_site(site)
    changed: list[Tensor] = []
    entered: list[Tensor] = []
    thread = get_ident()

    def enter(hidden: Tensor, hook: Any) -> None:
        if get_ident() == thread:
            entered[:] = [hidden]

    def apply(value: Tensor, hook: Any) -> Tensor | None:
        if get_ident() != thread:  # another thread's own forward pass
            return None
        if site.inside:
            new = _inside_edited(site, value, edit, position)
        else:
            new = _edited(site, value, entered[0] if entered else None, edit, position)
        changed.append((new != value).any())
        return new

    if site.point == "resid_mid":
        yield [(site.entry.hook_name, enter), (Site(site.layer, "attn_out").hook_name, apply)]
    else:
        yield [(site.hook_name, apply)]
    if not changed:
        raise HookError(f"the hook at {site.hook_name} did not fire; check that the run reaches block {site.layer}")
    if not may_change_nothing and not bool(torch.stack(changed).any()):
        raise EditError(f"the edit at {site.hook_name} changed nothing; if that is meant, pass may_change_nothing=True")


def _inside_edited(site: Site, value: Tensor, edit: Edit, position: Position) -> Tensor:
    """The value at one of a bridge's hook points inside a block: `[prompt, pos, head, width]`, `pattern` with its heads first."""
    if site.head is None and site.neurons is None and site.point != "pattern":
        return edit_at(value.flatten(2), edit, position).view(value.shape)
    if site.neurons is not None:
        new = value.clone()
        new[..., list(site.neurons)] = edit_at(value[..., list(site.neurons)], edit, position)
        return new
    if value.ndim != 4:
        raise HookError(f"{site.hook_name} gives {list(value.shape)}; expected numbers by head")
    by_head = value.transpose(1, 2) if site.point == "pattern" else value
    if site.head is None:
        new = edit_at(by_head.flatten(2), edit, position).view(by_head.shape)
    else:
        new = by_head.clone()
        new[:, :, site.head] = edit_at(by_head[:, :, site.head], edit, position)
    return new.transpose(1, 2) if site.point == "pattern" else new


def _edited(site: Site, added: Tensor, entered: Tensor | None, edit: Edit, position: Position) -> Tensor:
    """The value at a site after an edit. At `resid_mid`, where only the output of attention can be changed, the changed output."""
    if site.point != "resid_mid":
        return edit_at(added, edit, position)
    assert entered is not None
    stream = entered + added
    return added + (edit_at(stream, edit, position) - stream)


def edit_in_trace(
    model: Any, site: SiteLike, edit: Edit, position: Position = None, *, may_change_nothing: bool = False
) -> None:
    """Apply `edit` at a site inside an nnsight trace.

        with model.trace(tokens):
            edit_in_trace(model, Site(15), lambda x: swap_norm(x, source), position=7)
            logits = model.output.logits.save()

    nnsight itself raises when the block does not run, or had already run. Raises `EditError` when the edit changed nothing.
    """
    causal, site = wrap(model), as_site(site)
    check_site(causal, site, may_run=False)
    changed = _edit_in_trace(causal, model, site, edit, position, {})
    if not may_change_nothing and not bool(changed):
        raise EditError(f"the edit at {site.hook_name} changed nothing; if that is meant, pass may_change_nothing=True")


def _edit_in_trace(
    causal: CausalModel, model: Any, site: Site, edit: Edit, position: Position, entered: dict[int, Tensor]
) -> Tensor:
    """Whether the edit changed anything. entered: what blocks read, which a trace gives only before it goes on."""
    block = envoy(causal, causal.blocks[site.layer])
    if site.point != "resid_post" and site.layer not in entered:
        entered[site.layer] = block.input
    if site.point == "resid_pre":
        hidden = entered[site.layer]
        block.input = entered[site.layer] = new = edit_at(hidden, edit, position)
        return (new != hidden).any()
    if site.inside:
        return _edit_inside_trace(causal, model, site, edit, position, entered[site.layer])
    stream = entered.get(site.layer)
    module = block if site.point == "resid_post" else envoy(causal, adder(causal, site))
    output = module.output
    value = output[0] if isinstance(output, tuple) else output
    hidden = value if stream is None else value.view(stream.shape)
    new = _edited(site, hidden, stream, edit, position)
    whole = new.reshape(value.shape)
    module.output = (whole, *output[1:]) if isinstance(output, tuple) else whole
    return (new != hidden).any()


def _edit_inside_trace(
    causal: CausalModel, model: Any, site: Site, edit: Edit, position: Position, stream: Tensor
) -> Tensor:
    here = check_inside(causal, site)
    place, which = here.places[site.point], columns(here, site)
    if site.point == "pattern":
        raise SiteError("an nnsight trace shows no attention weights; edit z, or use the plain model")
    module = envoy(causal, place.module)
    value = module.input if place.before else module.output
    every = place.columns if which is None else which if place.columns is None else place.columns[which]
    whole = value.view(*stream.shape[:2], -1)
    old = whole if every is None else whole[..., every.to(value.device)]
    new = edit_at(old, edit, position)
    whole = new if every is None else whole.index_copy(-1, every.to(value.device), new)
    if place.before:
        module.input = whole.reshape(value.shape)
    else:
        module.output = whole.reshape(value.shape)
    return (new != old).any()


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


def _by_wrapper(model: CausalModel, site: Site) -> bool:
    """Whether the wrapper's own hooks reach a site: a trace shows no attention weights, a bridge some that do not act."""
    if site.point != "pattern":
        return True
    place = check_inside(model, site).places["pattern"]
    return model.wrapper == "transformer_lens" and type(place.module).__name__ == "HookPoint"


def hooked_logits(
    model: CausalModel,
    tokens: Int[Tensor, "prompt pos"],
    edits: Sequence[tuple[Site, Edit]] = (),
    position: Position = None,
) -> Float[Tensor, "prompt pos vocab"]:
    """Logits of one full forward pass with an edit at each of some sites, by the wrapper's own hooks (no edit: clean)."""
    edits = sorted(edits, key=lambda each: each[0].rank)
    own = [each for each in edits if model.wrapper == "huggingface" or not _by_wrapper(model, each[0])]
    edits = [each for each in edits if each not in own]
    with exclusive(model), ExitStack() as stack:
        forget_longer_passes(model.hf)
        for site, edit in own:
            stack.enter_context(torch_hook(model, site, edit, position))
        if model.wrapper == "transformer_lens":
            hooks = [fwd_hooks(site, edit, position, may_change_nothing=True) for site, edit in edits]
            put = [hook for each in hooks for hook in stack.enter_context(each)]
            logits = model.handle.run_with_hooks(tokens, fwd_hooks=put) if put else model.handle(tokens)
            return logits.to(model.device)
        if not edits:
            return model.hf(input_ids=tokens).logits.to(model.device)
        with model.handle.trace(tokens):
            entered: dict[int, Tensor] = {}
            for site, edit in edits:
                _edit_in_trace(model, model.handle, site, edit, position, entered)
            logits = model.handle.output.logits.save()
        return logits.to(model.device)


class Forwarded(NamedTuple):
    """What full forward passes gave at the tokens that are read."""

    logits: Float[Tensor, "read vocab"]
    stream: Float[Tensor, "read d_model"]
    """after the last block, before the final norm"""


def reference_forward(
    recording: Recording,
    branches: Branches,
    edits: Sequence[Placed],
    read: Int[np.ndarray, "read"],
) -> Forwarded:
    """One full forward pass of each row's prompt with its edits (none: clean), seen at the tokens `read`.

    One pass for all rows given, whose prompts must be equally long; the caller bounds their number. Prompts are run whole,
    whatever is read of them, since a hook of the user's own may count from the end.
    """
    model = recording.model
    device, last = model.device, Site(model.n_layers - 1)
    tokens = recording.tokens[upload(branches.prompt, device), : _lengths(recording, branches)[0]]

    def at(which: np.ndarray) -> tuple[Tensor, ...]:
        return tuple(upload(np.stack([branches.row, branches.position])[:, which], device))

    def put(several: list[Placed]) -> Edit:
        def change(hidden: Tensor) -> Tensor:
            hidden = hidden.to(device)  # a wrapper's own hooks give it where the block is
            for each in several:
                row, position = at(each.token)
                if each.site.point == "pattern":  # of this pass, which may be shorter than the longest prompt
                    weights = hidden.unflatten(-1, (each.n_heads, -1)).clone()
                    new = each.vectors.to(hidden).unflatten(-1, (1 if each.columns is not None else each.n_heads, -1))
                    n_pos, width = weights.shape[-1], new.shape[-1]
                    heads = torch.arange(each.n_heads, device=device).expand(len(row), -1)
                    heads = heads if each.columns is None else each.columns[:, :1] // width
                    weights[row[:, None], position[:, None], heads] = new[..., :n_pos]
                    hidden = weights.flatten(-2)
                elif each.columns is None:
                    hidden = hidden.index_put((row, position), each.vectors.to(hidden))
                else:
                    hidden = hidden.index_put((row[:, None], position[:, None], each.columns), each.vectors.to(hidden))
            return hidden

        return change

    by_site: dict[Site, list[Placed]] = {}
    for each in edits:
        by_site.setdefault(each.site, []).append(each)
    stream: list[Tensor] = []
    with at_site(model, last, lambda x: stream.append(x)):
        logits = hooked_logits(model, tokens, [(site, put(several)) for site, several in by_site.items()])
    after = put(by_site[last])(stream[-1]) if last in by_site else stream[-1]  # an edit there may come after `append`
    return Forwarded(logits[at(read)], after[at(read)])


def _lengths(recording: Recording, branches: Branches) -> Int[np.ndarray, "row"]:
    """Tokens of each row's prompt."""
    return recording.length.numpy()[branches.prompt]


def _taken(each: Placed, branches: Branches, part: Branches, rows: np.ndarray) -> Placed | None:
    """The edits of some rows, in `part`, which are these rows' branches; None where they have none."""
    among = np.flatnonzero(np.isin(branches.row[each.token], rows))
    if not len(among):
        return None
    token = each.token[among]
    token = part.first[np.searchsorted(rows, branches.row[token])] + branches.place[token]
    which = upload(among, each.vectors.device)
    columns = None if each.columns is None else each.columns[which]
    return each._replace(token=token, columns=columns, vectors=each.vectors[which])


def full_forwards(recording: Recording, branches: Branches, edits: Sequence[Placed], read: np.ndarray) -> Forwarded:
    """`reference_forward` of prompts of equal length, 16 at a time or fewer, so that the logits of every position stay below 2^28 numbers.

    One at a time where hooks of the user's own are on the model, which may treat the prompts of a pass differently. read: tokens
    in the order of their rows, some of every row.
    """
    length, found, order = _lengths(recording, branches), [], []
    for tokens in np.unique(length):
        alike = np.flatnonzero(length == tokens)
        batch = 1 if recording.own_code else int(max(1, min(16, 2**28 // (int(tokens) * recording.model.vocab_size))))
        for rows in np.split(alike, np.arange(batch, len(alike), batch)):
            reads = np.flatnonzero(np.isin(branches.row[read], rows))
            part, token = branches.take(rows), read[reads]
            own = [some for each in edits if (some := _taken(each, branches, part, rows)) is not None]
            of = np.searchsorted(rows, branches.row[token])
            found.append(reference_forward(recording, part, own, part.first[of] + branches.place[token]))
            order.append(reads)
    back = torch.from_numpy(np.argsort(np.concatenate(order), kind="stable"))
    return Forwarded(*(torch.cat(column)[upload(back, column[0].device)] for column in zip(*found, strict=True)))

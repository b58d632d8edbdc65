"""The reference path: the same rows through full forward passes, with each framework's own hooks.

It checks replay and serves the models that replay cannot. `fwd_hook` and `edit_in_trace` are the one-line helpers that
put any edit into a TransformerLens run or an nnsight trace of the user's own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interventions.errors import EditError, HookError
from interventions.models import CausalModel, at_site, wrap
from interventions.recording import Recording
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
def fwd_hook(
    site: Site, edit: Edit, position: Position = None, *, may_change_nothing: bool = False
) -> Iterator[tuple[str, Any]]:
    """A TransformerLens hook that applies `edit` at a site: an entry of `fwd_hooks=[…]`.

        with fwd_hook(Site(15), lambda x: swap_norm(x, source), position=7) as hook:
            logits = bridge.run_with_hooks(tokens, fwd_hooks=[hook])

    Raises on leaving: `HookError` when the hook did not fire, `EditError` when the edit changed nothing.
    """
    changed: list[Tensor] = []

    def apply(hidden: Tensor, hook: Any) -> Tensor:
        new = edit_at(hidden, edit, position)
        changed.append((new != hidden).any())
        return new

    yield site.hook_name, apply
    if not changed:
        raise HookError(f"the hook at {site.hook_name} did not fire; check that the run reaches block {site.layer}")
    if not may_change_nothing and not bool(torch.stack(changed).any()):
        raise EditError(f"the edit at {site.hook_name} changed nothing; if that is meant, pass may_change_nothing=True")


def edit_in_trace(
    model: Any, site: Site, edit: Edit, position: Position = None, *, may_change_nothing: bool = False
) -> None:
    """Apply `edit` at a site inside an nnsight trace.

        with model.trace(tokens):
            edit_in_trace(model, Site(15), lambda x: swap_norm(x, source), position=7)
            logits = model.output.logits.save()

    nnsight itself raises when the block does not run, or had already run. Raises `EditError` when the edit changed nothing.
    """
    block = _envoy(model, site)
    output = block.output if site.point == "resid_post" else block.input
    hidden = output[0] if isinstance(output, tuple) else output
    new = edit_at(hidden, edit, position)
    if not may_change_nothing and not bool((new != hidden).any()):
        raise EditError(f"the edit at {site.hook_name} changed nothing; if that is meant, pass may_change_nothing=True")
    if site.point == "resid_pre":
        block.input = new
    else:
        block.output = (new, *output[1:]) if isinstance(output, tuple) else new


def _envoy(handle: Any, site: Site) -> Any:
    model = wrap(handle)
    model.check_site(site)
    block = model.blocks[site.layer]
    path = next(name for name, module in model.hf.named_modules() if module is block)
    envoy = handle
    for part in path.split("."):
        envoy = envoy[int(part)] if part.isdigit() else getattr(envoy, part)
    return envoy


@contextmanager
def torch_hook(model: CausalModel, site: Site, edit: Edit, position: Position = None) -> Iterator[None]:
    """Apply `edit` at a site of the plain module, whoever calls it. Raises `HookError` on leaving when it did not fire."""
    fired: list[bool] = []

    def apply(hidden: Tensor) -> Tensor:
        fired.append(True)
        return edit_at(hidden, edit, position)

    with at_site(model, site, apply):
        yield
    if not fired:
        raise HookError(f"the hook at {site} did not fire; check that the run reaches block {site.layer}")


def hooked_logits(
    model: CausalModel, tokens: Int[Tensor, "prompt pos"], site: Site | None, edit: Edit | None, position: Tensor
) -> Float[Tensor, "prompt pos vocab"]:
    """Logits of one full forward pass with `edit` at one position of each prompt, by the wrapper's own hooks (no edit: clean)."""
    if site is None or edit is None:
        if model.wrapper == "transformer_lens":
            return model.handle(tokens)
        return model.hf(input_ids=tokens).logits
    if model.wrapper == "transformer_lens":
        with fwd_hook(site, edit, position, may_change_nothing=True) as hook:
            return model.handle.run_with_hooks(tokens, fwd_hooks=[hook])
    if model.wrapper == "nnsight":
        with model.handle.trace(tokens):
            edit_in_trace(model.handle, site, edit, position, may_change_nothing=True)
            logits = model.handle.output.logits.save()
        return logits
    with torch_hook(model, site, edit, position):
        return model.hf(input_ids=tokens).logits


def reference_logits(
    recording: Recording,
    site: Site,
    prompt: Int[Tensor, "row"],
    position: Int[Tensor, "row"],
    vectors: Float[Tensor, "row d_model"] | None,
) -> Float[Tensor, "row vocab"]:
    """Logits at each row's own position, of full forward passes of its prompt with `vectors` at the site (None: clean).

    prompt, position: on the CPU. One pass for all rows given: the caller bounds their number.
    """
    model = recording.model
    width = int(position.max()) + 1
    tokens = recording.tokens[prompt.to(model.device), :width]
    where = position.to(model.device)
    edit = None if vectors is None else (lambda _: vectors)
    logits = hooked_logits(model, tokens, site, edit, where)
    return logits[torch.arange(len(where), device=where.device), where]


def full_forwards(
    recording: Recording, site: Site, prompt: np.ndarray, position: np.ndarray, vectors: Tensor | None
) -> Tensor:
    """`reference_logits`, 16 prompts at a time or fewer, so that the logits of every position stay below 2^28 numbers."""
    batch = int(max(1, min(16, 2**28 // ((int(position.max()) + 1) * recording.model.vocab_size))))
    found = []
    for start in range(0, len(prompt), batch):
        part = slice(start, start + batch)
        at = torch.from_numpy(prompt[part]), torch.from_numpy(position[part])
        found.append(reference_logits(recording, site, *at, None if vectors is None else vectors[part]))
    return torch.cat(found)

"""Models that run on another machine: nnsight's `remote=True` (NDIF). Traces record; only what is asked for travels back.

The bodies of traces are sent as source, with the variables that they name, and run where this package is not installed: they call
torch and nnsight alone. A `model` here is a `CausalModel`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from interventions.errors import ModelError
from interventions.sites import Site

NO_KEYS = "the model runs remotely, and its keys and values stay there"
"""Why nothing is replayed."""


def envoy(model: Any, module: nn.Module) -> Any:
    """What stands for a module in the traces of an nnsight model."""
    path = next(name for name, found in model.hf.named_modules() if found is module)
    found = model.handle
    for part in path.split("."):
        found = found[int(part)] if part.isdigit() else getattr(found, part)
    return found


def refused(name: str) -> ModelError:
    """The error of whatever needs a pass on this machine."""
    return ModelError(
        f"{name} runs remotely, and this needs a pass on this machine; remote models take record and measure at resid_pre and "
        "resid_post, path='hooks', with metrics by name"
    )


def placed_at(model: Any, site: Site) -> tuple[Any, bool]:
    """The block of a site, in traces, and whether the site is what it reads. Raises `ModelError` for sites inside a block."""
    if site.point not in ("resid_pre", "resid_post"):
        raise refused(model.name)
    return envoy(model, model.blocks[site.layer]), site.point == "resid_pre"


class Look(NamedTuple):
    """What `look` saw of a pass over two prompts; shapes are lists."""

    entered: list[Any]
    """shape of what each block read, or None for what is no tensor"""
    left: list[Any]
    """shape of what each block gave"""
    chained: list[bool]
    """whether each block read what the one below gave"""
    leak: float
    """largest difference of the first tokens' activations after any block, as a share of their norm"""
    dtype: torch.dtype
    as_tuple: bool
    logits: list[int]


def look(model: Any, ids: Int[Tensor, "2 pos"], n_kept: int) -> Look:
    """One pass over two prompts that share their first `n_kept` tokens. Only these few numbers travel back."""
    import nnsight

    handle, blocks = model.handle, [envoy(model, block) for block in model.blocks]
    with handle.session(remote=model.remote):
        entered = nnsight.save([])
        left = nnsight.save([])
        chained = nnsight.save([])
        leaks = nnsight.save([])
        kinds = nnsight.save([])
        logits = nnsight.save([])
        with torch.no_grad(), handle.trace(ids):
            before = None
            for block in blocks:
                read = block.input
                output = block.output
                wrapped = isinstance(output, (tuple, list))
                value = output[0] if wrapped else output
                entered.append(list(read.shape) if isinstance(read, torch.Tensor) else None)
                left.append(list(value.shape) if isinstance(value, torch.Tensor) else None)
                chained.append(before is None or torch.allclose(read, before, rtol=0, atol=0, equal_nan=True))
                one, other = value[0, :n_kept].float(), value[1, :n_kept].float()
                share = (one - other).norm(dim=-1) / one.norm(dim=-1).clamp(min=1e-30)
                leaks.append(float(share.max()))
                kinds.append((str(value.dtype), wrapped))
                before = value
            logits += list(handle.output.logits.shape)
    dtype = getattr(torch, kinds[0][0].removeprefix("torch."))
    return Look(entered, left, chained, max(leaks), dtype, any(kind[1] for kind in kinds), logits)


def recorded(
    model: Any, ids: Int[Tensor, "prompt pos"], sites: Sequence[Site]
) -> tuple[dict[Site, Float[Tensor, "prompt pos d_model"]], Any, None]:
    """Activations at sites and after the final norm, of one trace; keys and values stay where they are."""
    import nnsight

    ordered = sorted(sites, key=lambda site: site.rank)
    places = [placed_at(model, site) for site in ordered]
    handle, base = model.handle, envoy(model, model.base)
    with handle.session(remote=model.remote):
        seen = nnsight.save([])
        with torch.no_grad(), handle.trace(ids):
            for block, before in places:
                value = block.input if before else block.output
                seen.append((value[0] if isinstance(value, (tuple, list)) else value).cpu())
            seen.append(base.output.last_hidden_state.cpu())
    *at_sites, final = seen
    return dict(zip(ordered, at_sites, strict=True)), BaseModelOutputWithPast(last_hidden_state=final), None

"""Where the sites of a block stand: which sub-module's output is what attention or the MLP adds to the stream."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import get_ident
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor, nn

from interventions.errors import SiteError
from interventions.models.causal_model import CausalModel
from interventions.models.compat import without_cache
from interventions.models.exclusive import exclusive, hooked
from interventions.models.inside import ATTENTION, MLP, at_inside, check_inside
from interventions.models.inside import columns as columns_inside
from interventions.models.weights import WRAPPED, n_embedded
from interventions.models.wrapping import wrap
from interventions.sites import Site, SiteLike, as_site

_ADDS = {"attn_out": ATTENTION, "mlp_out": MLP}
_POST_NORMS = {"attn_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"}
_SEQUENTIAL, _PARALLEL = "sequential", "parallel"
_kinds: WeakKeyDictionary[nn.Module, dict[int, str]] = WeakKeyDictionary()
"""How attention and MLP meet in the blocks looked at, by Hugging Face module and block."""


def check_site(model: Any, site: SiteLike, *, may_run: bool = True) -> None:
    """Raise `SiteError` when the model, anything that `wrap` takes, has no such site.

    Sites inside a block are looked at on first use, in two passes over four tokens: what attention and MLP give must add
    up to what the block adds to the stream, and the MLP must read what attention wrote where `resid_mid` is asked for; of one
    head moved, only that head may move (see `inside`).
    may_run: False inside a trace, where the model cannot be asked anything else: then a block not looked at is an error.
    """
    model, site = wrap(model), as_site(site)
    site.check(model.n_layers)
    if site.entry == site:
        return
    if site.inside:
        check_inside(model, site, may_run=may_run)
        return
    kinds = _kinds.setdefault(model.hf, {})
    if kinds.get(site.layer) not in (
        _SEQUENTIAL,
        _PARALLEL,
    ):  # a block that was refused is asked again: a hook may be gone
        if not may_run:
            raise SiteError(
                f"block {site.layer} has not been looked at, which a trace leaves no room for; record the site, or call "
                f"interventions.check_site(model, Site({site.layer}, {site.point!r})), before the trace"
            )
        kinds[site.layer] = _block_kind(model, site.layer)
    kind = kinds[site.layer]
    if kind not in (_SEQUENTIAL, _PARALLEL):
        raise SiteError(f"no {site.point} in block {site.layer}: {kind}; known here: resid_pre, resid_post")
    if site.point == "resid_mid" and kind == _PARALLEL:
        raise SiteError(
            f"no resid_mid in block {site.layer}: attention and MLP of {type(model.hf).__name__} read the same stream, side "
            "by side; known here: resid_pre, attn_out, mlp_out, resid_post"
        )


def side_by_side(model: Any, layer: int) -> bool:
    """Whether attention and MLP of a block read the same stream: then its MLP does not see what its heads write. Raises `SiteError`."""
    model = wrap(model)
    check_site(model, Site(layer, "attn_out"))
    return _kinds[model.hf][layer] == _PARALLEL


def n_heads(model: Any, site: Site) -> int:
    """How many heads there are at a site: of `k` and `v` the model's own, which queries may share. Raises `SiteError`."""
    return check_inside(wrap(model), site.whole).heads(site.point)


def site_width(model: Any, site: Site, n_pos: int | None = None) -> int:
    """Numbers in a vector at a site. n_pos: tokens of the longest prompt, which a `pattern` needs. Raises `SiteError`."""
    model = wrap(model)
    if not site.inside:
        return model.d_model
    here = check_inside(model, site)
    if site.point == "pattern":
        if n_pos is None:
            raise SiteError(f"the width of {site} depends on how long the prompts are; give n_pos")
        return n_pos * (here.n_heads if site.head is None else 1)
    which = columns_inside(here, site)
    return here.width[site.point] if which is None else len(which)


def site_columns(model: CausalModel, site: Site, n_pos: int) -> Int[Tensor, "width"] | None:
    """Which numbers of `site.whole` a site holds (None: all), where prompts have up to n_pos tokens."""
    if site.whole == site:
        return None
    if site.point == "pattern":
        assert site.head is not None
        return torch.arange(site.head * n_pos, (site.head + 1) * n_pos)
    return columns_inside(check_inside(model, site), site)


def adder(model: CausalModel, site: Site) -> nn.Module:
    """The module whose output an edit at `attn_out`, `resid_mid` or `mlp_out` changes; the site has been checked."""
    found = _adder(model, site.layer, "mlp_out" if site.point == "mlp_out" else "attn_out")
    assert found is not None
    return found


def _adder(model: CausalModel, layer: int, point: str) -> nn.Module | None:
    """The sub-module whose output is added to the stream: the post-norm where there is one."""
    block = model.blocks[layer]
    children = dict(getattr(block, WRAPPED, block).named_children())
    if _POST_NORMS["mlp_out"] in children:
        return children.get(_POST_NORMS[point])
    return next((children[name] for name in _ADDS[point] if name in children), None)


@torch.no_grad()
def _block_kind(model: CausalModel, layer: int) -> str:
    """`sequential`, `parallel`, or why the block's attention and MLP cannot be told apart. Two passes over four tokens."""
    for point in _ADDS:
        if _adder(model, layer, point) is None:
            return f"{type(model.hf).__name__} keeps no module of the names known for it ({', '.join(_ADDS[point])})"
    seen: dict[str, Tensor] = {}
    tokens = torch.arange(1, 5, device=model.device)[None] % n_embedded(model.hf)

    def look(point: str, change: Tensor | None = None) -> Any:
        def keep(value: Tensor) -> Tensor | None:
            seen[point] = value
            return None if change is None else value + change

        return _at(model, Site(layer, point), _on_device(keep, model.device))

    with exclusive(model), ExitStack() as stack:
        for point in ("resid_pre", *_ADDS, "resid_post"):
            stack.enter_context(look(point))
        model.base(input_ids=tokens, **without_cache(model.base))
    if missing := [point for point in _ADDS if point not in seen]:
        return f"the module taken for {missing[0]} was not called"
    if wide := [point for point in _ADDS if seen[point].shape != seen["resid_pre"].shape]:
        shapes = [list(seen[point].shape[2:]) for point in (wide[0], "resid_pre")]
        return f"the module taken for {wide[0]} gives {shapes[0]} numbers a token, the stream has {shapes[1]}"
    terms = [seen[point].to(torch.promote_types(model.dtype, torch.float32)) for point in ("resid_pre", *_ADDS)]
    off = (terms[0] + terms[1] + terms[2] - seen["resid_post"]).abs()
    allowed = 2 * torch.finfo(model.dtype).eps * sum(term.abs() for term in terms)  # twice the two roundings of a sum
    if not bool((off <= allowed).all()):
        return (
            f"what attention and MLP give does not add up to what the block hands on (off by {float(off.amax()):.1e})"
        )
    mlp = seen["mlp_out"]
    with (
        exclusive(model),
        look("attn_out", torch.ones_like(mlp) * mlp.abs().amax() + seen["attn_out"].flip(-1)),
        look("mlp_out"),
    ):
        model.base(input_ids=tokens, **without_cache(model.base))
    return _PARALLEL if torch.equal(seen["mlp_out"], mlp) else _SEQUENTIAL


@contextmanager
def at_site(model: CausalModel, site: Site, see: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Call `see` with what stands at a site, `[prompt, pos, width]`, in every forward pass; what it returns, if anything, takes its place.

    `see` is given it on the model's device, whatever device the block is on.
    """
    check_site(model, site)
    see = _on_device(see, model.device)
    with at_inside(model, site, see) if site.inside else _at(model, site, see):
        yield


def _on_device(see: Callable[[Tensor], Tensor | None], device: torch.device) -> Callable[[Tensor], Tensor | None]:
    def moved(value: Tensor) -> Tensor | None:
        new = see(value.to(device))
        return None if new is None else new.to(value.device)

    return moved


def _value_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, (tuple, list)) else output


def _with_value(output: Any, new: Tensor) -> Any:
    return type(output)((new, *output[1:])) if isinstance(output, (tuple, list)) else new


@contextmanager
def _at(model: CausalModel, site: Site, see: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    block, thread = model.blocks[site.layer], get_ident()
    entered: list[Tensor] = []

    def before(_: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if get_ident() != thread:  # another thread's own forward pass
            return None
        value = args[0] if args else kwargs["hidden_states"]
        if site.point != "resid_pre":
            entered[:] = [value]
            return None
        new = see(value)
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    def after(_: Any, __: Any, output: Any) -> Any:
        if get_ident() != thread:
            return None
        value = _value_of(output)
        if site.point == "resid_post":
            new = see(value)
            return None if new is None else _with_value(output, new)
        stream = entered[0].to(value.device)
        # OPT folds prompts and positions into one axis; what is of another size is no part of a sum (see `_block_kind`)
        added = value.view(stream.shape) if value.numel() == stream.numel() else value
        if site.point == "resid_mid":
            new = see(stream + added)
            new = None if new is None else added + (new - (stream + added))
        else:
            new = see(added)
        return None if new is None else _with_value(output, new.reshape(value.shape))

    with ExitStack() as stack:
        if site.point != "resid_post":
            stack.enter_context(hooked(block, before, before=True))
        if site.point != "resid_pre":
            module = block if site.point == "resid_post" else adder(model, site)
            stack.enter_context(hooked(module, after))
        yield

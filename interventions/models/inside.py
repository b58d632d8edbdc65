"""Where the sites inside a block stand: queries, keys and values, a head's pattern and mixed values, the MLP's neurons.

Modules are found by name; which numbers are which head's is found by looking: one number of one head is moved, and the mixed
values of that head alone must move.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from interventions.errors import SiteError
from interventions.models.causal_model import CausalModel
from interventions.models.compat import without_cache
from interventions.models.exclusive import attending_by, exclusive, forward_replaced, hooked
from interventions.models.uploads import upload
from interventions.models.weights import WRAPPED, n_embedded
from interventions.sites import HEADS, Site

ATTENTION = ("self_attn", "attn", "attention", "self_attention")
MLP = ("mlp", "fc2", "block_sparse_moe")
_MIXED = ("o", "o_proj", "c_proj", "dense", "out_proj")
_READ_BY = {"q": ("q", "q_proj"), "k": ("k", "k_proj"), "v": ("v", "v_proj")}
_FUSED = ("c_attn", "query_key_value", "qkv_proj", "qkv")
_DOWN = ("out", "down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out")
_NAME = "mechdiag_pattern"

See = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class Place:
    """Numbers that a module reads or gives."""

    module: nn.Module
    before: bool
    """whether it reads them"""
    columns: Int[Tensor, "width"] | None = None
    """which of its numbers; None: all, in their order"""


@dataclass
class Inside:
    """What was found of one block."""

    n_heads: int
    n_kv_heads: int
    places: dict[str, Place] = field(default_factory=dict)
    width: dict[str, int] = field(default_factory=dict)
    """numbers a token, of all heads; of `pattern` there are as many as heads times tokens"""
    why_not: dict[str, str] = field(default_factory=dict)
    """point -> why there is none, or why its heads cannot be told apart"""
    attention: nn.Module | None = None

    def heads(self, point: str) -> int:
        return self.n_kv_heads if point in ("k", "v") else self.n_heads


_found: WeakKeyDictionary[nn.Module, dict[int, Inside]] = WeakKeyDictionary()


def check_inside(model: CausalModel, site: Site, *, may_run: bool = True) -> Inside:
    """What there is inside a block. Raises `SiteError` when the model has no such site or head.

    may_run: False inside a trace, where no pass can run: then a block not looked at is an error.
    """
    known = _found.setdefault(model.hf, {})
    if site.layer not in known:
        if not may_run:
            raise SiteError(
                f"block {site.layer} has not been looked at, which a trace leaves no room for; record the site, or call "
                f"interventions.check_site(model, Site({site.layer}, {site.point!r})), before the trace"
            )
        known[site.layer] = _look(model, site.layer)
    here, kind = known[site.layer], type(model.hf).__name__
    whole = site.head is None
    if (why := here.why_not.get(site.point)) and (site.point not in here.places or not whole):
        what = site.point if whole or site.point not in here.places else f"single heads at {site.point}"
        raise SiteError(f"no {what} in block {site.layer} of {kind}: {why}")
    if site.head is not None and site.head >= here.heads(site.point):
        raise SiteError(
            f"no head {site.head} at {site.point} in block {site.layer} of {kind}; heads run from 0 to {here.heads(site.point) - 1}"
        )
    if site.neurons is not None and max(site.neurons) >= here.width["neurons"]:
        raise SiteError(
            f"no neuron {max(site.neurons)} in block {site.layer} of {kind}; neurons run from 0 to {here.width['neurons'] - 1}"
        )
    return here


def _child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    """The sub-module of one of these names that stands highest; a bridge's component before the module that it stands for."""
    waiting = [module]
    while waiting:
        children = dict((around := waiting.pop(0)).named_children())
        if found := next((children[name] for name in names if name in children), None):
            return found
        waiting += [
            child for child in children.values() if child is not around and not isinstance(child, nn.ModuleList)
        ]
    return None


def _part(model: CausalModel, layer: int, names: tuple[str, ...]) -> tuple[str, nn.Module] | None:
    block = model.blocks[layer]
    children = dict(getattr(block, WRAPPED, block).named_children())
    return next(((name, children[name]) for name in names if name in children), None)


def _look(model: CausalModel, layer: int) -> Inside:
    """What is inside a block: a few passes of this block over four tokens."""
    config = model.config
    n_heads = int(getattr(config, "num_attention_heads", 0) or 0)
    here = Inside(n_heads, int(getattr(config, "num_key_value_heads", None) or n_heads))
    if (found := _part(model, layer, MLP)) is None:
        here.why_not["neurons"] = f"no module of the names known for its MLP ({', '.join(MLP)})"
    else:
        down = found[1] if found[0] in _DOWN else _child(found[1], _DOWN)
        if down is None:
            here.why_not["neurons"] = f"no down projection of the names known for it ({', '.join(_DOWN)}) in its MLP"
        else:
            here.places["neurons"] = Place(down, before=True)
    found = _part(model, layer, ATTENTION)
    if found is None:
        here.why_not |= dict.fromkeys(HEADS, f"no module of the names known for attention ({', '.join(ATTENTION)})")
    else:
        here.attention = found[1]
        _look_at_attention(model, here, found[1])
    with torch.no_grad(), exclusive(model), _alone(model, layer):
        _widths(model, layer, here)
        if "z" in here.places and n_heads:
            _tell_heads_apart(model, layer, here)
    return here


@contextmanager
def _alone(model: CausalModel, layer: int) -> Iterator[None]:
    """All other blocks hand on what they read: what numbers mean to one block does not depend on what the others compute."""

    def pass_on(*args: Any, **kwargs: Any) -> Any:
        return model.handed_on(args[0] if args else kwargs["hidden_states"])

    with ExitStack() as stack:
        for i, block in enumerate(model.blocks):
            if i != layer and model.shapes is not None:
                stack.enter_context(forward_replaced(block, pass_on))
        yield


def _look_at_attention(model: CausalModel, here: Inside, attention: nn.Module) -> None:
    mixed = _child(attention, _MIXED)
    if mixed is None:
        here.why_not["z"] = f"no output projection of the names known for it ({', '.join(_MIXED)})"
    else:
        here.places["z"] = Place(mixed, before=True)
    separate = {point: _child(attention, names) for point, names in _READ_BY.items()}
    if all(separate.values()):
        here.places |= {point: Place(module, before=False) for point, module in separate.items() if module is not None}
    elif (fused := _child(attention, _FUSED)) is not None:
        here.places |= dict.fromkeys(_READ_BY, Place(fused, before=False))
    else:
        why = (
            "keys and values come from a latent (MLA)"
            if _child(attention, ("kv_b_proj",))
            else "no projection of the names known for it"
        )
        here.why_not |= dict.fromkeys(_READ_BY, why)


def _tokens(model: CausalModel, n: int = 1) -> Tensor:
    vocab = n_embedded(model.hf)
    return (torch.arange(1, 5, device=model.device) % vocab).expand(n, -1)


def _widths(model: CausalModel, layer: int, here: Inside) -> None:
    """Numbers a token at each place, and whether it is reached at all."""
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for point, place in here.places.items():
            stack.enter_context(
                _at_place(model, layer, place, lambda value, point=point: seen.__setitem__(point, value))
            )
        model.base(input_ids=_tokens(model), **without_cache(model.base))
    for point in [point for point in here.places if point not in seen]:
        del here.places[point]
        here.why_not[point] = "the module taken for it was not called"
    here.width = {point: value.shape[-1] for point, value in seen.items()}
    if here.attention is not None and "pattern" not in here.why_not:
        _look_at_pattern(model, layer, here, here.attention, seen.get("z"))


def _look_at_pattern(model: CausalModel, layer: int, here: Inside, attention: nn.Module, z: Tensor | None) -> None:
    """Whether weights are shown, and acted upon, by a function of ours or at a bridge's hook point."""
    here.why_not["pattern"] = "its attention takes no function of ours, and shows no weights that act"
    point = dict(attention.named_children()).get("hook_pattern")
    if z is None:
        return
    for place in (Place(attention, before=False), *([] if point is None else [Place(point, before=False)])):
        weights: list[Tensor] = []
        mixed: list[Tensor] = []

        def first_alone(value: Tensor, weights: list[Tensor] = weights) -> Tensor:
            weights.append(value)
            heads = value.unflatten(-1, (-1, 4))
            return torch.zeros_like(heads).index_fill(-1, torch.tensor([0], device=value.device), 1.0).flatten(-2)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a bridge says so where the weights that it shows do not act
            try:
                with (
                    at_pattern(model, place, first_alone),
                    _at_place(model, layer, here.places["z"], lambda x, m=mixed: m.append(x)),
                ):
                    model.base(input_ids=_tokens(model), **without_cache(model.base))
            except _NoPatternError as error:
                here.why_not["pattern"] = str(error)
                return
        if not weights or weights[0].shape[-1] != 4 * here.n_heads:
            continue
        sums = weights[0].unflatten(-1, (-1, 4)).float().sum(-1)
        if bool(((sums - 1).abs() < 0.02).all()) and torch.allclose(
            mixed[0], mixed[0][:, :1].expand_as(mixed[0]), atol=1e-3, rtol=1e-2
        ):
            here.places["pattern"] = place
            del here.why_not["pattern"]
            return


def _layouts(here: Inside, d_head: int) -> Iterator[dict[str, Place]]:
    """How queries, keys and values may lie in what one projection gives: one after the other, or by groups of heads."""
    n, kv = here.n_heads, here.n_kv_heads
    module, repeats = here.places["q"].module, n // kv
    every = torch.arange((n + 2 * kv) * d_head)
    one_after_other = every.split([n * d_head, kv * d_head, kv * d_head])
    by_group = every.view(kv, repeats + 2, d_head)
    groups = by_group[:, :repeats].reshape(-1), by_group[:, repeats].reshape(-1), by_group[:, repeats + 1].reshape(-1)
    for columns in (one_after_other, groups):
        yield {point: Place(module, False, part) for point, part in zip("qkv", columns, strict=True)}


def _tell_heads_apart(model: CausalModel, layer: int, here: Inside) -> None:
    """Find the heads, or say why single heads cannot be told apart."""
    unclear = "its heads cannot be told apart: moving the numbers of one moves what others give"
    if here.width["z"] % here.n_heads:
        here.why_not["z"] = f"{here.width['z']} numbers are no multiple of {here.n_heads} heads"
        return
    if "q" not in here.places:
        here.why_not["z"] = here.why_not["pattern"] = here.why_not.get("q", unclear)
        return
    fused = here.places["q"].module is here.places["k"].module
    total = here.width["q"]
    candidates: list[dict[str, Place]] = [{point: here.places[point] for point in "qkv"}]
    if fused:
        d_head, rest = divmod(total, here.n_heads + 2 * here.n_kv_heads)
        candidates = list(_layouts(here, d_head)) if not rest else []
    wrong: dict[str, str] = dict.fromkeys("qkv", unclear)
    for places in candidates:
        wrong = _moves_alone(model, layer, here, places)
        if not (fused and wrong):
            here.places |= places
            break
    if fused and wrong:
        for point in "qkv":
            del here.places[point]
        wrong |= dict.fromkeys(
            "qkv", f"queries, keys and values lie in one projection in an order that is not known ({total} numbers)"
        )
    here.why_not |= wrong
    for point in "qkv":
        if point in here.places:
            columns = here.places[point].columns
            here.width[point] = here.width[point] if columns is None else len(columns)
    if "v" in wrong and "q" in wrong:
        here.why_not["z"] = unclear


def _moves_alone(model: CausalModel, layer: int, here: Inside, places: dict[str, Place]) -> dict[str, str]:
    """Which of q, k and v do not do to z what one head's do, and why. One pass: every head is moved in a prompt of its own.

    A query of the last token moves its own head's z there. A key of the first token leaves that token's z, which attends to
    nothing else, and moves later ones' in the heads that share it; a value moves both.
    """
    counts = {"q": here.n_heads, "k": here.n_kv_heads, "v": here.n_kv_heads}
    starts, n = {}, 1
    for point, count in counts.items():
        starts[point], n = n, n + count
    seen: list[Tensor] = []

    def move(point: str) -> See:
        def see(value: Tensor) -> Tensor:
            count, first, token = counts[point], starts[point], -1 if point == "q" else 0
            if value.shape[-1] % count:
                return value
            moved, which = value.clone(), torch.arange(count, device=value.device)
            heads = moved.unflatten(-1, (count, -1))
            size = value[0].abs().amax().clamp(min=1e-3)
            heads[first + which, token, which] += size * torch.linspace(0.5, 1.5, heads.shape[-1]).to(value)
            return moved

        return see

    with ExitStack() as stack:
        for point, place in places.items():
            stack.enter_context(_at_place(model, layer, place, move(point)))
        stack.enter_context(_at_place(model, layer, here.places["z"], lambda z: seen.append(z)))
        model.base(input_ids=_tokens(model, n), **without_cache(model.base))
    z = seen[0].float().unflatten(-1, (here.n_heads, -1))
    change = (z[1:] - z[:1]).norm(dim=-1)
    change = torch.stack([change[:, 0], change[:, 1:].amax(1)], dim=1)  # [moved, the first token or a later one, head]
    scale, repeats, wrong = z.norm(dim=-1).amax(), here.n_heads // max(1, here.n_kv_heads), {}
    rounding = 1e-5 if model.dtype in (torch.float32, torch.float64) else 5e-3
    for point, count in counts.items():
        part = change[starts[point] - 1 : starts[point] - 1 + count]
        own = torch.eye(count, dtype=torch.bool, device=part.device)
        own = own if point == "q" else own.repeat_interleave(repeats, dim=1)
        if own.shape[1] != here.n_heads:
            wrong[point] = f"{here.n_heads} heads share {here.n_kv_heads} keys"
            continue
        moves = torch.stack([own & (point == "v"), own], dim=1)
        largest = torch.where(moves, part, 0.0).amax((1, 2), keepdim=True)
        if not bool((torch.where(moves, 0.0, part) <= rounding * torch.maximum(largest, scale)).all()):
            assert here.attention is not None
            norm = any("norm" in name for name, _ in here.attention.named_modules())
            wrong[point] = "moving the numbers of one head moves what others give" + (
                ", as where a norm spans heads" if norm else ""
            )
        elif not bool(largest.amax() > rounding * scale):
            wrong[point] = "moving the numbers of one head moves nothing"
    return wrong


@contextmanager
def at_inside(model: CausalModel, site: Site, see: See) -> Iterator[None]:
    """`anatomy.at_site` for sites inside a block."""
    here = check_inside(model, site)
    place, which = here.places[site.point], columns(here, site)
    if site.point == "pattern":
        with at_pattern(model, place, _of_head(site, here, see)):
            yield
        return

    def part(value: Tensor) -> Tensor | None:
        if which is None:
            return see(value)
        at = upload(which, value.device)
        new = see(value[..., at])
        return None if new is None else value.index_copy(-1, at, new)

    with _at_place(model, site.layer, place, part):
        yield


def columns(here: Inside, site: Site) -> Int[Tensor, "width"] | None:
    """Which numbers of all heads, or neurons, a site holds; None: all. (A head's weights depend on the length of the prompt.)"""
    if site.neurons is not None:
        return torch.tensor(site.neurons)
    if site.head is None or site.point == "pattern":
        return None
    d_head = here.width[site.point] // here.heads(site.point)
    return torch.arange(site.head * d_head, (site.head + 1) * d_head)


def _of_head(site: Site, here: Inside, see: See) -> See:
    if site.head is None:
        return see

    def part(value: Tensor) -> Tensor | None:
        weights = value.unflatten(-1, (here.n_heads, -1))
        new = see(weights[..., site.head, :])
        if new is None:
            return None
        weights = weights.clone()
        weights[..., site.head, :] = new
        return weights.flatten(-2)

    return part


@contextmanager
def _at_place(model: CausalModel, layer: int, place: Place, see: See) -> Iterator[None]:
    """Call `see` with the numbers of a place, `[prompt, pos, width]`; what it returns, if anything, takes their place."""
    thread, shape = get_ident(), []

    def enter(_: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        shape[:] = (args[0] if args else kwargs["hidden_states"]).shape[:2]

    def changed(value: Tensor) -> Tensor | None:
        whole = value.view(*shape, value.shape[-1])  # OPT folds prompts and positions into one axis
        if place.columns is None:
            new = see(whole)
        else:
            at = upload(place.columns, value.device)
            new = see(whole[..., at])
            new = None if new is None else whole.index_copy(-1, at, new)
        return None if new is None else new.reshape(value.shape)

    def before(_: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if get_ident() != thread:
            return None
        name = None if args else next(iter(kwargs))
        new = changed(args[0] if name is None else kwargs[name])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: new})

    def after(_: Any, __: Any, output: Any) -> Any:
        return None if get_ident() != thread else changed(output)

    with (
        hooked(model.blocks[layer], enter, before=True),
        hooked(place.module, before if place.before else after, before=place.before),
    ):
        yield


class _NoPatternError(Exception):
    """The model's attention does something that ours does not."""


_SEEING: ContextVar[dict[nn.Module, list[See]] | None] = ContextVar("patterns that are looked at", default=None)


@contextmanager
def at_pattern(model: CausalModel, place: Place, see: See) -> Iterator[None]:
    """Call `see` with the weights of every head, `[prompt, pos, head · key]`; what it returns, if anything, takes their place.

    place: a bridge's own hook point, or the attention, which then attends by a function of ours for as long as this lasts.
    """
    attention = place.module
    if type(attention).__name__ == "HookPoint":
        thread = get_ident()

        def after(_: Any, __: Any, weights: Tensor) -> Tensor | None:
            return None if get_ident() != thread else _shown(weights, see)

        with hooked(attention, after):
            yield
        return
    seeing = _SEEING.get() or {}
    modules = [attention, *attention.modules()]
    with attending_by(model.hf, _NAME, _SEEING, {**seeing, **{m: [*seeing.get(m, []), see] for m in modules}}):
        yield


def _shown(weights: Float[Tensor, "prompt head pos key"], see: See) -> Tensor | None:
    new = see(weights.transpose(1, 2).flatten(2))
    return None if new is None else new.unflatten(-1, (weights.shape[1], -1)).transpose(1, 2)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ·scale + mask) v, the weights shown in between."""
    if s_aux is not None or position_bias is not None:
        raise _NoPatternError("its attention has sinks or position biases")
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[2]]
    weights = scores.softmax(-1, dtype=torch.promote_types(torch.float32, query.dtype)).to(query.dtype)
    for see in (_SEEING.get() or {}).get(module, ()):
        new = _shown(weights, see)
        weights = weights if new is None else new
    return (weights @ value).transpose(1, 2).contiguous(), weights


ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["eager"])

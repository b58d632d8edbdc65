"""Whether a model's forward pass is what the engine assumes: causal, with each block run once, in order, on the output of the
block below."""

from contextlib import ExitStack
from threading import get_ident
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from interventions.errors import MechdiagError, ModelError, is_out_of_memory, one_line
from interventions.models.causal_model import Shapes
from interventions.models.exclusive import exclusive, holding, hooked
from interventions.models.remote import look
from interventions.models.weights import n_embedded

if TYPE_CHECKING:
    from interventions.models.causal_model import CausalModel


_TOKENS, _KEPT = 6, 3  # tokens of a pass, and how many of them the second pass keeps
LEAK = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far rounding may move an activation, as a share of its norm, when only later tokens or other prompts change. Dense models give the
same bits; a mixture of experts computes its tokens in groups whose sizes differ between the passes."""
_EIGHT_BITS = "; bitsandbytes' 8 bits choose outliers by all tokens of a pass: load with llm_int8_threshold=0.0"
_seen: WeakKeyDictionary[nn.Module, dict[Any, Shapes]] = WeakKeyDictionary()
"""By Hugging Face module, and by what could change the answer. Refusals are not kept: a hook may have been removed."""


def check_causal(model: "CausalModel") -> Shapes:
    """Raise `ModelError` unless later tokens leave every earlier activation as it is and the blocks run one after another.

    Two passes over 6 tokens that differ in the last 3: one by the whole model, one by the part without its unembedding.
    A model that was accepted is checked again only where its attention function, its blocks, its dtype, its vocabulary or a flag that
    makes it causal changed.
    """
    known, key = _seen.setdefault(model.hf, {}), _key(model)
    if key not in known:
        with holding(model) if model.remote else exclusive(model):
            known[key] = _look_from_afar(model) if model.remote else _look(model)
    return known[key]


def _refused(model: "CausalModel", why: str) -> ModelError:
    return ModelError(f"cannot use {type(model.hf).__name__}: {why}")


def _key(model: "CausalModel") -> tuple[Any, ...]:
    flags = tuple((id(m), m.is_causal) for m in model.hf.modules() if isinstance(getattr(m, "is_causal", None), bool))
    config = model.config
    return (
        *(getattr(model.hf.config, "_attn_implementation", None), getattr(config, "is_decoder", None)),
        *(getattr(config, "is_causal", None), tuple(map(id, model.blocks)), flags),
        model.remote,
        *(model.dtype, n_embedded(model.hf), _head_shape(model)),
    )


def _head_shape(model: "CausalModel") -> Any:
    return getattr(getattr(model.hf.get_output_embeddings(), "weight", None), "shape", None)


@torch.no_grad()
def _look(model: "CausalModel") -> Shapes:
    first, second = _tokens(model)
    entered, whole, output, as_tuple = _pass(model, model.hf, first)
    _check_chain(model, entered, whole)
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[:2] != first.shape:
        raise _refused(model, f"its output has {_shape(logits)}; expected logits of each of {_TOKENS} tokens")
    entered, inner, output, _ = _pass(model, model.base, second)
    _check_chain(model, entered, inner)
    if not isinstance(getattr(output, "last_hidden_state", None), Tensor):
        raise _refused(
            model, f"its {type(model.base).__name__} gives a {type(output).__name__} without last_hidden_state"
        )
    allowed = LEAK.get(model.dtype, max(LEAK.values()))
    if (leak := _leak(whole, inner)) > allowed:
        _, again, _, _ = _pass(model, model.hf, second)
        if (alone := _leak(again, inner, _TOKENS)) > allowed:
            raise _refused(
                model,
                f"its {type(model.base).__name__} gives other activations alone than within the model (off by {alone:.1e} of "
                "their norm)",
            )
        raise _refused(
            model,
            f"it is not causal: later tokens change earlier activations by {leak:.1e} of their norm (bidirectional "
            "attention, quantised activations that share a scale, or a hook that mixes positions); expected a decoder in which "
            f"a token sees only those before it{_EIGHT_BITS if _has_outliers(model) else ''}",
        )
    return Shapes(whole[0].shape[2], whole[0].dtype, logits.shape[2], as_tuple)


def _look_from_afar(model: "CausalModel") -> Shapes:
    """The same of a remote model, in one pass over both prompts."""
    seen = look(model, torch.cat(_tokens(model)), _KEPT)
    for i, (entered, left, chained) in enumerate(zip(seen.entered, seen.left, seen.chained, strict=True)):
        if entered != left or left[:2] != [2, _TOKENS] or not chained:
            raise _refused(model, f"its block {i} reads {entered} and hands on {left}; expected one residual stream")
    if seen.leak > LEAK.get(seen.dtype, max(LEAK.values())):
        raise _refused(
            model, f"it is not causal: later tokens change earlier activations by {seen.leak:.1e} of their norm"
        )
    return Shapes(seen.left[0][2], seen.dtype, seen.logits[2], seen.as_tuple)


def _tokens(model: "CausalModel") -> tuple[Tensor, Tensor]:
    """Two prompts of ordinary tokens: none that stands for an image or padding, which many models treat differently."""
    n = n_embedded(model.hf)
    special = set()
    for config in (model.hf.config, model.config):
        for name, value in config.to_dict().items():
            if name.endswith(("_token_id", "_token_index")):
                special |= set(value if isinstance(value, (list, tuple)) else [value])
    ordinary = [i for i in range(min(n, 1000)) if i not in special] or list(range(n))
    wanted = _TOKENS + _TOKENS - _KEPT
    chosen = (ordinary * wanted)[: wanted * (step := max(1, len(ordinary) // wanted)) : step]
    first, other = chosen[:_TOKENS], chosen[_TOKENS:]
    both = torch.tensor([first, first[:_KEPT] + other], device=model.device)
    return both[:1], both[1:]


def _pass(model: "CausalModel", module: nn.Module, ids: Tensor) -> tuple[list[Any], list[Any], Any, bool]:
    """What entered and left each block, in the order in which they ran, what the module returned, and whether blocks hand on a tuple."""
    own = get_ident()  # a pass of another thread is none of ours
    ran: list[int] = []
    entered: list[Any] = []
    left: list[Any] = []
    wrapped: list[bool] = []

    def watch(i: int) -> tuple[Any, Any]:
        def before(_: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            if get_ident() == own:
                ran.append(i)
                entered.append(args[0] if args else kwargs.get("hidden_states"))

        def after(_: Any, __: Any, output: Any) -> None:
            if get_ident() == own:
                wrapped.append(isinstance(output, (tuple, list)) and bool(output))
                left.append(output[0] if wrapped[-1] else output)

        return before, after

    with ExitStack() as stack:
        for i, block in enumerate(model.blocks):
            before, after = watch(i)
            # before hooks of the user's own, which may change what a block reads
            stack.enter_context(hooked(block, before, before=True, prepend=True))
            stack.enter_context(hooked(block, after))
        try:
            output = module(input_ids=ids)
        except Exception as error:  # a forward pass of any kind may raise anything
            if isinstance(error, MechdiagError) or is_out_of_memory(error):
                raise
            raise _refused(model, f"its forward pass takes no plain token ids ({one_line(error)})") from error
    n = len(model.blocks)
    if absent := [str(i) for i in range(n) if i not in ran]:
        raise _refused(model, f"of its {n} blocks {', '.join(absent)} did not run on text alone; expected all to")
    if ran != list(range(n)):
        raise _refused(
            model, f"its {n} blocks ran in the order {', '.join(map(str, ran))}; expected each once, from 0 up"
        )
    return entered, left, output, any(wrapped)


def _check_chain(model: "CausalModel", entered: list[Any], left: list[Any]) -> None:
    width = None
    for i, value in enumerate(left):
        for what, x in (("reads", entered[i]), ("hands on", value)):
            stream = isinstance(x, Tensor) and x.ndim == 3 and x.shape[:2] == (1, _TOKENS)
            width = x.shape[2] if stream and width is None else width
            if not stream or x.shape[2] != width:
                raise _refused(
                    model,
                    f"its block {i} {what} {_shape(x)}; expected one residual stream, [1 prompt, {_TOKENS} tokens, d_model]",
                )
        if i and not torch.allclose(entered[i], left[i - 1], rtol=0, atol=0, equal_nan=True):
            raise _refused(
                model, f"its block {i} does not read what block {i - 1} hands on; expected one residual stream"
            )


def _has_outliers(model: "CausalModel") -> bool:
    return any(getattr(getattr(m, "state", None), "threshold", 0) for m in model.hf.modules())


def _leak(one: list[Tensor], other: list[Tensor], n: int = _KEPT) -> float:
    """Largest difference of the first `n` tokens' activations after any block, as a share of their norm."""
    off = [(a[:, :n].float() - b[:, :n].float()).norm(dim=-1) for a, b in zip(one, other, strict=True)]
    size = [a[:, :n].float().norm(dim=-1).clamp(min=1e-30) for a in one]
    return max(float((d / s).max()) for d, s in zip(off, size, strict=True))


def _shape(x: Any) -> str:
    return f"shape {list(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"

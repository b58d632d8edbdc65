"""One measurement at a time on a model, always under the same conditions: eval mode, no autocast, outputs as objects."""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import RLock, get_ident
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from interventions.models.remote import refused


@contextmanager
def forward_replaced(module: nn.Module, forward: Any, *, in_all_threads: bool = False):
    """Let `module` compute `forward` instead of its own.

    A bridge and nnsight put a `forward` of their own on the instance, so what was there is put back, not deleted. Other
    threads still compute the module's own, unless `in_all_threads`.
    """
    own, whole, thread = module.__dict__.get("forward"), module.forward, get_ident()

    def replaced(*args: Any, **kwargs: Any) -> Any:
        return (forward if in_all_threads or get_ident() == thread else whole)(*args, **kwargs)

    functools.update_wrapper(
        replaced, whole
    )  # under its own name: whoever looks for code of the user's own must not find this
    try:  # first, so that Ctrl-C leaves nothing behind wherever it comes
        object.__setattr__(module, "forward", replaced)
        yield
    finally:
        if own is None:
            module.__dict__.pop("forward", None)
        else:
            object.__setattr__(module, "forward", own)


@contextmanager
def hooked(
    module: nn.Module, hook: Callable[..., Any], *, before: bool = False, prepend: bool = False
) -> Iterator[None]:
    """Let `hook` run after `module`, or before it with keyword arguments too; taken off wherever Ctrl-C comes."""

    def take_off() -> None:  # by the hook itself: a handle may not have reached us
        kept = vars(module)
        for hooks in (kept["_forward_pre_hooks"], kept["_forward_hooks"]):
            for number in [number for number, found in list(hooks.items()) if found is hook]:
                kept["_forward_pre_hooks_with_kwargs"].pop(number, None)
                hooks.pop(number, None)

    try:
        if before:
            module.register_forward_pre_hook(hook, with_kwargs=True, prepend=prepend)
        else:
            module.register_forward_hook(hook, prepend=prepend)
        yield
    finally:
        try:
            take_off()
        except KeyboardInterrupt:
            take_off()
            raise


@dataclass
class _Hold:
    lock: Any = field(default_factory=RLock)
    depth: int = 0
    """how many `exclusive` contexts the thread that holds the lock is in"""


_holds: WeakKeyDictionary[nn.Module, _Hold] = WeakKeyDictionary()
_making = RLock()


@contextmanager
def holding(model: Any) -> Iterator[_Hold]:
    """Hold a `CausalModel` for one thread and change nothing on it; other threads that hold it wait."""
    with _making:
        hold = _holds.setdefault(model.hf, _Hold())
    with hold.lock:
        yield hold


@contextmanager
def exclusive(model: Any, check: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold a `CausalModel` for one thread and make its passes reproducible; what was changed is put back on leaving.

    Dropout is off (eval mode), autocast is off, outputs are objects rather than tuples. Another thread that measures on this
    model, or calls its forward, waits until this one is done; a call of a single block does not wait. A thread may nest these.
    check: called once the model is held, before anything is changed on it. Raises `ModelError` for a remote model: its passes
    are not made here.
    """
    if model.remote:
        raise refused(model.name)
    with holding(model) as hold:
        depth = hold.depth
        try:
            hold.depth = depth + 1
            with _held(model, hold, check) if depth == 0 else nullcontext():
                yield
        finally:
            hold.depth = depth


@contextmanager
def _held(model: Any, hold: _Hold, check: Callable[[], None] | None) -> Iterator[None]:
    if check is not None:
        check()
    with ExitStack() as stack:
        for module in dict.fromkeys((model.hf, model.base)):
            waiting = _waiting(module.forward, hold.lock)
            stack.enter_context(forward_replaced(module, waiting, in_all_threads=True))
        modules = list(model.hf.modules())
        stack.enter_context(_eval_mode(modules))
        stack.enter_context(_named_outputs(modules))
        stack.enter_context(torch.autocast(model.device.type, enabled=False))
        yield


def _waiting(forward: Callable[..., Any], lock: Any) -> Callable[..., Any]:
    """The module's forward, which first waits for the lock."""

    def locked(*args: Any, **kwargs: Any) -> Any:
        with lock:
            return forward(*args, **kwargs)

    return locked


@contextmanager
def _eval_mode(modules: list[nn.Module]) -> Iterator[None]:
    training = [module for module in modules if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def configurations(modules: Iterable[nn.Module]) -> list[Any]:
    """The configurations that these modules hold, each once, in the modules' order: the outermost first."""
    return list({id(m.config): m.config for m in modules if "config" in vars(m)}.values())


@contextmanager
def attending_by(hf: Any, name: str, variable: ContextVar[Any], value: Any) -> Iterator[None]:
    """Let a model attend by the function registered under `name`, while `variable` holds what this function is to know."""
    before = variable.get()
    own = [(config, getattr(config, "_attn_implementation", None)) for config in configurations(hf.modules())]

    def put_back() -> None:
        for config, its in own:  # the outermost first: a configuration hands its attention on to those within it
            if getattr(config, "_attn_implementation", None) != its:
                config._attn_implementation = its
        variable.set(before)

    try:  # first, so that Ctrl-C leaves nothing behind wherever it comes
        variable.set(value)
        hf.config._attn_implementation = name
        yield
    finally:
        try:
            put_back()
        except KeyboardInterrupt:  # in the middle of it
            put_back()
            raise


@contextmanager
def _named_outputs(modules: list[nn.Module]) -> Iterator[None]:
    tuples = [config for config in configurations(modules) if getattr(config, "return_dict", True) is False]
    try:
        for config in tuples:
            config.return_dict = True
        yield
    finally:
        for config in tuples:
            config.return_dict = False

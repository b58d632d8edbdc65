"""One measurement at a time on a model, and always under the same conditions: eval mode, no autocast, outputs by name."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from interventions.models import CausalModel, forward_replaced


@dataclass
class _Hold:
    lock: Any = field(default_factory=RLock)
    depth: int = 0
    """how many `exclusive` contexts the thread that holds the lock is in"""


_holds: WeakKeyDictionary[nn.Module, _Hold] = WeakKeyDictionary()
_making = RLock()


@contextmanager
def exclusive(model: CausalModel, check: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold a model for one thread and make its passes reproducible; what was changed is put back on leaving.

    Dropout is off (eval mode), autocast is off, outputs are objects rather than tuples. Another thread that measures on this
    model, or calls its forward, waits until this one is done. check: called once the model is held, before anything is changed on it.
    """
    with _making:
        hold = _holds.setdefault(model.hf, _Hold())
    with hold.lock, ExitStack() as stack:
        hold.depth += 1
        stack.callback(setattr, hold, "depth", hold.depth - 1)
        if hold.depth == 1:
            if check is not None:
                check()
            for module in dict.fromkeys((model.hf, model.base)):
                waiting = _waiting(module.forward, hold.lock)
                stack.enter_context(forward_replaced(module, waiting, in_all_threads=True))
            stack.enter_context(_eval_mode(model.hf))
            stack.enter_context(_named_outputs(model.hf))
            stack.enter_context(torch.autocast(model.device.type, enabled=False))
        yield


def _waiting(forward: Callable[..., Any], lock: Any) -> Callable[..., Any]:
    """The module's forward, for whichever thread holds the lock."""

    def locked(*args: Any, **kwargs: Any) -> Any:
        with lock:
            return forward(*args, **kwargs)

    return locked


@contextmanager
def _eval_mode(hf: nn.Module) -> Iterator[None]:
    training = [module for module in hf.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _named_outputs(hf: nn.Module) -> Iterator[None]:
    configs: dict[int, Any] = {id(m.config): m.config for m in hf.modules() if "config" in vars(m)}
    tuples = [config for config in configs.values() if getattr(config, "return_dict", True) is False]
    try:
        for config in tuples:
            config.return_dict = True
        yield
    finally:
        for config in tuples:
            config.return_dict = False

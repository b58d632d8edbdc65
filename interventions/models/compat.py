"""Names that moved in the libraries below us, chosen by looking at the installed code, never by version number."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from interventions.models.exclusive import hooked


@cache
def multiplies_into_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether matrices of half precision there give a float32 product (`torch.mm(…, out_dtype=…)`: CUDA, in recent versions)."""
    if dtype not in (torch.float16, torch.bfloat16):
        return False
    x = torch.zeros(16, 16, device=device, dtype=dtype)
    try:
        return torch.mm(x, x, out_dtype=torch.float32).dtype == torch.float32
    except (TypeError, RuntimeError):  # NotImplementedError is one
        return False


_CACHE_NAMES = ("cache", "past_key_values")
"""What a forward pass calls its keys and values, the newest name first (transformers 5.24 renamed `past_key_values`)."""


@cache
def forward_parameters(kind: type) -> frozenset[str]:
    """Names of the arguments of a module class's forward pass."""
    return frozenset(inspect.signature(kind.forward).parameters)


def cache_name(module: nn.Module) -> str | None:
    """The argument under which `module.forward` takes keys and values, or None when it takes none."""
    return next((name for name in _CACHE_NAMES if name in forward_parameters(type(module))), None)


def without_cache(module: nn.Module) -> dict[str, bool]:
    """Arguments that keep `module.forward` from collecting keys and values; none where it has no such argument."""
    return {"use_cache": False} if "use_cache" in forward_parameters(type(module)) else {}


def _reads_only(function: Any, name: str) -> bool:
    """Whether the code of a method mentions this one of `_CACHE_NAMES` and no newer one."""
    code = getattr(inspect.unwrap(function), "__code__", None) if function is not None else None
    words = () if code is None else code.co_consts
    return name in words and not any(newer in words for newer in _CACHE_NAMES[: _CACHE_NAMES.index(name)])


@contextmanager
def cache_understood(base: nn.Module) -> Iterator[None]:
    """Let components of a TransformerBridge find keys and values that their blocks pass under a newer name.

    TransformerLens 4.3 looks for `past_key_values` among a block's keyword arguments, where transformers 5.24 passes
    `cache`. Without this the cache stays empty and no token sees the tokens before it.
    """
    name = cache_name(base)
    old = _CACHE_NAMES[-1]
    if name is None or name == old:
        yield
        return

    def translated(method: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: method(*args, **{old: kwargs.get(name), **kwargs})

    def rename(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if name not in kwargs or old in kwargs:
            return None
        return args, {**{k: v for k, v in kwargs.items() if k != name}, old: kwargs[name]}

    with ExitStack() as stack:
        for module in base.modules():
            if not type(module).__module__.startswith("transformer_lens."):
                continue
            update = getattr(type(module), "_update_kv_cache", None)
            if _reads_only(type(module).forward, old):
                stack.enter_context(hooked(module, rename, before=True))
            elif update is not None and _reads_only(update, old):
                stack.callback(module.__dict__.pop, "_update_kv_cache", None)
                object.__setattr__(module, "_update_kv_cache", translated(partial(update, module)))
        yield

"""The state of a model: a cheap fingerprint that tells whether it changed, and a description to keep with results."""

import functools
import hashlib
import os
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from interventions.models.rotary import depends_on_length, is_moving
from interventions.models.weights import bytes_of, identity, kept_away, read_back

_SAMPLE = 4
"""how many numbers of each tensor a fingerprint reads: a change through `.data` leaves no other trace"""
_NUMBERS = (bool, int, float)


class Fingerprint(NamedTuple):
    """Equal as long as a model has not changed; its parts tell what did. Valid only in the process that took it."""

    weights: int
    """storage, version and a few values of every parameter and buffer"""
    modules: int
    """which modules there are, their own numbers (an epsilon, a scale), and which adapters are active"""
    hooks: int
    """which hooks of the user's own are on which module"""
    code: int
    """which `forward` each module runs, and the attention implementation"""
    values: int
    """numbers and tensors that hooks, forwards and modules of the user's own refer to"""

    def changed(self, other: "Fingerprint") -> list[str]:
        """The parts in which two fingerprints differ."""
        return [name for name, a, b in zip(self._fields, self, other, strict=True) if a != b]


def fingerprint(hf: Any) -> Fingerprint:
    """The fingerprint of a Hugging Face module, wrapped or not; about a millisecond for a hundred modules."""
    weights, modules, hooks, code, samples, referred = [], [], [], [_attention(hf)], [], []
    for module in hf.modules():
        own = vars(module)
        moving = "rope_type" in own and is_moving(module)
        for tensors in (own["_parameters"], {} if moving else own["_buffers"]):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                away = kept_away(module, name) if tensor.is_meta else None
                weights.append(
                    identity(away) if isinstance(away, Path) else _identity(tensor if away is None else away)
                )
                samples.append(away if isinstance(away, Tensor) else tensor)
        modules.append(id(module))
        if not moving:
            modules += [value if type(value) in _NUMBERS else repr(value) for _, value in _numbers(module)]
        if own["_forward_pre_hooks"] or own["_forward_hooks"]:
            found = list(_hooks(module))
            hooks += [(id(module), number) for number, _ in found]
            referred += [_referred(hook) for _, hook in found]
        if not type(module).__module__.startswith(_OTHERS):
            referred += [(name, _identity(value)) for name, value in own.items() if isinstance(value, Tensor)]
        forward = own.get("forward")
        if forward is not None and not _alike(forward, type(module).forward):
            referred.append(_referred(forward))
        code.append((id(type(module).forward), None if forward is None else id(getattr(forward, "__func__", forward))))
    values = _sampled(samples)
    parts = (*weights, values), modules, hooks, code, referred
    return Fingerprint(*(hash(tuple(part)) for part in parts))


def _attention(hf: Any) -> tuple[Any, ...]:
    config = hf.config
    return tuple(getattr(c, "_attn_implementation", None) for c in (config, config.get_text_config()))


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    version = 0 if tensor.is_inference() else tensor._version
    try:
        where = tensor.data_ptr()
    except RuntimeError:  # tensors made of several, quantized ones for example
        where = id(tensor)
    return where, version, tensor.shape


def _sampled(tensors: Iterable[Tensor]) -> int:
    """A hash of a few values of each tensor, brought to the CPU in one piece for each device and dtype."""
    found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.device.type == "meta" or tensor.layout != torch.strided or type(tensor) not in _PLAIN:
            continue
        if tensor.numel() and tensor.is_contiguous():
            step = max(1, tensor.numel() // _SAMPLE)
            found.setdefault((tensor.device, tensor.dtype), []).append(tensor.detach().view(-1)[::step][:_SAMPLE])
    return hash(tuple(bytes_of(torch.cat(parts)).tobytes() for parts in found.values()))


_PLAIN = (Tensor, nn.Parameter, nn.Buffer) if hasattr(nn, "Buffer") else (Tensor, nn.Parameter)


_LIBRARIES = ("accelerate.", "nnsight.", "torch.", "transformer_lens.model_bridge.", "transformers.")
"""Hooks of these modules only move tensors or keep what passes. Those of TransformerLens' hook points, which call a user's, are not
among them."""


def _hooks(module: nn.Module) -> Iterator[tuple[int, Any]]:
    """Forward hooks of the user's own, with the numbers that torch gave them."""
    for hooks in (vars(module)["_forward_pre_hooks"], vars(module)["_forward_hooks"]):
        for number, hook in hooks.items():
            if not str(getattr(hook, "__module__", "")).startswith(_LIBRARIES):
                yield number, hook


_OTHERS = (*_LIBRARIES, "transformers_modules.")
"""of modules: what a checkpoint's code keeps for itself, such as a table of sines, grows with longer passes"""


def _referred(value: Any, names: Iterable[str] = (), depth: int = 0) -> Any:
    """What tells whether the numbers and tensors that some code refers to are still the same: those in its closure, its
    defaults and its globals, and the attributes that it names of objects there."""
    if isinstance(value, Tensor):
        return _identity(value)
    if value is None or isinstance(value, (str, *_NUMBERS)):
        return repr(value)
    if isinstance(value, np.ndarray):
        return value.shape, hash(value.tobytes()) if value.dtype != object else id(value)
    if depth > _DEEP:
        return id(value)
    parts: list[Any] = []
    if isinstance(value, (dict, list, tuple)):
        parts = list(value.values()) if isinstance(value, dict) else list(value)
    elif isinstance(value, types.FunctionType):
        names = value.__code__.co_names
        shared = [value.__globals__[name] for name in names if name in value.__globals__]
        cells = [_content(cell) for cell in value.__closure__ or ()]
        data = [v for v in shared if isinstance(v, (Tensor, np.ndarray, dict, list, tuple, *_NUMBERS))]
        parts = [*cells, *data, value.__defaults__, value.__kwdefaults__]
    elif isinstance(value, types.MethodType):
        names = getattr(value.__func__, "__code__", _EMPTY).co_names
        parts = [value.__func__, value.__self__]
    elif isinstance(value, functools.partial):
        parts = [value.func, value.args, value.keywords]
    elif not isinstance(value, (nn.Module, type, types.ModuleType)):
        if depth == 0:  # an object that is called
            names = getattr(getattr(type(value), "__call__", None), "__code__", _EMPTY).co_names  # noqa: B004
        own = getattr(value, "__dict__", {})
        parts = [own[name] for name in names if name in own]
    return id(value), tuple(_referred(part, names, depth + 1) for part in parts)


_EMPTY = (lambda: None).__code__


def _content(cell: Any) -> Any:
    """What stands in a closure's cell, None where nothing does yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


_ADAPTERS = ("_active_adapter", "_disable_adapters", "merged_adapters")
"""attributes of PEFT's layers that say which adapters are active"""


def _numbers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """A module's own numbers, such as an epsilon or a scale, and its active adapters, by name."""
    for name, value in vars(module).items():
        if name in _ADAPTERS or (type(value) in _NUMBERS and name != "training" and name[0] != "_"):
            yield name, value
        elif type(value) is dict and name[0] != "_" and value and all(type(v) in _NUMBERS for v in value.values()):
            yield name, sorted(value.items(), key=str)


def own_code(hf: nn.Module) -> list[str]:
    """Names of the modules that have hooks or a `forward` of the user's own.

    What TransformerLens, nnsight and other libraries put there does not count.
    """
    found = []
    for name, module in hf.named_modules():
        forward, usual = vars(module).get("forward"), type(module).forward
        if any(_hooks(module)) or (forward is not None and not _alike(forward, usual)):
            found.append(name or type(hf).__name__)
    return found


def depends_on_batch(hf: nn.Module, longest: int) -> bool:
    """Whether a prompt of up to `longest` tokens may get other activations in a padded batch than alone.

    True for hooks of the user's own, which may count tokens or prompts, and for rotary frequencies that depend on length.
    """
    return bool(own_code(hf)) or depends_on_length(hf, longest) is not None


def _alike(forward: Any, usual: Any) -> bool:
    """Whether a `forward` on an instance is the class's own, or a library's wrapper that goes by its name."""
    if any(getattr(forward, name, None) != getattr(usual, name, "") for name in ("__module__", "__qualname__")):
        return False
    while not isinstance(forward, types.FunctionType):
        inner = getattr(forward, "func", None) or getattr(forward, "__func__", None)
        if inner is None:
            return type(forward).__module__.startswith(_LIBRARIES)
        forward = inner
    home = str(forward.__globals__.get("__name__"))
    if home.startswith("interventions."):  # ours, for the time of a measurement: ask what it stands for
        return _alike(vars(forward).get("__wrapped__", usual), usual)
    return forward is usual or home.startswith(_LIBRARIES)


def described(hf: Any) -> dict[str, Any]:
    """What decides, beside its parameters, what a model computes. Kept with results; the same in every process.

    `config`, `buffers` and `numbers` (of modules: an epsilon, a scale) as SHA-256, `attention` by name, `own_code` as what
    `own_code` gives with a hash of that code and of the values it refers to. Code whose values cannot be hashed counts as new
    in every process, so that no result is mistaken for another's.
    """
    numbers, buffers, code = hashlib.sha256(), hashlib.sha256(), []
    for name, module in hf.named_modules():
        own, moving = vars(module), is_moving(module)
        if not moving:
            numbers.update(repr((name, sorted(_numbers(module)))).encode())
            for key, value in own["_buffers"].items():
                value = None if value is None else read_back(module, key, value)
                if value is not None and not value.is_meta:
                    buffers.update(
                        f"{name}.{key}{tuple(value.shape)}{value.dtype}".encode() + bytes_of(value).tobytes()
                    )
        put_on = [hook for _, hook in _hooks(module)]
        forward = own.get("forward")
        if forward is not None and not _alike(forward, type(module).forward):
            put_on.append(forward)
        code += [f"{name} {hashlib.sha256(b''.join(_told(f))).hexdigest()[:16]}" for f in put_on]
    config = {k: v for k, v in hf.config.to_dict().items() if k not in _NOT_THE_MODEL}
    return {
        "config_sha256": hashlib.sha256(repr(sorted(config.items(), key=str)).encode()).hexdigest(),
        "buffers_sha256": buffers.hexdigest(),
        "numbers_sha256": numbers.hexdigest(),
        "attention": _attention(hf)[-1],
        "own_code": code,
    }


_NOT_THE_MODEL = ("_name_or_path", "transformers_version", "return_dict", "architectures", "dtype", "torch_dtype")
_PROCESS = os.urandom(16)


def _told(value: Any, depth: int = 0) -> Iterator[bytes]:
    """Bytes that are equal, in every process, for code and values that do the same; different in each process where that cannot be known."""
    if isinstance(value, Tensor):
        yield f"{tuple(value.shape)}{value.dtype}".encode() + bytes_of(value).tobytes()
    elif value is None or isinstance(value, (str, bytes, *_NUMBERS)):
        yield repr(value).encode()
    elif isinstance(value, (types.ModuleType, type, types.BuiltinFunctionType)):
        yield f"{getattr(value, '__module__', '')}.{value.__name__}".encode()
    elif depth > _DEEP:
        yield _PROCESS + str(id(value)).encode()
    else:
        parts = _parts(value)
        yield f"{type(value).__module__}.{type(value).__qualname__}".encode()
        for part in [_PROCESS, id(value)] if parts is None else parts:
            yield from _told(part, depth + 1)


_DEEP = 8  # functions in closures of functions: deeper than hooks go


def _parts(value: Any) -> list[Any] | None:
    """What code or a container is made of; None where that cannot be seen."""
    if isinstance(value, dict):
        return [part for item in value.items() for part in item]
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, types.CodeType):
        return [value.co_code, value.co_names, *value.co_consts]
    if isinstance(value, types.FunctionType):
        named = [value.__globals__[name] for name in value.__code__.co_names if name in value.__globals__]
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return [value.__code__, *cells, *named, value.__defaults__, value.__kwdefaults__]
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, nn.Module):
        return [{**vars(value)["_parameters"], **vars(value)["_buffers"]}]
    return None

"""CUDA devices that do not exist: their tensors say that they are on cuda:0 or cuda:1 and hold CPU tensors.

What a GPU refuses is refused here (operands on two devices), and what costs time there is counted: kernels, copies between host
and device, and every time the host waits for the device. Numbers are the CPU's own. Kernels of ours do not run here: Triton needs a GPU.

    with pretended_cuda(), counting() as count:
        measure(…)
    waits(count)
"""

import contextlib
import functools
import hashlib
import math
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
_OURS = tuple(str(ROOT / package) for package in ("interventions", "diagnostics", "sae_models"))

aten = torch.ops.aten
_INDEXING = {
    *(aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten.index_put_.default),
    *(aten._index_put_impl_.default, aten._unsafe_index_put.default),
}
_READING = {aten.index.Tensor, aten._unsafe_index.Tensor}
_COPIES = {aten.copy_.default, aten._to_copy.default, aten.copy.default}
_WAITS = {
    *(aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default, aten.equal.default),
    *(aten.nonzero.default, aten.masked_select.default, aten.repeat_interleave.Tensor),
    *(aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default),
}
"""The size of what they give, or what Python does next, depends on numbers that are on the device."""
_FREE = {
    *(aten.detach.default, aten.alias.default, aten.lift_fresh.default, aten._unsafe_view.default),
    *(aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default),
    *(aten.new_empty.default, aten.new_empty_strided.default),
}
_APART = "Expected all tensors to be on the same device, but found at least two devices"

_count: Counter | None = None


class _OnDevice(Tensor):
    """A tensor that says it is on a CUDA device."""

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> "_OnDevice":
        made = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=device,
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self) -> str:
        return f"on {self.device}: {self.held!r}"


def _here(x: Any) -> Any:
    """An argument as the CPU takes it."""
    if isinstance(x, _OnDevice):
        return x.held
    return CPU if isinstance(x, torch.device) and x.type == "cuda" else x


def _indexed(device: Any) -> torch.device | None:
    """A device with its index, or None."""
    if device is None:
        return None
    device = torch.device("cuda", device) if type(device) is int else torch.device(device)
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def _dispatch(func: Any, args: Any, kwargs: dict) -> Any:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = [x for x in tensors if isinstance(x, _OnDevice)]
    asked = _indexed(kwargs.get("device"))
    if not there and (asked is None or asked.type != "cuda"):
        return func(*args, **kwargs)
    device = asked if asked is not None else args[0].device if func in _COPIES else there[0].device
    _check(func, args, tensors)
    _note(func, args, kwargs, tensors, device)
    out = func(*tree_map(_here, args), **tree_map(_here, kwargs))
    if func is aten.copy_.default:
        return args[0]
    if func is aten._local_scalar_dense.default or device.type != "cuda":
        return out
    out = tree_map(lambda x: _OnDevice(x, device) if isinstance(x, Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if there and asked is None else out


def _check(func: Any, args: Any, tensors: list[Tensor]) -> None:
    """Refuse what CUDA refuses."""
    if func in _COPIES:
        return
    if func in _INDEXING:  # indices may be on the CPU, what they index and what is put there may not
        me, indices = args[0], [i for i in args[1] if i is not None]
        if me.device == CPU:
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        put = [] if func in _READING else [args[2]]
        tensors = [me, *(i for i in indices if i.device != CPU), *put]
    devices = {x.device for x in tensors if x.ndim > 0 or x.device != CPU}
    if len(devices) > 1:
        raise RuntimeError(f"{_APART}, {' and '.join(sorted(map(str, devices)))}! ({func})")


def _note(func: Any, args: Any, kwargs: dict, tensors: list[Tensor], device: torch.device) -> None:
    """Count what this operation costs."""
    if _count is None or func in _FREE or func.is_view:
        return
    if func in _COPIES and tensors:
        source, to = tensors[-1], args[0] if func is aten.copy_.default else None
        ends = source.device.type, (device if to is None else to.device).type
        if ends == ("cuda", "cuda"):
            _add("kernel", func)
        elif ends == ("cuda", "cpu"):  # without a wait it goes to pinned memory, which PyTorch takes itself
            _add("download" if _not_blocking(args, kwargs) else "wait", func)
        else:
            dtype = to.dtype if to is not None else kwargs.get("dtype") or source.dtype
            free = _not_blocking(args, kwargs) and source.is_pinned() and dtype == source.dtype
            _add("upload" if free and source.is_contiguous() else "wait", func)
        return
    if func in _INDEXING:
        for i in (i for i in args[1] if i is not None):
            if i.device == CPU:
                _add("wait", func)  # PyTorch uploads it
            if i.dtype in (torch.bool, torch.uint8):
                _add("wait", func)  # which are true?
    _add("wait" if func in _WAITS else "kernel", func)


def _not_blocking(args: Any, kwargs: dict) -> bool:
    return bool(kwargs.get("non_blocking", args[2] if len(args) > 2 else False))


def _add(kind: str, what: Any) -> None:
    if _count is not None:
        _count[kind, str(what).removeprefix("aten."), _line()] += 1


def _line() -> str:
    """The innermost line of ours that is running; not those that only carry tensors to the device."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_OURS) and not name.endswith("uploads.py"):
            return f"{Path(name).relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


@contextlib.contextmanager
def counting() -> Iterator[Counter]:
    """Counts while it lasts, by (kind, operation, line of ours): `kernel`, `upload`, `download` and `wait`, the host's for the device."""
    global _count
    _count = Counter()
    try:
        yield _count
    finally:
        _count = None


def total(count: Counter, kind: str) -> float:
    """All of one kind."""
    return sum(n for (what, *_), n in count.items() if what == kind)


class _Mode(TorchDispatchMode):
    """Takes the calls that make a tensor on the device, which have none for an argument."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


def pretended_cuda() -> TorchDispatchMode:
    """While it lasts there is a CUDA device. What it changes in torch stays changed in this process."""
    _install()
    return _Mode()


def compiler() -> str | None:
    """The C++ compiler that the guard is built with."""
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def _guard() -> Path:
    """The guard, built on first use for this torch."""
    source = Path(__file__).with_name("guard.cpp")
    key = hashlib.sha256(torch.__version__.encode() + source.read_bytes()).hexdigest()[:12]
    built = ROOT / "build" / "pretend_cuda" / f"guard-{key}.so"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        torch_root, partial = Path(torch.__file__).parent, built.with_suffix(f".{hash(object())}")
        options = ["-O0", "-fPIC", "-shared", "-std=c++20", f"-I{torch_root / 'include'}"]
        libraries = [f"-L{torch_root / 'lib'}", "-lc10"]
        subprocess.run([str(compiler()), *options, str(source), *libraries, "-o", str(partial)], check=True)
        partial.replace(built)  # two workers may build at once
    return built


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
               is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Tensor:  # fmt: skip
    """`scaled_dot_product_attention` in plain operations: torch's own asks the real CUDA for a kernel."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    scores = (query * scale) @ key.transpose(-1, -2)
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, -math.inf)
    if attn_mask is not None:
        boolean = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -math.inf) if boolean else scores + attn_mask
    return scores.softmax(-1) @ value


@functools.cache
def _install() -> None:
    """What torch does outside its dispatcher, made to know of the device."""
    torch.ops.load_library(_guard())
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    known: dict[str, Any] = {
        **{"_lazy_init": None, "synchronize": None, "empty_cache": None, "reset_peak_memory_stats": None},
        **{"is_available": True, "device_count": 2, "current_device": 0, "get_device_capability": (9, 0)},
        **{"is_bf16_supported": True, "memory_allocated": 0, "max_memory_allocated": 0, "get_device_name": "pretended"},
        **{
            "mem_get_info": (2**37, 2**37),
            "memory_reserved": 0,
            "get_device_properties": SimpleNamespace(total_memory=2**37),
        },
    }
    for name, answer in known.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.synchronize = lambda *_: _add("wait", "synchronize")
    sdpa, own_to, own_pinned = F.scaled_dot_product_attention, Tensor.to, Tensor.is_pinned

    def attend(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return (_attention if query.device.type == "cuda" else sdpa)(query, *args, **kwargs)

    def is_device(x: Any) -> bool:
        return isinstance(x, torch.device) or type(x) is int or (isinstance(x, str) and x.startswith("cuda"))

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        args, named = (tuple(_indexed(x) if is_device(x) else x for x in each) for each in (args, kwargs.values()))
        return own_to(self, *args, **dict(zip(kwargs, named, strict=True)))

    def making(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`torch.tensor`, which fills what it makes by itself."""

        def make(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
            if isinstance(data, _OnDevice):
                made = to(data, kwargs["dtype"]) if kwargs.get("dtype") else data
            else:
                made = own(data, *args, **kwargs)
            return made if device is None else to(made, torch.device(device))

        return make

    def pin(self: Tensor, *_: Any) -> Tensor:
        made = self.clone()
        made.pretends_to_be_pinned = True
        return made

    own_list = Tensor.tolist
    Tensor.to = to
    Tensor.tolist = lambda self: own_list(to(self, CPU))
    Tensor.cuda = lambda self, *_, **__: to(self, "cuda")
    Tensor.pin_memory = pin
    Tensor.is_pinned = lambda self: getattr(self, "pretends_to_be_pinned", False) or own_pinned(self)
    torch.tensor, torch.as_tensor = making(torch.tensor), making(torch.as_tensor)
    F.scaled_dot_product_attention = attend

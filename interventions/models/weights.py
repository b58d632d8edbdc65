"""A model's weights however they are kept: on several devices, away until a module runs, in 8 or 4 bits. Their names and their hash.

accelerate (`device_map`, `cpu_offload`, `disk_offload`) leaves on each module a hook that knows where its weights are, and moves what
the module reads to where it runs. Nothing here imports accelerate.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from interventions.cache import cache_folder

WRAPPED = "_original_component"
IN_PARALLEL = 2**31
"""Bytes of weights from which on tensors are hashed side by side, and those that lie in files by the files' identity."""
_FOLDER = "weight_hashes"
_PLAIN = (Tensor, nn.Parameter, nn.Buffer) if hasattr(nn, "Buffer") else (Tensor, nn.Parameter)


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    """accelerate's hooks on a module."""
    hook = getattr(module, "_hf_hook", None)
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def kept_away(module: nn.Module, name: str) -> Tensor | Path | None:
    """A weight that its module holds only while it runs: the tensor in host memory, or the file that holds it; None: not known."""
    for hook in _hooks(module):
        kept, key = getattr(hook, "weights_map", None), name
        while hasattr(kept, "prefix"):
            kept, key = kept.dataset, kept.prefix + key  # pyright: ignore[reportOptionalMemberAccess]
        in_memory: Any = getattr(kept, "state_dict", kept) or {}
        if key in in_memory:
            return in_memory[key]
        if (about := (getattr(kept, "index", None) or {}).get(key)) is not None:
            return Path(about.get("safetensors_file") or Path(kept.save_folder) / f"{key}.dat")  # pyright: ignore[reportOptionalMemberAccess]
    return None


def read_back(module: nn.Module, name: str, value: Tensor) -> Tensor:
    """A weight itself, also where it is kept away."""
    for hook in _hooks(module) if value.is_meta else ():
        if kept_away(module, name) is not None:
            return hook.weights_map[name]
    return value


def input_device(hf: nn.Module) -> torch.device:
    """Where a model takes token ids: its first weight's device, or where accelerate brings that weight to run."""
    first = next(hf.parameters())
    if not first.is_meta:
        return first.device
    for module in hf.modules():
        for hook in _hooks(module) if any(p is first for p in vars(module)["_parameters"].values()) else ():
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return torch.device(f"cuda:{device}" if isinstance(device, int) else device)
    return first.device


def weights_dtype(hf: nn.Module) -> torch.dtype:
    """The dtype of the first weight of floating point: quantised ones may be bytes."""
    first = next(hf.parameters())
    return next((p.dtype for p in hf.parameters() if p.is_floating_point()), first.dtype)


def not_loaded(hf: nn.Module) -> str | None:
    """A weight that is neither there nor kept by accelerate, by name; or None."""
    for path, module in hf.named_modules():
        for name, value in module.named_parameters(recurse=False):
            if value.is_meta and kept_away(module, name) is None:
                return f"{path}.{name}"
    return None


def is_large(hf: nn.Module) -> bool:
    """Whether a model's weights are hashed side by side, and once for the files that they come from."""
    return sum(p.nbytes for p in hf.parameters()) >= IN_PARALLEL


def n_embedded(hf: Any) -> int:
    """Tokens that a model's embedding knows."""
    given = hf.get_input_embeddings()
    known = getattr(given, "num_embeddings", None)  # packed weights have other shapes
    return given.weight.shape[0] if known is None else known


@torch.no_grad()
def unembedding(hf: Any) -> Tensor:
    """W_U `[vocab, d_model]`, wherever the head keeps it; of a head without a plain weight what it gives for the identity."""
    head = hf.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if isinstance(weight, Tensor) and weight.is_meta:
        weight = read_back(head, "weight", weight).to(input_device(hf))
    if isinstance(weight, Tensor) and type(weight) in _PLAIN and weight.is_floating_point():
        return weight.to(input_device(hf))
    device, dtype = input_device(hf), weights_dtype(hf)
    width = getattr(head, "in_features", None) or hf.config.get_text_config().hidden_size
    given = torch.cat([torch.eye(width, device=device, dtype=dtype), torch.zeros(1, width, device=device, dtype=dtype)])
    found = head(given[None])[0].to(device)
    return (found[:-1] - found[-1:]).T


class OnDisk(NamedTuple):
    """A weight that lies in a file."""

    path: Path
    shape: torch.Size
    dtype: torch.dtype
    nbytes: int
    read: Callable[[], Tensor]


def canonical_tensors(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor | None]]:
    """Weights under the names they have outside a bridge, whose components hold the module they stand for and copies.

    Parameters, and what quantised modules keep beside them: buffers that are saved with the model, scales. Weights packed by dynamic
    quantization, and those that accelerate keeps away, are taken from where they are.
    """
    for name, value in _named(module, prefix):
        yield name, value.read() if isinstance(value, OnDisk) else value


def _named(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor | OnDisk | None]]:
    children = dict(module.named_children())
    if WRAPPED in children:
        yield from _named(children[WRAPPED], prefix)
        return
    if callable(getattr(module, "weight", None)):  # packed
        yield from ((prefix + name, _as_tensor(getattr(module, name, None))) for name in ("weight", "bias"))
        return
    for name, value in module.named_parameters(recurse=False):
        yield prefix + name, _where(module, name, value)
        for beside, part in _beside(module, value):
            yield f"{prefix}{name}.{beside}", part
    for name, value in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield prefix + name, _where(module, name, value)
    for name, child in children.items():
        yield from _named(child, f"{prefix}{name}.")


def _where(module: nn.Module, name: str, value: Tensor) -> Tensor | OnDisk | None:
    if not value.is_meta:
        return value
    found = kept_away(module, name)
    if not isinstance(found, Path):
        return found
    return OnDisk(found, value.shape, value.dtype, value.nbytes, lambda: read_back(module, name, value))


def _beside(module: nn.Module, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What bitsandbytes keeps as attributes: the scales of an 8-bit weight, the state of a 4-bit one."""
    scales = getattr(weight, "SCB", None)
    scales = scales if scales is not None else getattr(getattr(module, "state", None), "SCB", None)
    if isinstance(scales, Tensor) and weight.dtype == torch.int8:
        yield "SCB", scales
    if (state := getattr(weight, "quant_state", None)) is not None:
        yield from state.as_dict(packed=True).items()


def _as_tensor(value: Any) -> Tensor | None:
    """A weight, or what a quantized layer's method of that name gives."""
    return value if value is None or isinstance(value, Tensor) else value()


def _plain_parts(value: Any) -> list[Tensor]:
    """The plain tensors that a quantized one is made of; a plain tensor itself."""
    if hasattr(value, "__tensor_flatten__"):
        return [part for name in value.__tensor_flatten__()[0] for part in _plain_parts(getattr(value, name))]
    if not value.is_quantized:
        return [value]
    if value.qscheme() in (torch.per_channel_affine, torch.per_channel_affine_float_qparams):
        return [value.int_repr(), value.q_per_channel_scales(), value.q_per_channel_zero_points()]
    return [value.int_repr(), torch.tensor([value.q_scale(), value.q_zero_point()], dtype=torch.float64)]


def all_weights(hf: Any, base: nn.Module) -> dict[str, Tensor | OnDisk | None]:
    """Every weight by name: those of the model without its unembedding, and the unembedding's, tied or not; its bias unless it is 0."""
    head = hf.get_output_embeddings()
    found = dict(_named(base, ""))
    own = dict(_named(head, "unembed."))
    bias = own.pop("unembed.bias", None)
    if bias is not None and bool((bias.read() if isinstance(bias, OnDisk) else bias).any()):
        own["unembed.bias"] = bias
    return found | own


def hash_of(values: Mapping[str, Tensor | OnDisk | None]) -> tuple[str, str | None]:
    """SHA-256 over names, shapes, dtypes and bytes of weights, and which of them it covers (None: all, and all are parameters).

    From `IN_PARALLEL` bytes on it is the hash of a list of the weights' own hashes, which threads form side by side. Weights in files are
    then read only where the file (path, size, time of change, inode) is not the one whose hash was kept under `cache_folder()`.
    """
    there = {name: value for name, value in sorted(values.items()) if value is not None and _is_there(value)}
    digest = hashlib.sha256()
    if sum(value.nbytes for value in there.values()) < IN_PARALLEL:
        for name, value in there.items():
            _update(digest, name, value)
    else:
        on_disk = {name: value for name, value in there.items() if isinstance(value, OnDisk)}
        in_memory = [name for name in there if name not in on_disk]
        one = lambda name: (name, _digest(name, there[name]))  # noqa: E731
        with ThreadPoolExecutor(max(1, min(16, os.cpu_count() or 1))) as pool:
            every = dict(pool.map(one, in_memory))
            every |= remembered(on_disk, lambda: dict(pool.map(one, on_disk))) if on_disk else {}
        digest.update(json.dumps(sorted(every.items())).encode())
    return digest.hexdigest(), _covered(values, there)


def _is_there(value: Tensor | OnDisk) -> bool:
    return isinstance(value, OnDisk) or value.device.type != "meta"


def _digest(name: str, value: Tensor | OnDisk) -> str:
    digest = hashlib.sha256()
    _update(digest, name, value)
    return digest.hexdigest()


def _update(digest: Any, name: str, value: Tensor | OnDisk) -> None:
    digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
    for part in _plain_parts(value.read() if isinstance(value, OnDisk) else value):
        digest.update(bytes_of(part))


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's bytes, in the order of its indices."""
    whole = tensor.detach().cpu().contiguous()
    # Of a single number any stride is contiguous, and `view` takes 1 alone.
    return whole.as_strided((whole.numel(),), (1,)).view(torch.uint8).numpy().data


def _covered(values: Mapping[str, Tensor | OnDisk | None], there: Mapping[str, Tensor | OnDisk]) -> str | None:
    plain = [v.dtype.is_floating_point and (isinstance(v, OnDisk) or type(v) in _PLAIN) for v in there.values()]
    said = [f"{len(there)} of {len(values)} tensors: the others are not loaded"] if len(there) < len(values) else []
    if quantised := plain.count(False):
        said.append(f"{len(there)} tensors, {quantised} of them quantised; their scales are among the others")
    return "; ".join(said) or None


def identity(path: Path) -> tuple[str, int, int, int]:
    """What a file is known by: its path, size, time of change and inode."""
    found = path.stat()
    return str(path.resolve()), found.st_size, found.st_mtime_ns, found.st_ino


def remembered(
    values: Mapping[str, OnDisk] | Iterable[Path], make: Callable[[], dict[str, str]], how: str = ""
) -> dict[str, str]:
    """Hashes of what lies in files, from the cache folder where the files are the same as then; where that cannot be written, made anew."""
    if isinstance(values, Mapping):
        said: list[Any] = [(name, str(v.dtype), *identity(v.path)) for name, v in sorted(values.items())]
    else:
        said = [identity(path) for path in sorted(values)]
    kept = cache_folder() / _FOLDER / f"{hashlib.sha256(json.dumps([how, said]).encode()).hexdigest()}.json"
    try:
        return json.loads(kept.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = make()
    partial = kept.with_suffix(f".{os.getpid()}")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(found), encoding="utf-8")
        os.replace(partial, kept)
    except OSError:
        pass  # without a cache it takes as long again
    return found

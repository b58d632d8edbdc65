"""Runners on their way to other processes: models by what makes them, or whole, once; tensors as buffers."""

import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from ray.cloudpickle.cloudpickle import Pickler
from torch import Tensor

from diagnostics.running.place import differences
from interventions.errors import ModelError, ResultError
from interventions.models.causal_model import CausalModel
from interventions.models.fingerprint import fingerprint
from interventions.models.loading import load_model, untrained
from interventions.models.wrapping import wrap
from interventions.provenance import model_provenance

Parts = list[Any]
"""the pickle and its buffers, as arrays of bytes"""
_IN_PLACE = (Tensor, torch.nn.Parameter)


class _Pickler(Pickler):
    """Models are named, tensors copied as they lie, whatever device they are on."""

    def __init__(self, file: io.BytesIO, buffers: list[pickle.PickleBuffer], name: Callable[[CausalModel], str] | None):
        super().__init__(file, protocol=5, buffer_callback=buffers.append)
        self.name = name

    def persistent_id(self, obj: Any) -> Any:
        return self.name(obj) if self.name is not None and isinstance(obj, CausalModel) else None

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.device):
            return torch.device, (obj.type,)
        if (
            type(obj) in _IN_PLACE
            and obj.layout == torch.strided
            and obj.device.type != "meta"
            and not obj.is_quantized
        ):
            held = obj.detach().cpu().contiguous().reshape(-1)
            data = held.view(torch.uint8).numpy() if held.numel() else np.zeros(0, dtype=np.uint8)
            layout = obj.dtype, tuple(obj.shape), obj.stride(), obj.device.type
            return _tensor, (data, *layout, isinstance(obj, torch.nn.Parameter), obj.requires_grad)
        return super().reducer_override(obj)


def _tensor(
    data: np.ndarray,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    device: str,
    parameter: bool,
    requires_grad: bool,
) -> Tensor:
    """In memory that torch allots, and as it lay where it came from: sums may depend on either in the last bits."""
    span = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    apart = data.size == 0 or 0 in stride or span * dtype.itemsize > 4 * data.size
    found = torch.empty(shape, dtype=dtype) if apart else torch.empty_strided(shape, stride, dtype=dtype)
    if data.size:
        found.copy_(torch.from_numpy(data).view(dtype).reshape(shape))
    found = found.to(device)
    return torch.nn.Parameter(found, requires_grad) if parameter else found.requires_grad_(requires_grad)


class _Unpickler(pickle.Unpickler):
    def __init__(self, parts: Parts, models: Callable[[str], CausalModel] | None):
        super().__init__(io.BytesIO(parts[0].tobytes()), buffers=[bytearray(part) for part in parts[1:]])
        self.models = models

    def persistent_load(self, pid: Any) -> Any:
        assert self.models is not None
        return self.models(pid)


def packed_up(value: Any, name: Callable[[CausalModel], str] | None = None) -> Parts:
    """`value` as arrays of bytes. name: called with each model in it, which goes by that name.

    Raises `ResultError` for what cannot be carried, such as an open file in a hook.
    """
    file, buffers = io.BytesIO(), []
    try:
        _Pickler(file, buffers, name).dump(value)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise ResultError(f"cannot be sent to workers: {' '.join(str(error).split())}; run without workers") from error
    return [np.frombuffer(part, dtype=np.uint8) for part in (file.getvalue(), *(b.raw() for b in buffers))]


def unpacked(parts: Parts, models: Callable[[str], CausalModel] | None = None) -> Any:
    """What `packed_up` was given, with its own copy of every tensor; on the device of the same kind."""
    return _Unpickler(parts, models).load()


def recipe(model: CausalModel, name: Callable[[CausalModel], str]) -> dict[str, Any]:
    """How another process makes the model, and what it must then be. Raises `ModelError` for a wrapped one."""
    if model.wrapper != "huggingface":
        raise ModelError(
            f"workers need a plain Hugging Face model; {model.name} is wrapped by {model.wrapper}: pass the model itself, or run without "
            "workers"
        )
    if len(parts := {str(part) for part in (getattr(model.hf, "hf_device_map", None) or {}).values()}) > 1:
        raise ModelError(
            f"each worker holds the model on one device; {model.name} is spread over {', '.join(sorted(parts))}: run without workers"
        )
    said = {"is": model_provenance(model)}
    if model.made is not None and not model.made.as_made.changed(fingerprint(model.hf)):
        kind, what, *rest = model.made.how
        return said | {"how": (kind, name(what) if kind == "untrained" else what, *rest)}
    return said | {"how": ("whole", packed_up((model.hf, model.tokenizer, model.counterpart_of)))}


def made(given: dict[str, Any], models: Callable[[str], CausalModel]) -> CausalModel:
    """The model of a recipe. Raises `ModelError` where it is another one than the recipe was made of."""
    (kind, what, *rest), expected = given["how"], given["is"]
    if kind == "loaded":
        dtype, trusted = rest
        found = load_model(what, dtype=dtype, device=expected["device"], trust_remote_code=trusted)
    elif kind == "untrained":
        found = untrained(models(what), *rest)
    else:
        hf, tokenizer, counterpart = unpacked(what)
        found = wrap(hf, tokenizer)
        found.counterpart_of = counterpart
    found.name, found.note = expected["model"], expected["model_note"]
    here = model_provenance(found)
    if differ := differences(
        expected, here, [key for key in expected if key not in ("processor", "threads", "versions", "python")]
    ):
        raise ModelError(f"a worker has another model: {differ}; give every worker the same files")
    return found

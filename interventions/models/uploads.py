"""Numbers as callers give them; to the device and back without the host waiting for it."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interventions.errors import EditError, SiteError


def upload(given: Tensor | np.ndarray, device: torch.device) -> Tensor:
    """A tensor or array on a device. From the CPU to CUDA it goes from pinned memory, and the host does not wait."""
    tensor = torch.from_numpy(given) if isinstance(given, np.ndarray) else given
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


def upload_all(arrays: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """Arrays of int64 on a device; on CUDA one copy for all."""
    if device.type != "cuda":
        return [upload(array, device) for array in arrays]
    packed = upload(np.concatenate([array.reshape(-1) for array in arrays]), device)
    parts = packed.split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


def download(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU; from CUDA the host waits once for all."""
    found = {name: tensor.to("cpu", non_blocking=tensor.is_cuda) for name, tensor in tensors.items()}
    for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
        torch.cuda.synchronize(device)
    return found


def token_rows(prompt: Any, position: Any, what: str = "prompts") -> tuple[Tensor, Tensor]:
    """Prompts (or `what`) `[row]` and positions `[row]` or `[row, edit]`, given as tensors, arrays, lists or numbers, on the CPU.

    A single number counts for every row. Raises `SiteError` for what is no whole number.
    """
    prompts, positions = whole_numbers(prompt, what), whole_numbers(position, "positions")
    if not prompts.ndim:
        prompts = prompts.expand(len(positions) if positions.ndim else 1)
    return prompts, positions if positions.ndim else positions.expand(len(prompts))


def whole_numbers(given: Any, what: str) -> Tensor:
    """Indices given in any form, on the CPU. Raises `SiteError` for other than whole numbers."""
    try:
        found = torch.as_tensor(given).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise SiteError(
            f"{what} are no table of whole numbers ({error}); expected one row each, padded with −1"
        ) from None
    if found.numel() and (found.is_floating_point() or found.dtype == torch.bool):
        raise SiteError(f"{what} of {found.dtype}; expected whole numbers (of a mask its mask.nonzero())")
    return found.long()


def as_vectors(given: Any) -> Tensor:
    """Vectors as they are; lists and arrays of them as one tensor. Raises `EditError` for what is none."""
    if isinstance(given, Tensor):
        return given
    try:
        of_tensors = isinstance(given, list | tuple) and all(isinstance(one, Tensor) for one in given)
        found = torch.stack(tuple(given)) if of_tensors and given else torch.as_tensor(given)
        return found if found.is_floating_point() else found.float()
    except (TypeError, ValueError, RuntimeError) as error:
        raise EditError(
            f"edited vectors are {type(given).__name__} ({error}); expected [row, d_model], or a function of row indices"
        ) from None

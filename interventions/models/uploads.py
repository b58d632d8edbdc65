"""Numbers to the device and back without the host waiting for it."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


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

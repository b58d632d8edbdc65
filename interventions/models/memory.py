"""How much memory there is, and what of it a recording and a chunk of rows may take."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from interventions.errors import MechdiagError

DEVICE_SHARE, HOST_SHARE = 0.4, 0.5
"""of what is free when a recording begins: the rest is for weights that come and go, and for chunks"""
_ROWS_CPU, _ROWS_GPU = 512, 4096
_LOGITS_CPU, _LOGITS_GPU = 2**25, 2**28
_CHUNK_SHARE, _LOGITS_SHARE = 0.1, 0.1
"""of a GPU's memory that weights leave: for what one block makes of a chunk's rows, and for logits held at once"""
_LOGIT_BYTES = 16
"""a logit, its clean one, and what a metric makes of them"""
_UNKNOWN = 2**62


class Budget(NamedTuple):
    """Bytes that a recording may take; None: `MECHDIAG_DEVICE_BYTES` and `MECHDIAG_HOST_BYTES`, else a share of what is free.

    Prompts beyond those of `device` are kept in host memory; beyond those of `host` too they are recorded again when they are needed.
    The numbers stay the same. For a model on the CPU the default is `HOST_SHARE` of free memory for `device`, and nothing beyond it.
    """

    device: int | None = None
    """on each device that blocks are on"""
    host: int | None = None

    def on(self, device: torch.device) -> int:
        """Bytes on a device."""
        given = _given(self.device, "MECHDIAG_DEVICE_BYTES")
        if given is not None:
            return given
        return int(free_bytes(device) * (HOST_SHARE if device.type == "cpu" else DEVICE_SHARE))

    def in_host_memory(self, device: torch.device) -> int:
        """Bytes in host memory, beside a device's."""
        given = _given(self.host, "MECHDIAG_HOST_BYTES")
        if given is not None:
            return given
        return 0 if device.type == "cpu" else int(free_bytes(torch.device("cpu")) * HOST_SHARE)


def _given(value: int | None, variable: str) -> int | None:
    """A budget given in Python or in the environment. Raises `MechdiagError` for what is no number of bytes."""
    said: Any = os.environ.get(variable) if value is None else value
    if said is None or said == "":
        return None
    try:
        number = int(float(said))
    except (ValueError, OverflowError):
        number = -1
    if number < 0:
        raise MechdiagError(f"a budget of {said!r} bytes ({variable}); expected a number, 0 or more, such as 8e9")
    return number


def free_bytes(device: torch.device) -> int:
    """Memory that can be taken now; on the CPU also within the limit of the process' control group. 2^62 where it is not known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(_available(), _within_group())


def _available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return _UNKNOWN


def _within_group() -> int:
    """What the control group (v2) of this process leaves, its file cache not counted."""
    try:
        own = Path("/proc/self/cgroup").read_text(encoding="utf-8").strip().rpartition("::")[2]
        folder = Path("/sys/fs/cgroup") / own.lstrip("/")
        folder = folder if (folder / "memory.max").exists() else Path("/sys/fs/cgroup")
        most, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return max(0, most - used + int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):  # none, or no limit ("max")
        return _UNKNOWN


def rows_at_once(model: Any, n_pos: int) -> int:
    """Tokens that a chunk replays: 512 on the CPU; on a GPU up to 4096, a power of 2 by the memory that weights leave.

    Of the GPU's whole memory and not of what is free now: the same chunks in every process on GPUs of one kind, because last bits depend
    on them. n_pos: tokens of the longest prompt.
    """
    if model.device.type != "cuda":
        return _ROWS_CPU
    config = model.config
    heads = getattr(config, "num_attention_heads", None) or getattr(config, "n_head", 1)
    inner = getattr(config, "intermediate_size", None) or 4 * model.d_model
    wide = torch.promote_types(model.dtype, torch.float32).itemsize
    row = heads * n_pos * (wide + 2 * model.dtype.itemsize) + (3 * inner + 8 * model.d_model) * model.dtype.itemsize
    return _power_of_2(_left_by_weights(model) * _CHUNK_SHARE / row, _ROWS_GPU)


def logits_at_once(model: Any) -> int:
    """Logits held at once: 2^25 on the CPU, on a GPU up to 2^28 by the memory that weights leave (see `rows_at_once`)."""
    if model.device.type != "cuda":
        return _LOGITS_CPU
    return _power_of_2(_left_by_weights(model) * _LOGITS_SHARE / _LOGIT_BYTES, _LOGITS_GPU)


def _power_of_2(number: float, most: int) -> int:
    return min(most, 2 ** max(0, int(number).bit_length() - 1))


def _left_by_weights(model: Any) -> int:
    """Bytes of a GPU that all weights leave, an eighth of it at least: wherever they are, so that their places change no chunk."""
    total = torch.cuda.get_device_properties(model.device).total_memory
    return max(total // 8, total - sum(p.nbytes for p in model.hf.parameters()))

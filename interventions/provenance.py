"""What a reader must know about the model and the machine to reproduce a result."""

import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from interventions.models.causal_model import CausalModel
from interventions.models.fingerprint import described

_PACKAGES = ("mechdiag", "torch", "transformers", "transformer-lens", "nnsight", "numpy", "pandas", "pyarrow")


def model_identity(model: CausalModel) -> dict[str, Any]:
    """`model_provenance` with every byte of the weights read anew: what a run's work is kept under."""
    model.hash_weights()
    return model_provenance(model)


def model_provenance(model: CausalModel) -> dict[str, Any]:
    """What a reader must know of the model and the machine to make the numbers again."""
    return {
        "model": model.name,
        "model_note": model.note,
        "wrapper": model.wrapper,
        "weights_sha256": model.weights_hash,
        "weights_covered": model.weights_covered,
        **described(model.hf),
        "norm": model.norm_kind,
        "n_layers": model.n_layers,
        "d_model": model.d_model,
        "vocab": model.vocab_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": "remote" if model.remote else model.device.type,
        "processor": "remote" if model.remote else processor(model.device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions(),
    }


def versions() -> dict[str, str | None]:
    """Of the packages that results depend on; None where one is not installed."""
    found: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


@cache
def processor(device: torch.device) -> str:
    """What computes: the GPU's name, or the CPU's with the instructions that torch uses. Kinds differ in the last bits of results."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"

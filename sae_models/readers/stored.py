"""A file opened, before anyone decides what it is. Opening runs nothing that a file may carry."""

import json
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sae_models.errors import CheckpointError

WEIGHTS = ("sae_weights.safetensors", "sae.safetensors", "ae.pt", "params.npz")
"""File names by which a folder is known to hold an SAE."""
CONFIGS = ("cfg.json", "config.json")


@dataclass(frozen=True)
class Stored:
    """What lies in a file of weights and in the configuration beside it."""

    path: Path
    """of the weights; for a live object, what it would be saved as"""
    config: Mapping[str, Any]
    """empty where there is none"""
    values: Mapping[str, Any]
    """tensors by key, and the few other plain values that a `.pt` may hold"""


def opened(path: Path) -> Stored:
    """Open a file of weights, or a folder that holds one. Raises `CheckpointError` where there is none, or more than one."""
    weights = weights_in(path) if path.is_dir() else path
    return Stored(weights, _config_beside(weights), _values(weights))


def weights_in(folder: Path) -> Path:
    """The file of weights in a folder: one of `WEIGHTS`, else the only one that can be read, else that of its only `trainer_N`."""
    named = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    found = named or sorted(file for file in folder.iterdir() if file.suffix in _OPEN and file.is_file())
    found = found or sorted(folder.glob("trainer_*/ae.pt"))
    if len(found) != 1:
        what = ", ".join(str(file.relative_to(folder)) for file in found) or "nothing that holds weights"
        raise CheckpointError(f"{folder} has {what}; expected one of {', '.join(WEIGHTS)}, or one file: name it")
    return found[0]


def _config_beside(weights: Path) -> Mapping[str, Any]:
    # dictionary_learning keeps intermediate checkpoints one folder below its configuration
    folders = [weights.parent, weights.parent.parent] if weights.parent.name == "checkpoints" else [weights.parent]
    for file in (folder / name for folder in folders for name in CONFIGS):
        if file.is_file():
            try:
                config = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise CheckpointError(f"{file} is not JSON ({error})") from error
            if not isinstance(config, dict):
                raise CheckpointError(f"{file} holds a {type(config).__name__}; expected an object of settings")
            return config
    return {}


def _values(file: Path) -> Mapping[str, Any]:
    if file.suffix not in _OPEN:
        raise CheckpointError(f"{file.name} cannot be read here; expected a file that ends in {', '.join(_OPEN)}")
    values = _OPEN[file.suffix](file)
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise CheckpointError(f"{file} holds a {type(values).__name__}; expected tensors by name")
    return values


def _torch(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} holds more than tensors and plain values, and was not read: unpickling it could run anything. "
            "Where you trust it, save its state_dict again"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} is no file of torch weights ({error})") from error


def _numpy(file: Path) -> Any:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    except (ValueError, TypeError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{file} is no archive of plain arrays ({error})") from error


def _safetensors(file: Path) -> Any:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is no file of safetensors ({error})") from error


_OPEN = {".safetensors": _safetensors, ".pt": _torch, ".pth": _torch, ".npz": _numpy}

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
from safetensors.torch import load_file

from sae_models.errors import CheckpointError

WEIGHTS = ("sae_weights.safetensors", "sae.safetensors", "params.safetensors", "ae.pt", "params.npz")
"""File names by which a folder is known to hold an SAE."""
CONFIGS = ("cfg.json", "config.json")
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""What torch.compile, DDP, FSDP and activation checkpointing put into the names of what they wrap."""
_LFS = b"version https://git-lfs.github.com/spec/"
_DEEPEST = 32
"""levels of a configuration; those of SAEs have four"""


@dataclass(frozen=True)
class Stored:
    """What lies in a file of weights and in the configuration beside it."""

    path: Path
    """of the weights; for a live object, what it would be saved as"""
    config: Mapping[str, Any]
    """empty where there is none"""
    values: Mapping[str, Any]
    """tensors by key, and the few other plain values that a `.pt` may hold"""
    config_path: Path | None = None
    """where the configuration was read"""

    @property
    def where(self) -> str:
        """The files, for errors."""
        return str(self.path) if self.config_path is None else f"{self.path} with {self.config_path.name}"


def opened(path: Path) -> Stored:
    """Open a file of weights, or a folder that holds one. Raises `CheckpointError` where there is none, or more than one."""
    try:
        weights = weights_in(path) if path.is_dir() else path
        config_path = _config_beside(weights)
        config = {} if config_path is None else _settings(config_path)
        return Stored(weights, config, unwrapped(_values(weights), weights), config_path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({_said(error)})") from error


def weights_in(folder: Path) -> Path:
    """The file of weights in a folder: one of `WEIGHTS`, else the only one that can be read, else that of its only `trainer_N`."""
    named = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    found = named or sorted(file for file in folder.iterdir() if file.suffix in _OPEN and file.is_file())
    found = found or sorted(folder.glob("trainer_*/ae.pt"))
    if len(found) != 1:
        what = ", ".join(str(file.relative_to(folder)) for file in found) or "nothing that holds weights"
        raise CheckpointError(f"{folder} has {what}; expected one of {', '.join(WEIGHTS)}, or one file: name it")
    return found[0]


def unwrapped(values: Mapping[str, Any], where: Any) -> dict[str, Any]:
    """The same under the names that they have without wrappers of torch: `_orig_mod.W_enc` is `W_enc`.

    Raises `CheckpointError` where two names become one.
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
        if name in found:
            raise CheckpointError(f"{where} holds {name!r} twice, once as {key!r}; expected each tensor once")
        found[name] = value
    return found


def _config_beside(weights: Path) -> Path | None:
    # dictionary_learning keeps intermediate checkpoints one folder below its configuration
    folders = [weights.parent, weights.parent.parent] if weights.parent.name == "checkpoints" else [weights.parent]
    return next((file for file in (folder / name for folder in folders for name in CONFIGS) if file.is_file()), None)


def _settings(file: Path) -> Mapping[str, Any]:
    _check_there(file)
    try:
        config = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON ({_said(error)})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} holds a {type(config).__name__}; expected an object of settings")
    level, depth = [config], 0
    while level:
        depth += 1
        level = [
            v for one in level for v in (one.values() if isinstance(one, dict) else one) if type(v) in (dict, list)
        ]
        if depth > _DEEPEST:
            raise CheckpointError(f"{file} is nested more than {_DEEPEST} levels deep; expected the settings of an SAE")
    return config


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is said twice")
    return found


def _check_there(file: Path) -> None:
    """Raise `CheckpointError` for a file without content, and for one that only says where its content is."""
    head = _head(file, len(_LFS))
    if not head:
        raise CheckpointError(f"{file} is empty (0 bytes); expected what was saved there: download or copy it again")
    if head == _LFS:
        raise CheckpointError(f"{file} is a pointer of git-lfs; expected the file itself: run `git lfs pull`")


def _head(file: Path, n: int) -> bytes:
    with file.open("rb") as opening:
        return opening.read(n)


def _values(file: Path) -> Mapping[str, Any]:
    if file.suffix not in _OPEN:
        raise CheckpointError(f"{file.name} cannot be read here; expected a file that ends in {', '.join(_OPEN)}")
    _check_there(file)
    values = _OPEN[file.suffix](file)
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise CheckpointError(f"{file} holds a {type(values).__name__}; expected tensors by name")
    return values


# A parser that meets a damaged file raises whatever it trips over: the three below take all of it for what it is.


def _torch(file: Path) -> Any:
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:  # torch itself does not look at the checksums
                damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"{damaged} does not have its checksum")
        elif _head(file, 1) != b"\x80":  # as every pickle begins that torch has written
            raise ValueError("neither an archive nor a pickle")
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} holds more than tensors and plain values, and was not read: unpickling it could run anything. "
            "Where you trust it, save its state_dict again"
        ) from error
    except Exception as error:
        raise CheckpointError(f"{file} is no file of torch weights, or damaged ({_said(error)})") from error


def _numpy(file: Path) -> Any:
    try:
        with file.open("rb") as opening, np.load(opening, allow_pickle=False) as arrays:
            if len(set(arrays.files)) < len(arrays.files):
                raise ValueError("two arrays of one name")
            return {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    except Exception as error:
        raise CheckpointError(f"{file} is no archive of plain arrays, or damaged ({_said(error)})") from error


def _safetensors(file: Path) -> Any:
    try:
        return load_file(file)
    except Exception as error:
        raise CheckpointError(f"{file} is no file of safetensors, or damaged ({_said(error)})") from error


def _said(error: BaseException) -> str:
    """The kind of a foreign error and the first line of what it says."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0][:200]}" if said else type(error).__name__


_OPEN = {".safetensors": _safetensors, ".pt": _torch, ".pth": _torch, ".npz": _numpy}

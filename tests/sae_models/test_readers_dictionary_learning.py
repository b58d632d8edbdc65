"""dictionary_learning's folders; that each class computes the library's equations is asserted in test_readers."""

import json

import pytest
import torch

from sae_models import BelongingError, CheckpointError, load_sae
from sae_models.selectors import BatchTopK, TopK
from tests.fuzz_saes import D_MODEL, D_SAE, LAYERS, K, X, alike, computed, formats, learned, loaded, read

CLASSES = {one.config["trainer"]["dict_class"]: one for one in formats() if one.name.startswith("dictionary_learning")}
COUNTED = CLASSES["BatchTopKSAE"].tensors
PLAIN = {key: value for key, value in CLASSES["AutoEncoder"].tensors.items() if value is not None}


def written(folder, tensors, dict_class=None, io="out", **trainer):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({key: value for key, value in tensors.items() if value is not None}, folder / "ae.pt")
    if dict_class is not None:
        said = {"dict_class": dict_class, "lm_name": "EleutherAI/pythia-70m", "layer": 3}
        said["submodule_name"] = "resid_post_layer_3"
        (folder / "config.json").write_text(json.dumps({"trainer": said | trainer, "buffer": {"io": io}}))
    return folder


def assert_computed(path, kind="BatchTopKSAE", **options):
    file = path if path.suffix else path / "ae.pt"
    expected = learned(read(file.parent, file.name), {"trainer": {"dict_class": kind, "k": K}}, X)
    assert alike(computed(loaded(path, options)), expected)


@pytest.mark.parametrize("kind", [name for name in CLASSES if name not in ("AutoEncoderTopK", "BatchTopKSAE")])
def test_class_is_recognised_by_its_keys_without_a_configuration(tmp_path, kind):
    assert_computed(written(tmp_path, CLASSES[kind].tensors), kind)


def test_topk_and_batchtopk_with_the_same_keys_need_dict_class(tmp_path):
    folder = written(tmp_path, COUNTED)
    with pytest.raises(CheckpointError, match="give dict_class="):
        load_sae(folder)
    assert isinstance(load_sae(folder, dict_class="BatchTopKSAE").selector, BatchTopK)
    assert isinstance(load_sae(folder, dict_class="AutoEncoderTopK", hook_name="blocks.0.hook_mlp_out").selector, TopK)


def test_k_of_early_files_is_in_the_configuration_or_an_option(tmp_path):
    tensors = {key: value for key, value in COUNTED.items() if key not in ("k", "threshold")}
    assert_computed(written(tmp_path / "a", tensors, "AutoEncoderTopK", k=K), "AutoEncoderTopK")
    folder = written(tmp_path / "b", tensors, "AutoEncoderTopK")
    with pytest.raises(CheckpointError, match="give k="):
        load_sae(folder)
    assert_computed(folder, "AutoEncoderTopK", k=K)
    with pytest.raises(CheckpointError, match=r"k = 4 was given, and the file says 3"):
        load_sae(tmp_path / "a", k=4)


def test_parent_folder_and_single_checkpoints_are_found(tmp_path):
    written(tmp_path / "trainer_0", COUNTED, "BatchTopKSAE")
    checkpoint = tmp_path / "trainer_0" / "checkpoints" / "ae_100.pt"
    checkpoint.parent.mkdir()
    torch.save(COUNTED, checkpoint)
    assert_computed(checkpoint)
    sae = load_sae(tmp_path)
    assert torch.equal(sae(torch.ones(1, D_MODEL)), load_sae(checkpoint)(torch.ones(1, D_MODEL)))
    assert (sae.model_name, sae.hook_name) == ("EleutherAI/pythia-70m", "blocks.3.hook_resid_post")
    written(tmp_path / "trainer_1", COUNTED, "BatchTopKSAE")
    with pytest.raises(CheckpointError, match=r"trainer_0/ae.pt, trainer_1/ae.pt; expected one"):
        load_sae(tmp_path)


WIDE = PLAIN | {"bias": torch.ones(D_MODEL + 1), "decoder.weight": torch.ones(D_MODEL + 1, D_SAE)}


@pytest.mark.parametrize(
    ("tensors", "kind", "io", "says"),
    [
        (COUNTED | {"threshold": torch.tensor(-1.0)}, "BatchTopKSAE", "out",
         r"threshold = -1\.0: this BatchTopKSAE was saved before it learned one"),
        (COUNTED, "CrossCoder", "out", "a CrossCoder of dictionary_learning"),
        (COUNTED | {"encoder.weight": torch.zeros(2, 3, 4)}, "BatchTopKSAE", "out", "a crosscoder"),
        (WIDE, "AutoEncoder", "out", "a transcoder: it reads width 6 and writes width 7"),
        (COUNTED, "BatchTopKSAE", "in_and_out", "a transcoder"),
        (PLAIN | {"extra": torch.zeros(2)}, "AutoEncoder", "out", "extra: not used by class AutoEncoder"),
        (LAYERS, "AutoEncoder", "out", r"no tensor 'bias' among decoder\.weight"),
    ],
)  # fmt: skip
def test_other_models_and_wrong_keys_are_refused(tmp_path, tensors, kind, io, says):
    with pytest.raises(CheckpointError, match=says):
        load_sae(written(tmp_path, tensors, kind, io))


def test_sites_inside_attention_heads_are_refused(tmp_path):
    with pytest.raises(BelongingError, match="inside attention heads"):
        load_sae(written(tmp_path, PLAIN), hook_name="blocks.2.attn.hook_z")

import json

import pytest
import torch

from sae_models import BelongingError, CheckpointError, load_sae
from sae_models.selectors import BatchTopK, TopK
from tests.sae_models.written import D_MODEL, D_SAE, K, assert_same, drawn, inputs, strongest


def linear(**others):
    """Encoder and decoder as `nn.Linear` keeps them: `[out, in]`."""
    return {"encoder.weight": drawn(D_SAE, D_MODEL), "decoder.weight": drawn(D_MODEL, D_SAE, seed=1)} | others


def plain(**others):
    return {"W_enc": drawn(D_MODEL, D_SAE), "W_dec": drawn(D_SAE, D_MODEL, seed=1)} | others


def vector(n, seed):
    return 0.3 * drawn(n, seed=seed)


B_ENC, B_DEC = {"encoder.bias": vector(D_SAE, 2)}, {"b_dec": vector(D_MODEL, 3)}
COUNTED = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(1.5)}


def written(folder, tensors, dict_class=None, **trainer):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / "ae.pt")
    if dict_class is not None:
        said = {
            "dict_class": dict_class,
            "lm_name": "EleutherAI/pythia-70m",
            "layer": 3,
            "submodule_name": "resid_post_layer_3",
        }
        (folder / "config.json").write_text(json.dumps({"trainer": said | trainer, "buffer": {"io": "out"}}))
    return folder


def auto_encoder(w, x):
    z = torch.relu((x - w["bias"]) @ w["encoder.weight"].T + w["encoder.bias"])
    return z, z @ w["decoder.weight"].T + w["bias"]


def auto_encoder_new(w, x):
    z = torch.relu(x @ w["encoder.weight"].T + w["encoder.bias"])
    return z, z @ w["decoder.weight"].T + w["decoder.bias"]


def top_k(w, x):
    z = strongest(torch.relu((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]), int(w["k"]))
    return z, z @ w["decoder.weight"].T + w["b_dec"]


def batch_top_k(w, x):
    s = torch.relu((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"])
    z = s * (s > w["threshold"])
    return z, z @ w["decoder.weight"].T + w["b_dec"]


def matryoshka(w, x):
    s = torch.relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    z = s * (s > w["threshold"])
    return z, z @ w["W_dec"] + w["b_dec"]


def jump_relu(w, x):
    s = x @ w["W_enc"] + w["b_enc"]
    z = torch.relu(s * (s > w["threshold"]))
    return z, z @ w["W_dec"] + w["b_dec"]


def gated(w, x):
    p = (x - w["decoder_bias"]) @ w["encoder.weight"].T
    z = (p + w["gate_bias"] > 0) * torch.relu(w["r_mag"].exp() * p + w["mag_bias"])
    return z, z @ w["decoder.weight"].T + w["decoder_bias"]


KINDS = {
    "AutoEncoder": (auto_encoder, linear(**B_ENC, bias=vector(D_MODEL, 3))),
    "AutoEncoderNew": (auto_encoder_new, linear(**B_ENC, **{"decoder.bias": vector(D_MODEL, 3)})),
    "AutoEncoderTopK": (top_k, linear(**B_ENC, **B_DEC, **COUNTED)),
    "BatchTopKSAE": (batch_top_k, linear(**B_ENC, **B_DEC, **COUNTED)),
    "MatryoshkaBatchTopKSAE": (
        matryoshka,
        plain(b_enc=vector(D_SAE, 2), **B_DEC, **COUNTED, group_sizes=torch.tensor([10, 30])),
    ),
    "JumpReluAutoEncoder": (jump_relu, plain(b_enc=vector(D_SAE, 2), **B_DEC, threshold=vector(D_SAE, 4))),
    "GatedAutoEncoder": (
        gated,
        linear(
            decoder_bias=vector(D_MODEL, 3),
            r_mag=vector(D_SAE, 4),
            gate_bias=vector(D_SAE, 5),
            mag_bias=vector(D_SAE, 6),
        ),
    ),
}


@pytest.mark.parametrize("dict_class", KINDS)
def test_each_class_computes_what_the_library_computes(tmp_path, dict_class):
    forward, weights = KINDS[dict_class]
    sae = load_sae(written(tmp_path, weights, dict_class))
    z, expected = forward(weights, inputs())
    assert_same(sae.encode(inputs()), z)
    assert_same(sae(inputs()), expected)
    assert (sae.model_name, sae.hook_name) == ("EleutherAI/pythia-70m", "blocks.3.hook_resid_post")


@pytest.mark.parametrize("dict_class", [name for name in KINDS if name not in ("AutoEncoderTopK", "BatchTopKSAE")])
def test_without_its_configuration_a_class_is_known_by_its_keys(tmp_path, dict_class):
    forward, weights = KINDS[dict_class]
    assert_same(load_sae(written(tmp_path, weights))(inputs()), forward(weights, inputs())[1])


def test_topk_and_batchtopk_have_the_same_keys(tmp_path):
    weights = KINDS["BatchTopKSAE"][1]
    folder = written(tmp_path, weights)
    with pytest.raises(CheckpointError, match="give dict_class="):
        load_sae(folder)
    assert isinstance(load_sae(folder, dict_class="BatchTopKSAE").selector, BatchTopK)
    assert isinstance(load_sae(folder, dict_class="AutoEncoderTopK", hook_name="blocks.0.hook_mlp_out").selector, TopK)


def test_k_from_the_configuration_or_given_where_early_files_lack_it(tmp_path):
    weights = {key: value for key, value in KINDS["AutoEncoderTopK"][1].items() if key not in ("k", "threshold")}
    expected = top_k(weights | {"k": K}, inputs())[1]
    assert_same(load_sae(written(tmp_path / "a", weights, "AutoEncoderTopK", k=K))(inputs()), expected)
    folder = written(tmp_path / "b", weights, "AutoEncoderTopK")
    with pytest.raises(CheckpointError, match="give k="):
        load_sae(folder)
    assert_same(load_sae(folder, k=K)(inputs()), expected)
    with pytest.raises(CheckpointError, match=r"k = 6 was given, and the file says 5"):
        load_sae(tmp_path / "a", k=6)


def test_the_folder_above_and_the_checkpoints_below(tmp_path):
    forward, weights = KINDS["BatchTopKSAE"]
    written(tmp_path / "trainer_0", weights, "BatchTopKSAE")
    (tmp_path / "trainer_0" / "checkpoints").mkdir()
    torch.save(weights, tmp_path / "trainer_0" / "checkpoints" / "ae_100.pt")
    for where in (tmp_path, tmp_path / "trainer_0" / "checkpoints" / "ae_100.pt"):
        assert_same(load_sae(where)(inputs()), forward(weights, inputs())[1])
    written(tmp_path / "trainer_1", weights, "BatchTopKSAE")
    with pytest.raises(CheckpointError, match=r"trainer_0/ae.pt, trainer_1/ae.pt; expected one"):
        load_sae(tmp_path)


def test_what_is_refused(tmp_path):
    weights = KINDS["BatchTopKSAE"][1]
    early = weights | {"threshold": torch.tensor(-1.0)}
    with pytest.raises(CheckpointError, match=r"threshold = -1\.0: this BatchTopKSAE was saved before it learned one"):
        load_sae(written(tmp_path / "early", early, "BatchTopKSAE"))
    with pytest.raises(CheckpointError, match="a CrossCoder of dictionary_learning"):
        load_sae(written(tmp_path / "cross", weights, "CrossCoder"))
    with pytest.raises(CheckpointError, match="a crosscoder"):
        load_sae(written(tmp_path / "three", weights | {"encoder.weight": torch.zeros(2, 3, 4)}, "BatchTopKSAE"))
    wide = linear(**B_ENC, bias=vector(D_MODEL + 1, 3)) | {"decoder.weight": drawn(D_MODEL + 1, D_SAE)}
    with pytest.raises(CheckpointError, match="a transcoder: it reads width 12 and writes width 13"):
        load_sae(written(tmp_path / "wide", wide, "AutoEncoder"))
    folder = written(tmp_path / "both", weights, "BatchTopKSAE")
    (folder / "config.json").write_text(
        json.dumps({"trainer": {"dict_class": "BatchTopKSAE"}, "buffer": {"io": "in_and_out"}})
    )
    with pytest.raises(CheckpointError, match="a transcoder"):
        load_sae(folder)
    with pytest.raises(BelongingError, match="inside attention heads"):
        load_sae(written(tmp_path / "z", KINDS["AutoEncoder"][1]), hook_name="blocks.2.attn.hook_z")


def test_keys_are_checked(tmp_path):
    weights = KINDS["AutoEncoder"][1]
    with pytest.raises(CheckpointError, match="extra: not used by class AutoEncoder"):
        load_sae(written(tmp_path / "a", weights | {"extra": torch.zeros(2)}, "AutoEncoder"))
    with pytest.raises(CheckpointError, match=r"no tensor 'bias' among decoder\.weight"):
        load_sae(
            written(tmp_path / "b", {key: value for key, value in weights.items() if key != "bias"}, "AutoEncoder")
        )

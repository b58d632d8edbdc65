import pytest
import torch

from sae_models import CheckpointError, load_sae
from tests.sae_models.written import D_MODEL, D_SAE, K, assert_same, drawn, inputs, strongest

WEIGHTS = {"pre_bias": drawn(D_MODEL, seed=3), "latent_bias": 0.3 * drawn(D_SAE, seed=2)}
WEIGHTS |= {"encoder.weight": drawn(D_SAE, D_MODEL), "decoder.weight": drawn(D_MODEL, D_SAE, seed=1)}
STATISTICS = {
    "stats_last_nonzero": torch.zeros(D_SAE, dtype=torch.long),
    "latents_activation_frequency": torch.ones(D_SAE),
}
STATISTICS |= {"latents_mean_square": torch.zeros(D_SAE)}
TOPK = {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}}


def written(folder, *parts):
    torch.save({key: value for part in parts for key, value in part.items()}, folder / "sae.pt")
    return folder / "sae.pt"


def original(x, k=None, decoder=None):
    """Latents, and the reconstruction; with k: TopK of layer-normalised inputs."""
    decoder = WEIGHTS["decoder.weight"] if decoder is None else decoder
    if k is None:
        z = torch.relu((x - WEIGHTS["pre_bias"]) @ WEIGHTS["encoder.weight"].T + WEIGHTS["latent_bias"])
        return z, z @ decoder.T + WEIGHTS["pre_bias"]
    centred = x - x.mean(-1, keepdim=True)
    std = centred.std(-1, keepdim=True)
    s = (centred / (std + 1e-5) - WEIGHTS["pre_bias"]) @ WEIGHTS["encoder.weight"].T + WEIGHTS["latent_bias"]
    z = torch.relu(strongest(s, k))
    return z, (z @ decoder.T + WEIGHTS["pre_bias"]) * std + x.mean(-1, keepdim=True)


def test_topk_of_layer_normalised_inputs(tmp_path):
    sae = load_sae(written(tmp_path, WEIGHTS, STATISTICS, TOPK), hook_name="blocks.8.hook_resid_post")
    z, expected = original(inputs(), K)
    assert_same(sae(inputs()), expected)
    assert torch.equal(sae.encode(inputs()) > 0, z > 0)
    assert sae.hook_name == "blocks.8.hook_resid_post"


def test_relu_of_plain_inputs(tmp_path):
    sae = load_sae(written(tmp_path, WEIGHTS, {"activation": "ReLU", "activation_state_dict": {}}))
    z, expected = original(inputs())
    assert_same(sae.encode(inputs()), z)
    assert_same(sae(inputs()), expected)


def test_a_tied_decoder(tmp_path):
    tied = {key: value for key, value in WEIGHTS.items() if key != "decoder.weight"}
    tied["decoder.linear.weight"] = WEIGHTS["encoder.weight"]
    sae = load_sae(written(tmp_path, tied, TOPK))
    assert_same(sae(inputs()), original(inputs(), K, WEIGHTS["encoder.weight"].T)[1])


def test_a_bare_checkpoint_says_no_activation(tmp_path):
    path = written(tmp_path, WEIGHTS)
    with pytest.raises(
        CheckpointError, match=r"does not say its activation, TopK \(then k=\) or ReLU; give activation="
    ):
        load_sae(path)
    assert_same(load_sae(path, k=K)(inputs()), original(inputs(), K)[1])
    assert_same(load_sae(path, activation="ReLU")(inputs()), original(inputs())[1])
    with pytest.raises(CheckpointError, match="does not say its k; give k="):
        load_sae(path, activation="TopK")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"activation": "Identity"}, "activation 'Identity'; expected TopK or ReLU"),
        (TOPK | {"activation_state_dict": {"k": K, "postact_fn": "Identity"}}, "TopK followed by Identity"),
        (TOPK | {"activation_state_dict": {"k": K, "multi": 4}}, "multi: settings of the activation"),
        (TOPK | {"more": torch.zeros(2)}, "more: not used by this SAE"),
        (TOPK | {"latent_bias": torch.zeros(2)}, r"latent_bias has shape \(2,\); expected \(40,\)"),
    ],
)
def test_what_is_refused(tmp_path, changes, says):
    with pytest.raises(CheckpointError, match=says):
        load_sae(written(tmp_path, WEIGHTS, changes))

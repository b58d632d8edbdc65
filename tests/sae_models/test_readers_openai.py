"""OpenAI's checkpoints; their equations are asserted in test_readers."""

import pytest
import torch

from sae_models import CheckpointError, load_sae
from tests.fuzz_saes import D_SAE, FORMATS, K, X, alike, computed, loaded, openai, read

TOPK = FORMATS["openai"].tensors
BARE = {key: value for key, value in TOPK.items() if key.endswith(("weight", "bias"))}
SAID = {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}}
RELU = {"activation": "ReLU"}


def written(folder, weights):
    torch.save(weights, folder / "sae.pt")
    return folder / "sae.pt"


def assert_computed(path, said, **options):
    weights = read(path.parent, path.name)
    assert alike(
        computed(loaded(path, options)), openai({"decoder.weight": weights["encoder.weight"].T} | weights | said, {}, X)
    )


def test_tied_decoder(tmp_path):
    tied = {key: value for key, value in TOPK.items() if key != "decoder.weight"}
    assert_computed(written(tmp_path, tied | {"decoder.linear.weight": TOPK["encoder.weight"]}), SAID)


def test_bare_checkpoint_needs_its_activation(tmp_path):
    path = written(tmp_path, BARE)
    with pytest.raises(
        CheckpointError, match=r"does not say its activation, TopK \(then k=\) or ReLU; give activation="
    ):
        load_sae(path)
    assert_computed(path, SAID, k=K)
    assert_computed(path, RELU, activation="ReLU")
    with pytest.raises(CheckpointError, match="does not say its k; give k="):
        load_sae(path, activation="TopK")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"activation": "Identity"}, "activation 'Identity'; expected TopK or ReLU"),
        ({"activation_state_dict": {"k": K, "postact_fn": "Identity"}}, "TopK followed by Identity"),
        ({"activation_state_dict": {"k": K, "multi": 4}}, "multi: settings of the activation"),
        ({"more": torch.zeros(2)}, "more: not used by this SAE"),
        ({"latent_bias": torch.zeros(2)}, rf"latent_bias has shape \(2,\); expected \({D_SAE},\)"),
    ],
)
def test_other_activations_and_wrong_keys_are_refused(tmp_path, changes, says):
    with pytest.raises(CheckpointError, match=says):
        load_sae(written(tmp_path, TOPK | changes))

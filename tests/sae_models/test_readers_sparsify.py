import json

import pytest
import torch
from safetensors.torch import save_file

from sae_models import CheckpointError, load_sae
from tests.sae_models.written import D_MODEL, D_SAE, K, assert_same, drawn, inputs, strongest

SETTINGS = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": D_SAE, "k": K}
SETTINGS |= {"multi_topk": True, "skip_connection": False, "transcode": False, "d_in": D_MODEL}
WEIGHTS = {"encoder.weight": drawn(D_SAE, D_MODEL), "encoder.bias": 0.3 * drawn(D_SAE, seed=1)}
WEIGHTS |= {"W_dec": drawn(D_SAE, D_MODEL, seed=2), "b_dec": drawn(D_MODEL, seed=3)}


def written(folder, settings=SETTINGS, weights=WEIGHTS):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(settings))
    save_file(weights, folder / "sae.safetensors")
    return folder


def test_it_computes_what_the_library_computes(tmp_path):
    sae = load_sae(written(tmp_path / "layers.7"))
    s = torch.relu((inputs() - WEIGHTS["b_dec"]) @ WEIGHTS["encoder.weight"].T + WEIGHTS["encoder.bias"])
    assert_same(sae.encode(inputs()), strongest(s))
    assert_same(sae(inputs()), strongest(s) @ WEIGHTS["W_dec"] + WEIGHTS["b_dec"])
    assert (sae.model_name, sae.hook_name) == (None, "blocks.7.hook_resid_post")


def test_other_hookpoints_are_given(tmp_path):
    folder = written(tmp_path / "layers.7.mlp")
    assert load_sae(folder).hook_name is None
    sae = load_sae(folder, hook_name="blocks.7.hook_mlp_out", model_name="pythia-160m")
    assert (sae.model_name, sae.hook_name) == ("pythia-160m", "blocks.7.hook_mlp_out")
    with pytest.raises(CheckpointError, match=r"the file says 'blocks.1.hook_resid_post'"):
        load_sae(written(tmp_path / "h.1"), hook_name="blocks.2.hook_resid_post")


def test_early_settings(tmp_path):
    """Of the package as it was called sae: no activation, no kind, the number of latents not said."""
    early = {
        "expansion_factor": 32,
        "normalize_decoder": True,
        "num_latents": 0,
        "k": K,
        "signed": False,
        "d_in": D_MODEL,
    }
    assert torch.equal(load_sae(written(tmp_path / "a", early))(inputs()), load_sae(written(tmp_path / "b"))(inputs()))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"transcode": True}, "a transcoder"),
        ({"skip_connection": True}, "a transcoder"),
        ({"signed": True}, "latents of either sign"),
        ({"activation": "groupmax"}, "activation 'groupmax'; expected topk"),
        ({"k": None}, "does not say its k; give k="),
        ({"num_latents": 41}, r"expected \(41, 12\) from cfg.json"),
    ],
)
def test_what_is_refused(tmp_path, changes, says):
    with pytest.raises(CheckpointError, match=says):
        load_sae(written(tmp_path, SETTINGS | changes))


def test_keys_are_checked(tmp_path):
    with pytest.raises(CheckpointError, match="a transcoder"):
        load_sae(written(tmp_path, weights=WEIGHTS | {"W_skip": torch.zeros(D_MODEL, D_MODEL)}))
    with pytest.raises(CheckpointError, match="more: not used by a TopK SAE"):
        load_sae(written(tmp_path, weights=WEIGHTS | {"more": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match="no tensor 'W_dec'"):
        load_sae(written(tmp_path, weights={key: value for key, value in WEIGHTS.items() if key != "W_dec"}))

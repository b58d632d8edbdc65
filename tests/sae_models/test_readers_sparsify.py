"""sparsify's folders; the equation is asserted in test_readers."""

import json

import pytest
import torch
from safetensors.torch import save_file

from sae_models import CheckpointError, load_sae
from tests.fuzz_saes import D_MODEL, D_SAE, FORMATS, K

SETTINGS = FORMATS["sparsify"].config
WEIGHTS = {key: value for key, value in FORMATS["sparsify"].tensors.items() if value is not None}
INPUTS = torch.linspace(-2, 2, 4 * D_MODEL).reshape(4, D_MODEL)


def written(folder, settings=SETTINGS, weights=WEIGHTS):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(dict(settings)))
    save_file(weights, folder / "sae.safetensors")
    return folder


def test_site_is_read_from_the_folder_or_given(tmp_path):
    sae = load_sae(written(tmp_path / "layers.7"))
    assert (sae.model_name, sae.hook_name) == (None, "blocks.7.hook_resid_post")
    folder = written(tmp_path / "layers.7.mlp")
    assert load_sae(folder).hook_name is None
    sae = load_sae(folder, hook_name="blocks.7.hook_mlp_out", model_name="pythia-160m")
    assert (sae.model_name, sae.hook_name) == ("pythia-160m", "blocks.7.hook_mlp_out")
    with pytest.raises(CheckpointError, match=r"the file says 'blocks.1.hook_resid_post'"):
        load_sae(written(tmp_path / "h.1"), hook_name="blocks.2.hook_resid_post")


def test_settings_of_the_early_package_sae_are_read(tmp_path):
    """They have no activation, no kind, and 0 for the number of latents."""
    early = {"expansion_factor": 32, "normalize_decoder": True, "num_latents": 0, "k": K, "signed": False}
    early["d_in"] = D_MODEL
    assert torch.equal(load_sae(written(tmp_path / "a", early))(INPUTS), load_sae(written(tmp_path / "b"))(INPUTS))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"transcode": True}, "a transcoder"),
        ({"skip_connection": True}, "a transcoder"),
        ({"signed": True}, "latents of either sign"),
        ({"activation": "groupmax"}, "activation 'groupmax'; expected topk"),
        ({"k": None}, "does not say its k; give k="),
        ({"num_latents": D_SAE + 1}, r"expected \(11, 6\) from cfg.json"),
    ],
)
def test_other_settings_are_refused(tmp_path, changes, says):
    with pytest.raises(CheckpointError, match=says):
        load_sae(written(tmp_path, {**SETTINGS, **changes}))


def test_wrong_keys_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="a transcoder"):
        load_sae(written(tmp_path, weights=WEIGHTS | {"W_skip": torch.zeros(D_MODEL, D_MODEL)}))
    with pytest.raises(CheckpointError, match="more: not used by a TopK SAE"):
        load_sae(written(tmp_path, weights=WEIGHTS | {"more": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match="no tensor 'W_dec'"):
        load_sae(written(tmp_path, weights={key: value for key, value in WEIGHTS.items() if key != "W_dec"}))

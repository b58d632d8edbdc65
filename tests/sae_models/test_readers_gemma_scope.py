import numpy as np
import pytest
import torch

from sae_models import CheckpointError, load_sae
from tests.sae_models.written import D_MODEL, D_SAE, assert_same, drawn, inputs

WEIGHTS = {"W_enc": drawn(D_MODEL, D_SAE), "W_dec": drawn(D_SAE, D_MODEL, seed=1), "b_enc": 0.3 * drawn(D_SAE, seed=2)}
WEIGHTS |= {"b_dec": drawn(D_MODEL, seed=3), "threshold": drawn(D_SAE, seed=4).abs()}


def written(folder, weights=WEIGHTS):
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "params.npz", **{key: np.asarray(value) for key, value in weights.items()})
    return folder


def test_it_computes_what_is_published(tmp_path):
    sae = load_sae(written(tmp_path), model_name="gemma-2-2b", hook_name="blocks.20.hook_resid_post")
    s = inputs() @ WEIGHTS["W_enc"] + WEIGHTS["b_enc"]  # b_dec is not subtracted
    z = (s > WEIGHTS["threshold"]) * torch.relu(s)
    assert 0 < (z > 0).float().mean() < 0.6
    assert_same(sae.encode(inputs()), z)
    assert_same(sae(inputs()), z @ WEIGHTS["W_dec"] + WEIGHTS["b_dec"])
    assert (sae.model_name, sae.hook_name) == ("gemma-2-2b", "blocks.20.hook_resid_post")
    assert torch.equal(load_sae(tmp_path / "params.npz")(inputs()), sae(inputs()))


@pytest.mark.parametrize(
    ("path", "belongs"),
    [
        ("models--google--gemma-scope-2b-pt-res/snapshots/0/layer_20", ("gemma-2-2b", "blocks.20.hook_resid_post")),
        ("gemma-scope-9b-it-res/layer_9", ("gemma-2-9b-it", "blocks.9.hook_resid_post")),
        ("gemma-scope-9b-pt-mlp/layer_0", ("gemma-2-9b", "blocks.0.hook_mlp_out")),
    ],
)
def test_where_it_belongs_stands_in_the_path(tmp_path, path, belongs):
    sae = load_sae(written(tmp_path / path / "width_16k" / "average_l0_71"))
    assert (sae.model_name, sae.hook_name) == belongs


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("gemma-scope-2b-pt-transcoders/layer_5/width_16k", "is of kind 'transcoders'"),
        ("gemma-scope-2b-pt-att/layer_5/width_16k", "is of kind 'att'"),
        ("gemma-scope-2b-pt-res/embedding/width_4k", "an SAE of embeddings before they are scaled"),
    ],
)
def test_others_of_the_family_are_refused(tmp_path, path, says):
    with pytest.raises(CheckpointError, match=says):
        load_sae(written(tmp_path / path))


def test_keys_are_checked(tmp_path):
    with pytest.raises(CheckpointError, match="no tensor 'threshold'"):
        load_sae(written(tmp_path, {key: value for key, value in WEIGHTS.items() if key != "threshold"}))
    with pytest.raises(CheckpointError, match="affine: not used by a Gemma Scope SAE"):
        load_sae(written(tmp_path, WEIGHTS | {"affine": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=r"threshold has shape \(2,\); expected \(40,\), or one number for all"):
        load_sae(written(tmp_path, WEIGHTS | {"threshold": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match="b_dec holds values that are not numbers"):
        load_sae(written(tmp_path, WEIGHTS | {"b_dec": torch.full((D_MODEL,), torch.nan)}))

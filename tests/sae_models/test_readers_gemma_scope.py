import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sae_models import BelongingError, CheckpointError, load_sae
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


# ---- Gemma Scope 2 ----

SECOND = {key.lower() if key.startswith("W") else key: value for key, value in WEIGHTS.items()}
POINT = "model.layers.13.output"
CONFIG = {"model_name": "google/gemma-3-1b-pt", "architecture": "jump_relu", "width": D_SAE, "l0": 5, "type": "sae"}
CONFIG |= {"hf_hook_point_in": POINT, "hf_hook_point_out": POINT, "affine_connection": False}


def second(folder, weights=SECOND, config=CONFIG):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / "params.safetensors")
    save_file({"tokens": torch.zeros(3)}, folder / "examples.safetensors")  # which lie beside it
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_second_computes_the_same(tmp_path):
    sae, first = load_sae(second(tmp_path / "second")), load_sae(written(tmp_path / "first"))
    assert torch.equal(sae.encode(inputs()), first.encode(inputs())) and torch.equal(sae(inputs()), first(inputs()))
    assert (sae.model_name, sae.hook_name) == ("google/gemma-3-1b-pt", "blocks.13.hook_resid_post")
    mlp = CONFIG | dict.fromkeys(
        ("hf_hook_point_in", "hf_hook_point_out"), "model.layers.2.post_feedforward_layernorm.output"
    )
    assert load_sae(second(tmp_path / "mlp", config=mlp)).hook_name == "blocks.2.hook_mlp_out"
    for said, hub in (("gemma-v3-4b-it", "gemma-3-4b-it"), ("google/gemma-v3-270m-pt", "google/gemma-3-270m")):
        assert load_sae(second(tmp_path / hub, config=CONFIG | {"model_name": said})).model_name == hub


@pytest.mark.parametrize(
    ("path", "belongs"),
    [
        ("gemma-scope-2-1b-pt/resid_post/layer_13_width_16k_l0_medium", ("gemma-3-1b-pt", "blocks.13.hook_resid_post")),
        (
            "models--google--gemma-scope-2-270m-it/snapshots/0/mlp_out_all/layer_3_width_16k_l0_big",
            ("gemma-3-270m-it", "blocks.3.hook_mlp_out"),
        ),
    ],
)
def test_where_the_second_belongs_stands_in_the_path_too(tmp_path, path, belongs):
    sae = load_sae(second(tmp_path / path, config=None))
    assert (sae.model_name, sae.hook_name) == belongs


@pytest.mark.parametrize(
    ("path", "changes", "error", "says"),
    [
        ("", {"type": "transcoder"}, CheckpointError, "a 'transcoder' of architecture 'jump_relu'"),
        ("", {"architecture": "topk"}, CheckpointError, "a 'sae' of architecture 'topk'"),
        ("", {"hf_hook_point_out": "model.layers.13.mlp.output"}, CheckpointError, "a transcoder from model"),
        ("", {"affine_connection": True}, CheckpointError, "a transcoder"),
        ("", dict.fromkeys(("hf_hook_point_in", "hf_hook_point_out"), "model.layers.5.self_attn.o_proj.input"), BelongingError, "inside attention heads"),
        ("", dict.fromkeys(("hf_hook_point_in", "hf_hook_point_out"), "model.embed_tokens.output"), CheckpointError, "an SAE of model.embed_tokens"),
        ("", {"width": D_SAE + 1}, CheckpointError, "w_dec has 40 latents, and config.json says width 41"),
        ("gemma-scope-2-4b-it/transcoder_all/layer_5_width_16k_l0_big", None, CheckpointError, "of kind 'transcoder'"),
        ("gemma-scope-2-12b-pt/attn_out/layer_11_width_16k_l0_small", None, BelongingError, "of kind 'attn_out', inside"),
        ("gemma-scope-2-270m-pt/clt/layer_3_width_16k_l0_medium", None, CheckpointError, "of kind 'clt'"),
    ],
)  # fmt: skip
def test_others_of_the_second_family_are_refused(tmp_path, path, changes, error, says):
    with pytest.raises(error, match=says):
        load_sae(second(tmp_path / path, config=None if changes is None else CONFIG | changes))


def test_a_second_one_with_an_affine_connection_or_of_several_layers_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"a transcoder \(affine_skip_connection\)"):
        load_sae(second(tmp_path / "affine", SECOND | {"affine_skip_connection": torch.zeros(D_MODEL, D_MODEL)}))
    with pytest.raises(CheckpointError, match="a crosscoder"):
        load_sae(second(tmp_path / "cross", SECOND | {"w_enc": torch.zeros(4, D_MODEL, D_SAE)}))

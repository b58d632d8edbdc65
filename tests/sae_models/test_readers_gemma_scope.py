import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sae_models import BelongingError, CheckpointError, load_sae
from tests.sae_models.written import D_MODEL, D_SAE, drawn

WEIGHTS = {"W_enc": drawn(D_MODEL, D_SAE), "W_dec": drawn(D_SAE, D_MODEL, seed=1), "b_enc": 0.3 * drawn(D_SAE, seed=2)}
WEIGHTS |= {"b_dec": drawn(D_MODEL, seed=3), "threshold": drawn(D_SAE, seed=4).abs()}


def written(folder, weights=WEIGHTS):
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "params.npz", **{key: np.asarray(value) for key, value in weights.items()})
    return folder


@pytest.mark.parametrize(
    ("path", "belongs"),
    [
        ("models--google--gemma-scope-2b-pt-res/snapshots/0/layer_20", ("gemma-2-2b", "blocks.20.hook_resid_post")),
        ("gemma-scope-9b-it-res/layer_9", ("gemma-2-9b-it", "blocks.9.hook_resid_post")),
        ("gemma-scope-9b-pt-mlp/layer_0", ("gemma-2-9b", "blocks.0.hook_mlp_out")),
    ],
)
def test_model_and_site_are_read_from_the_path_or_given(tmp_path, path, belongs):
    sae = load_sae(written(tmp_path / path / "width_16k" / "average_l0_71"))
    assert (sae.model_name, sae.hook_name) == belongs
    sae = load_sae(written(tmp_path / "x"), model_name="gemma-2-2b", hook_name="blocks.20.hook_resid_post")
    assert (sae.model_name, sae.hook_name) == ("gemma-2-2b", "blocks.20.hook_resid_post")


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("gemma-scope-2b-pt-transcoders/layer_5/width_16k", "is of kind 'transcoders'"),
        ("gemma-scope-2b-pt-att/layer_5/width_16k", "is of kind 'att'"),
        ("gemma-scope-2b-pt-res/embedding/width_4k", "an SAE of embeddings before they are scaled"),
    ],
)
def test_other_kinds_of_gemma_scope_are_refused(tmp_path, path, says):
    with pytest.raises(CheckpointError, match=says):
        load_sae(written(tmp_path / path))


def test_wrong_keys_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no tensor 'threshold'"):
        load_sae(written(tmp_path, {key: value for key, value in WEIGHTS.items() if key != "threshold"}))
    with pytest.raises(CheckpointError, match="affine: not used by a Gemma Scope SAE"):
        load_sae(written(tmp_path, WEIGHTS | {"affine": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=r"threshold has shape \(2,\); expected \(40,\), or one number for all"):
        load_sae(written(tmp_path, WEIGHTS | {"threshold": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=r"a transcoder \(affine_skip_connection\)"):
        load_sae(second(tmp_path / "affine", SECOND | {"affine_skip_connection": torch.zeros(D_MODEL, D_MODEL)}))
    with pytest.raises(CheckpointError, match="a crosscoder"):
        load_sae(second(tmp_path / "cross", SECOND | {"w_enc": torch.zeros(4, D_MODEL, D_SAE)}))


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


def test_gemma_scope_2_configuration_gives_model_and_site(tmp_path):
    sae = load_sae(second(tmp_path / "second"))
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
def test_gemma_scope_2_model_and_site_are_read_from_the_path(tmp_path, path, belongs):
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
def test_other_kinds_of_gemma_scope_2_are_refused(tmp_path, path, changes, error, says):
    with pytest.raises(error, match=says):
        load_sae(second(tmp_path / path, config=None if changes is None else CONFIG | changes))

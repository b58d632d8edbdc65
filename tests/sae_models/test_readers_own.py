import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_models import CheckpointError, load_sae, save_sae
from sae_models.architectures import NAMES, Architecture, build, named
from sae_models.selectors import BatchTopK
from tests.sae_models.written import D_MODEL, D_SAE, K, drawn, inputs

NAMED = [name.replace("<G>", "3") for name in NAMES]


def fresh(architecture):
    sae = build(architecture, D_SAE, K, drawn(64, D_MODEL) + 1, torch.Generator().manual_seed(0), model_name="tiny")
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        if isinstance(sae.selector, BatchTopK):
            sae.selector.threshold.fill_(0.7)
    return sae


@pytest.mark.parametrize(
    ("name", "selector"), list(zip(NAMED, itertools.cycle(["relu", "topk", "batchtopk"]), strict=False))
)
def test_what_save_sae_wrote(tmp_path, name, selector):
    sae = fresh(named(f"{name}:{selector}"))
    again = load_sae(save_sae(sae, tmp_path))
    assert torch.equal(again(inputs()), sae(inputs())) and again.model_name == "tiny"
    assert again.selector.settings() == sae.selector.settings()


def test_layer_normalised_inputs_and_another_precision(tmp_path):
    sae = fresh(Architecture(normalise="layer_norm", selector="topk"))
    save_sae(sae, tmp_path, dtype=torch.bfloat16)
    again = load_sae(tmp_path)
    assert again.dtype == torch.float32 and torch.equal(again.W_dec, sae.W_dec.bfloat16().float())
    assert load_sae(tmp_path, dtype=torch.float64).encode(inputs()).dtype == torch.float64


def test_an_incomplete_folder_is_refused(tmp_path):
    save_sae(fresh(named("cosine")), tmp_path)
    weights = tmp_path / "sae_weights.safetensors"
    tensors = load_file(weights)
    save_file({key: value for key, value in tensors.items() if key != "scale_a_delta"}, weights)
    with pytest.raises(CheckpointError, match="no tensor 'scale_a_delta'"):
        load_sae(tmp_path)
    save_file(tensors | {"more": torch.zeros(1)}, weights)
    with pytest.raises(CheckpointError, match="more"):
        load_sae(tmp_path)
    save_file(tensors, weights)
    config = json.loads((tmp_path / "cfg.json").read_text())
    del config["metadata"]["mechdiag"]["selector"]
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"cfg\.json: the configuration has no 'selector'"):
        load_sae(tmp_path)


def test_where_it_belongs_can_be_added_and_not_contradicted(tmp_path):
    save_sae(fresh(named("standard")), tmp_path)
    assert load_sae(tmp_path, hook_name="blocks.2.hook_resid_post").hook_name == "blocks.2.hook_resid_post"
    with pytest.raises(CheckpointError, match="model_name = 'large' was given, and the file says 'tiny'"):
        load_sae(tmp_path, model_name="large")


def test_thresholds_that_differ_are_not_ours(tmp_path):
    save_sae(fresh(named("standard")), tmp_path)
    weights = tmp_path / "sae_weights.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"threshold": torch.linspace(0, 1, D_SAE)}, weights)
    with pytest.raises(CheckpointError, match="thresholds that differ"):
        load_sae(tmp_path)

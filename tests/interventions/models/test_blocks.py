"""Where the blocks are: the language model's among other towers, models cut by hand, and what is no decoder."""

import copy
import warnings

import pytest
import torch
import transformers
from torch import nn

from interventions import ModelError, Site, measure, record, wrap
from tests.shrunk import build
from tests.tiny import all_alone, assert_same_effect, exact_kl, fresh, prompts, rows


def effect_is_exact(hf, inner, tokens):
    """Of noise at block 1: a plain forward pass of each row, with a hook on `inner`'s block."""
    site, (prompt, position) = Site(1), rows(((0, 3), (0, 11), (1, 2), (1, 6)))
    recording = record(hf, tokens, [site])
    vectors = 1.5 * recording.at(site, prompt, position)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some fall back to full passes
        effects = measure(recording, site, prompt, position, vectors)
    clean, new = (all_alone("llama", inner, tokens, site, prompt, position, v) for v in (None, vectors))
    assert_same_effect(effects["kl"], exact_kl(clean, new), 1e-4)
    assert float(effects["kl"].min()) > 1e-4
    return effects


def cut(what):
    """A llama with blocks taken out, added or run in another number than its configuration says."""
    hf = fresh("llama")
    hf.config = hf.model.config = copy.deepcopy(hf.config)
    layers = hf.model.layers
    if what == "end":
        del layers[3:]
    elif what == "middle":
        del layers[1:3]
    elif what == "configuration":
        hf.config.num_hidden_layers = 9
    elif what == "doubled":
        hf.model.layers = nn.ModuleList([*layers, *copy.deepcopy(layers)])
        hf.config.num_hidden_layers = 12
    return hf


@pytest.mark.parametrize(("what", "n"), [("end", 3), ("middle", 4), ("configuration", 6), ("doubled", 12)])
def test_models_with_removed_or_added_blocks_are_exact(what, n):
    hf = cut(what)
    assert wrap(hf).n_layers == n
    effect_is_exact(hf, hf, prompts((12, 7)))


def test_blocks_that_do_not_run_in_order_are_refused():
    hf = fresh("llama")
    hf.config = hf.model.config = copy.deepcopy(hf.config)
    hf.config.num_hidden_layers = 4
    with pytest.raises(ModelError, match="of its 6 blocks 4, 5 did not run"):
        wrap(hf)
    hf = fresh("llama")
    hf.model.layers = nn.ModuleList([*hf.model.layers[:3], *hf.model.layers[:3]])
    with pytest.raises(ModelError, match="its 6 blocks ran in the order"):
        wrap(hf)


def test_a_model_without_blocks_is_refused():
    hf = fresh("llama")
    hf.model.layers = nn.ModuleList()
    with pytest.raises(ModelError, match="no list of blocks found in LlamaForCausalLM"):
        wrap(hf)


@pytest.mark.parametrize("kind", ["LlavaConfig", "Gemma3Config", "GitConfig"])
def test_language_tower_is_chosen_over_an_equally_deep_one(kind):
    config = getattr(transformers, kind)
    mapping = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    model = wrap(build(config, mapping[config]))
    assert model.n_layers == 4
    assert not any("vision" in type(block).__name__.lower() for block in model.blocks)


@pytest.mark.parametrize("kind", ["BartConfig", "T5Config"])
def test_encoder_decoders_are_refused(kind):
    config = getattr(transformers, kind)
    hf = build(config, transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING[config])
    with pytest.raises(ModelError, match=f"cannot use {type(hf).__name__}: an encoder-decoder; expected"):
        wrap(hf)


# What wraps a model


def test_compiled_model_is_replaced_by_its_original():
    hf = fresh("llama")
    compiled = torch.compile(hf, backend="eager")
    model = wrap(compiled)
    assert model.hf is hf and model.weights_hash == wrap(hf).weights_hash
    effect_is_exact(compiled, hf, prompts((12, 7)))


@pytest.mark.parametrize("part", ["", "model.layers.2.mlp"])
def test_a_model_compiled_in_place_is_refused(part):
    hf = fresh("llama")
    hf.get_submodule(part).compile(backend="eager")
    with pytest.raises(ModelError, match=f"{part or 'the model'} is compiled in place.*as it was before torch.compile"):
        wrap(hf)


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def adapted(peft, rank=4):
    hf = peft.get_peft_model(fresh("llama"), peft.LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], r=rank))
    generator = torch.Generator().manual_seed(3)
    for name, weight in hf.named_parameters():
        if "lora_B" in name:
            weight.data.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return hf.eval().requires_grad_(False)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_active_adapters_are_measured_and_named(peft):
    hf, plain = adapted(peft), wrap(fresh("llama"))
    model = wrap(hf)
    assert model.name == "LlamaForCausalLM + default" and model.weights_hash != plain.weights_hash
    effect_is_exact(hf, hf.get_base_model(), prompts((12, 7)))
    with hf.disable_adapter():
        assert wrap(hf).name == plain.name
    hf.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"], r=2))
    hf.set_adapter("other")
    assert wrap(hf).name == "LlamaForCausalLM + other"
    merged = adapted(peft).merge_and_unload()
    assert wrap(merged).name == plain.name
    effect_is_exact(merged, merged, prompts((12, 7)))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_prompt_tuning_adapters_are_refused(peft):
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, num_layers=6, token_dim=32, num_attention_heads=4
    )
    with pytest.raises(ModelError, match="adapter 'default' puts tokens of its own before the prompt"):
        wrap(peft.get_peft_model(fresh("llama"), config))

"""Folders that hold a model, and every way in which they do not, against the weights that were saved."""

import json
import os
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from interventions import ModelError, load_model, wrap
from tests import tiny
from tests.tiny import TOLERANCE, prompts, tiny_model


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def weights(change):
    def apply(folder):
        save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})

    return apply


def settings(**changed):
    def apply(folder):
        known = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(known | changed))

    return apply


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def without(*parts):
    return weights(lambda state: {name: value for name, value in state.items() if not any(p in name for p in parts)})


def adapter(folder):
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "owner/name"}')


def renamed(folder):
    return os.rename(folder, os.fsencode(folder.parent) + b"/caf\xe9")


def sharded(folder):
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
FOLDERS = {
    # Weights and configuration that do not belong together
    "no head": (without("lm_head"), "lack lm_head.weight, which would be random.*tie_word_embeddings: true"),
    "fewer blocks": (settings(num_hidden_layers=8), r"lack model\.layers\.6\..* and 15 more, which would be random"),
    "no final norm": (without("model.norm"), r"lack model\.norm\.weight, which would be random"),
    "no bias": (settings(attention_bias=True), r"lack model\.layers\.0\.self_attn\.k_proj\.bias"),
    "more blocks": (
        settings(num_hidden_layers=4),
        r"more blocks than config\.json names \(model\.layers\.4\.input_lay",
    ),
    "no blocks": (settings(num_hidden_layers=0), r"more blocks than config\.json names \(model\.layers\.0\."),
    "other shapes": (
        settings(vocab_size=90),
        r"lm_head\.weight, model\.embed_tokens\.weight .*\[97, 32\], expected \[90, 32\]",
    ),
    "a bias left out": (
        weights(lambda state: {**state, "model.layers.0.self_attn.q_proj.bias": torch.ones(32)}),
        r"hold model\.layers\.0\.self_attn\.q_proj\.bias, which config\.json turns off",
    ),
    # Files
    "cut short": (lambda f: os.truncate(f / "model.safetensors", 20_000), r"model\.safetensors has 20000 of \d+ bytes"),
    "cut in its header": (lambda f: os.truncate(f / "model.safetensors", 500), "cut short"),
    "empty": (lambda f: os.truncate(f / "model.safetensors", 0), r"model\.safetensors is empty"),
    "a pointer": (written("model.safetensors", LFS), r"model\.safetensors is a git-lfs pointer.*git lfs pull"),
    "a tokenizer's pointer": (written("tokenizer.json", LFS), "cannot load the tokenizer"),
    "noise": (
        written("model.safetensors", b"\x10" + b"\0" * 7 + b"x" * 400),
        r"model\.safetensors has a broken header",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"no file named model\.safetensors"),
    "a missing shard": (sharded, "model-00002-of-00002"),
    "a broken index": (
        lambda f: (sharded(f), written("model.safetensors.index.json", "{")(f)),
        "index.json is not JSON",
    ),
    "a file": (lambda f: f / "config.json", "config.json': it is a file; give the folder"),
    "no config": (lambda f: (f / "config.json").unlink(), r"it has no config\.json"),
    "a broken config": (written("config.json", "{"), r"config\.json is not JSON"),
    "no UTF-8": (written("config.json", b"\xff\xfe"), r"config\.json is not JSON"),
    "a list": (written("config.json", "[1]"), "model_type|list indices must be integers"),  # as transformers says it
    "an unknown type": (settings(model_type="nosuch"), "model type `nosuch`"),
    "a type that is no number": (settings(num_hidden_layers="six"), "expected int, got str"),
    "no heads": (settings(num_attention_heads=0), "ZeroDivisionError"),
    "no language model": (settings(model_type="vit"), "ViTConfig"),
    "an adapter": (adapter, r"an adapter alone.*merge_and_unload"),
    "a name that is no UTF-8": (renamed, "not valid UTF-8|surrogates not allowed"),
    "gptq": (
        settings(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128}),
        "install what it names",
    ),
    "awq": (
        settings(quantization_config={"quant_method": "awq", "bits": 4, "group_size": 128}),
        "install what it names",
    ),
    # Tokenizers
    "an unknown tokenizer": (
        written("tokenizer.json", '{"version": "1.0"}'),
        r"cannot load the tokenizer .*remove them",
    ),
    "a broken tokenizer": (written("tokenizer.json", "{"), "cannot load the tokenizer"),
    "no vocabulary": (lambda f: (f / "tokenizer.json").unlink(), "cannot load the tokenizer"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_unusable_model_folders_raise(folder, name, capfd):
    change, message = FOLDERS[name]
    where = change(folder)
    if name == "a name that is no UTF-8":
        where = os.fsdecode(os.fsencode(folder.parent) + b"/caf\xe9")
    with pytest.raises(ModelError, match=message) as error:
        load_model(where if name in ("a file", "a name that is no UTF-8") else folder, device="cpu")
    assert "\n" not in str(error.value) and len(str(error.value)) < 700
    assert "LOAD REPORT" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("name", ["gpt2", "mpt"])
def test_tied_heads_are_loaded_from_the_embedding(name, tmp_path):
    """The file holds only the embedding; logits equal those before saving."""
    hf, ids = tiny_model(name), torch.tensor(prompts((20,)))
    hf.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert hf.get_output_embeddings().weight is hf.get_input_embeddings().weight
    assert not any("lm_head" in key for key in saved)
    with pytest.warns(UserWarning, match="no tokenizer"):
        found = load_model(tmp_path, device="cpu")
    with torch.no_grad():
        assert torch.allclose(found.hf(input_ids=ids).logits, hf(input_ids=ids).logits, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_tokenizer_without_a_vocabulary_is_none_or_raises(name, tmp_path):
    """Some classes can be built without any file: they turn every text into no tokens or unknown ones."""
    tiny_model(name).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"no tokenizer for .* without a vocabulary"):
        assert load_model(tmp_path, device="cpu").tokenizer is None
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"cannot load the tokenizer .* without a vocabulary"):
        load_model(tmp_path, device="cpu")


def test_base_model_is_loaded_only_if_its_head_is_tied(tmp_path):
    for name in ("gpt2", "llama"):
        tiny_model(name).base_model.save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    assert load_model(tmp_path / "gpt2", device="cpu").weights_hash == wrap(tiny_model("gpt2")).weights_hash
    with pytest.raises(ModelError, match=r"lack lm_head\.weight"):
        load_model(tmp_path / "llama", device="cpu")


def test_unused_tensors_warn(folder):
    weights(lambda state: {**state, "vision.a": torch.ones(2), "vision.b": torch.ones(2)})(folder)
    with pytest.warns(
        UserWarning, match=r"2 tensors of its files are no part of LlamaForCausalLM.*: vision\.a, vision\.b"
    ):
        model = load_model(folder, device="cpu")
    assert model.weights_hash == wrap(tiny_model("llama")).weights_hash


def test_more_experts_than_configured_raise(tmp_path):
    """Some library versions keep experts as a list within a block; where they are one tensor, the shapes differ."""
    config = transformers.MixtralConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    settings(num_local_experts=2)(tmp_path)
    with pytest.raises(ModelError, match="cannot load model"):
        load_model(tmp_path, device="cpu")


def test_a_tokenizer_with_more_tokens_than_the_model_warns(folder):
    larger = tiny.tokenizer()
    larger.add_tokens([f"w{i}" for i in range(97, 120)])
    larger.save_pretrained(folder)
    with pytest.warns(UserWarning, match="the tokenizer has 120 tokens, the model 97; texts with a token from 97 on"):
        load_model(folder, device="cpu")


@pytest.mark.parametrize("which", ["config", "tokenizer"])
def test_code_in_a_folder_needs_trust_remote_code(folder, which, monkeypatch):
    """Loading never asks for permission, even where the answer would be yes."""
    ran = folder.parent / "ran"
    (folder / "own.py").write_text(
        f"open({str(ran)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class Config(LlamaConfig):\n    model_type = 'own'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
        "class Tokens(PreTrainedTokenizerFast):\n    pass\n"
    )
    if which == "config":
        settings(model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})(folder)
    else:
        known = json.loads((folder / "tokenizer_config.json").read_text())
        known |= {"tokenizer_class": "Tokens", "auto_map": {"AutoTokenizer": [None, "own.Tokens"]}}
        (folder / "tokenizer_config.json").write_text(json.dumps(known))
    asked = []
    monkeypatch.setattr("builtins.input", lambda *_: asked.append(1) or "y")
    with pytest.raises(ModelError, match="--trust-remote-code"):
        load_model(folder, device="cpu")
    assert not asked and not ran.exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library, about code of others
        model = load_model(folder, device="cpu", trust_remote_code=True)
    assert ran.exists()
    assert model.tokenizer("w5 w96").input_ids == [5, 96]
    assert torch.equal(model.hf.lm_head.weight, tiny_model("llama").lm_head.weight)


@pytest.mark.parametrize("name", ["", "\0", "x" * 5000])
def test_invalid_model_names_raise(name, tmp_path, monkeypatch):
    """An invalid name does not stand for the working directory, even if a model lies there."""
    tiny_model("llama").save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"no model|cannot load model"):
        load_model(name, device="cpu")


def test_tilde_in_a_model_path_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert load_model("~/model", device="cpu").name == "~/model"


def test_loading_keeps_progress_bars_disabled(folder):
    from transformers.utils import logging as library

    shown = library.is_progress_bar_enabled()
    library.disable_progress_bar()
    try:
        load_model(folder, device="cpu")
        assert not library.is_progress_bar_enabled()
    finally:
        if shown:
            library.enable_progress_bar()

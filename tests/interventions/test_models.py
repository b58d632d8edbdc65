"""Models however they are wrapped, and every refusal."""

import copy
import os

import pytest
import torch
import transformers

from interventions import ModelError, Site, SiteError, intervened_logits, load_model, measure, record, wrap
from interventions.anatomy import check_site
from interventions.models import cache_folder, resolve_device, resolve_dtype
from interventions.replay import unembed
from tests import tiny
from tests.tiny import BRIDGED, D_MODEL, HOOKED, N_LAYERS, REPLAYED, VOCAB, bridge, fresh, tiny_model, traced


@pytest.mark.parametrize("name", [*REPLAYED, *HOOKED])
def test_base_and_blocks_are_found(name, device):
    hf = tiny_model(name, device)
    model = wrap(hf)
    assert model.blocks == list(tiny.blocks(name, hf))
    assert any(child is tiny.blocks(name, hf) for child in model.base.children())
    assert (model.n_layers, model.d_model, model.vocab_size) == (N_LAYERS, D_MODEL, VOCAB)
    assert model.device.type == torch.device(device).type and model.dtype == torch.float32
    assert model.wrapper == "huggingface" and model.handle is hf and model.hf is hf
    layer_norm = {"gpt2", "gpt_neox", "opt", "phi", "stablelm", "gpt_neo", "bloom", "mpt"}
    assert model.norm_kind == ("LayerNorm" if name in layer_norm else "RMSNorm")
    check_site(model, Site(N_LAYERS - 1))
    with pytest.raises(SiteError, match="no block 6"):
        check_site(model, Site(N_LAYERS))


def test_wrap_leaves_a_wrapped_model_and_evaluates_a_live_one(device):
    model = wrap(fresh("llama", device).train(), name="mine", note="a note")
    assert not model.hf.training
    assert wrap(model) is model and load_model(model) is model
    assert (model.name, model.note) == ("mine", "a note")
    assert load_model(model.hf).hf is model.hf


@pytest.mark.bridge
@pytest.mark.parametrize("name", BRIDGED)
def test_a_bridge_has_the_same_blocks_and_hash(name, device):
    plain = wrap(tiny_model(name, device))
    bridged = wrap(bridge(name, fresh(name, device)))
    assert bridged.wrapper == "transformer_lens"
    assert (bridged.n_layers, bridged.d_model, bridged.vocab_size) == (N_LAYERS, D_MODEL, VOCAB)
    assert bridged.weights_hash == plain.weights_hash


@pytest.mark.parametrize("name", BRIDGED)
def test_an_nnsight_model_has_the_same_blocks_and_hash(name, device):
    plain = wrap(tiny_model(name, device))
    model = wrap(traced(fresh(name, device)))
    assert model.wrapper == "nnsight"
    assert model.n_layers == N_LAYERS
    assert model.weights_hash == plain.weights_hash


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba"])
def test_the_hash_sees_every_weight(name, device):
    """One number of each parameter in turn, its dtype, and nothing else."""
    expected = wrap(tiny_model(name, device)).weights_hash
    hf = fresh(name, device)
    assert wrap(hf).weights_hash == expected
    for key, weight in hf.named_parameters():
        first = weight.flatten()[0].item()
        weight.view(-1)[0] = first + 1e-3
        assert wrap(hf).weights_hash != expected, key
        weight.view(-1)[0] = first
    assert wrap(hf).weights_hash == expected
    assert wrap(hf.double()).weights_hash != expected


# Refusals


@pytest.mark.parametrize("thing", [torch.nn.Linear(2, 2), 3, object(), None], ids=["module", "int", "object", "None"])
def test_wrap_refuses_what_is_no_model(thing):
    with pytest.raises(ModelError, match=f"cannot use a {type(thing).__name__}; expected a Hugging Face causal LM"):
        wrap(thing)


def test_wrap_refuses_a_model_without_unembedding(device):
    with pytest.raises(ModelError, match="LlamaModel has no unembedding; load it with AutoModelForCausalLM"):
        wrap(tiny_model("llama", device).model)


def test_wrap_refuses_flash_attention(device):
    hf = fresh("llama", device)
    hf.config = copy.deepcopy(hf.config)
    hf.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ModelError, match=r"flash_attention_2.*sdpa.*eager"):
        wrap(hf)


def test_wrap_refuses_weights_that_are_not_there():
    config = tiny_model("llama").config
    with torch.device("meta"):
        hf = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match="weights are not loaded"):
        wrap(hf)


def test_a_model_whose_blocks_are_nowhere(device):
    hf = fresh("llama", device)
    hf.config.num_hidden_layers = 7
    with pytest.raises(ModelError, match="no list of 7 blocks found in LlamaForCausalLM"):
        wrap(hf).blocks  # noqa: B018


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_dtypes_by_name_and_as_torch_has_them(name):
    assert resolve_dtype(name) is resolve_dtype(getattr(torch, name)) is getattr(torch, name)


@pytest.mark.parametrize("dtype", ["float23", torch.float64, torch.int8, "int8"], ids=str)
def test_dtypes_that_are_not_known(dtype):
    with pytest.raises(ModelError, match=r"unknown dtype .*known: float32, bfloat16, float16"):
        resolve_dtype(dtype)


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ModelError, match="unknown device 'gpu'"):
        resolve_device("gpu")
    with pytest.raises(ModelError, match="device cuda:99 asked for, but torch sees"):
        resolve_device("cuda:99")


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./no/such/folder", "no-such-person/no-such-model-xyz", "~/nowhere"]
)
def test_models_that_are_nowhere(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"smollm2-135m.*config.json"):
        load_model(name, device="cpu")


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ModelError, match="cannot load model"):
        load_model(str(tmp_path), device="cpu")


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_folder_is_loaded(name, tmp_path, device):
    """Weights to the bit; a soft-capped model attends eagerly, so that the caps are applied."""
    tiny_model(name).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    model = load_model(tmp_path, device=device)
    assert model.weights_hash == wrap(tiny_model(name)).weights_hash
    assert model.name == str(tmp_path) and model.tokenizer("w5 w96").input_ids == [5, 96]
    assert model.hf.config._attn_implementation == ("eager" if name == "gemma2" else "sdpa")
    assert not any(p.requires_grad for p in model.hf.parameters())
    half = load_model(str(tmp_path), dtype="bfloat16", device=device)
    assert half.dtype == torch.bfloat16


def test_a_folder_without_tokenizer(tmp_path, device):
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no tokenizer for"):
        assert load_model(tmp_path, device=device).tokenizer is None


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MECHDIAG_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    monkeypatch.delenv("MECHDIAG_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "mechdiag"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "mechdiag"


# The packaged model


@pytest.fixture(scope="module")
def packaged(device):
    return load_model(device=device)


@pytest.mark.model
def test_the_packaged_model(packaged):
    assert (packaged.n_layers, packaged.d_model, packaged.vocab_size) == (30, 576, 49152)
    assert packaged.norm_kind == "RMSNorm" and packaged.dtype == torch.float32
    assert packaged.tokenizer is not None and "Q4_1" in packaged.note and packaged.name == "smollm2-135m"
    assert (cache_folder()).exists()
    ids = packaged.tokenizer("The capital of France is", return_tensors="pt").input_ids.to(packaged.device)
    with torch.no_grad():
        best = packaged.hf(input_ids=ids).logits[0, -1].argmax()
    assert packaged.tokenizer.decode(best).strip() == "Paris"


@pytest.mark.model
def test_a_cache_that_holds_the_model_is_not_written_again(packaged, monkeypatch):
    from interventions import models

    folder = models.packaged_model_folder()
    before = os.stat(folder / "config.json").st_mtime_ns
    monkeypatch.setattr(models, "_convert_gguf", lambda *_: pytest.fail("converted again"))
    assert models.packaged_model_folder() == folder
    assert os.stat(folder / "config.json").st_mtime_ns == before


@pytest.mark.model
@pytest.mark.parametrize("layer", [0, 15, 29])
def test_replay_is_exact_on_the_packaged_model(packaged, layer):
    """Float32 logits of up to 30 after 30 blocks: 1e-4 is 50 units in their last place."""
    generator = torch.Generator().manual_seed(layer)
    tokens = [torch.randint(3, 49152, (n,), generator=generator).tolist() for n in (101, 37)]
    site, pairs = Site(layer), [(0, 0), (0, 50), (0, 100), (0, 100), (1, 5), (1, 36)]
    recording = record(packaged, tokens, [site])
    prompt, position = tiny.rows(pairs)
    values = recording.at(site, prompt, position)
    other = torch.randn(values.shape, generator=generator).to(values)
    vectors = values + other * values.norm(dim=-1, keepdim=True) / 576**0.5
    vectors[3] = 2 * values[3]
    slow = tiny.all_alone("llama", packaged.hf, tokens, site, prompt, position, vectors)
    clean = tiny.all_alone("llama", packaged.hf, tokens, site, prompt, position, None)
    fast = intervened_logits(recording, site, prompt, position, vectors, path="replay")
    at = prompt.to(packaged.device), position.to(packaged.device)
    fast_clean = unembed(recording, recording.final_hidden[at])
    delta = float(torch.maximum((fast - slow).abs().max(), (fast_clean - clean).abs().max()))
    assert delta <= 1e-4
    effects = measure(recording, site, prompt, position, vectors, path="replay")
    tiny.assert_same_effect(effects["kl"], tiny.exact_kl(clean, slow), delta, rounding=1e-4)
    assert effects["kl"].max() > 0.1

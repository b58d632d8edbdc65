"""Models however they are wrapped, and every refusal."""

import copy
import os

import pytest
import torch
import transformers

from interventions import ModelError, Site, SiteError, intervened_logits, load_model, measure, record, wrap
from interventions.cache import cache_folder
from interventions.models.anatomy import check_site
from interventions.models.loading import layernorm_counterpart, resolve_device, resolve_dtype, untrained
from interventions.replaying.replay import unembed
from interventions.texts.prompts import load_texts, tokenize
from tests import tiny
from tests.tiny import BRIDGED, D_MODEL, HOOKED, N_LAYERS, REPLAYED, TOLERANCE, VOCAB, fresh, tiny_model, wrapped


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


def test_wrap_is_idempotent_and_keeps_train_mode(device):
    model = wrap(fresh("llama", device).train(), name="mine", note="a note")
    assert all(module.training for module in model.hf.modules())
    assert wrap(model) is model and load_model(model) is model
    assert (model.name, model.note) == ("mine", "a note")
    assert load_model(model.hf).hf is model.hf


@pytest.mark.parametrize(
    ("name", "wrapper"),
    [
        *(pytest.param(name, "bridge", marks=pytest.mark.bridge) for name in BRIDGED),
        ("llama", "nnsight"),
        ("gpt2", "nnsight"),
    ],
)
def test_wrapped_models_have_the_same_blocks_and_hash(name, wrapper, device):
    plain, model = wrap(tiny_model(name, device)), wrap(wrapped(name, wrapper, device))
    assert model.wrapper == {"bridge": "transformer_lens", "nnsight": "nnsight"}[wrapper]
    assert (model.n_layers, model.d_model, model.vocab_size) == (N_LAYERS, D_MODEL, VOCAB)
    assert model.weights_hash == plain.weights_hash


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_hash_depends_on_every_weight(name, device):
    """Changes one number of each parameter in turn, then the dtype."""
    expected = wrap(tiny_model(name, device)).weights_hash
    model = wrap(fresh(name, device))
    assert model.hash_weights() == expected
    for key, weight in model.hf.named_parameters():
        first = weight.flatten()[0].item()
        weight.view(-1)[0] = first + 1e-3
        assert model.hash_weights() != expected, key
        weight.view(-1)[0] = first
    assert model.hash_weights() == expected
    assert wrap(model.hf.double()).weights_hash != expected


# Refusals


def test_wrap_refuses_unusable_models(device):
    flash = fresh("llama", device)
    flash.config = copy.deepcopy(flash.config)
    flash.config._attn_implementation_internal = "flash_attention_2"
    config = tiny_model("llama", device).config
    with torch.device("meta"):
        unloaded = transformers.AutoModelForCausalLM.from_config(config)
    for thing, message in (
        (torch.nn.Linear(2, 2), "cannot use a Linear; expected a Hugging Face causal LM"),
        (3, "cannot use a int; expected a Hugging Face causal LM"),
        (tiny_model("llama", device).model, "LlamaModel has no unembedding; load it with AutoModelForCausalLM"),
        (flash, r"flash_attention_2.*sdpa.*eager"),
        (unloaded, "weights are not loaded"),
    ):
        with pytest.raises(ModelError, match=message):
            wrap(thing)


def test_dtypes_and_devices_are_resolved_or_raise():
    for name in ("float32", "bfloat16", "float16"):
        assert resolve_dtype(name) is resolve_dtype(getattr(torch, name)) is getattr(torch, name)
    for dtype in ("float23", torch.float64, torch.int8):
        with pytest.raises(ModelError, match=r"unknown dtype .*known: float32, bfloat16, float16"):
            resolve_dtype(dtype)
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ModelError, match="unknown device 'gpu'"):
        resolve_device("gpu")
    with pytest.raises(ModelError, match="device cuda:99 asked for, but torch sees"):
        resolve_device("cuda:99")


@pytest.mark.parametrize("name", ["/no/such/folder", "no-such-person/no-such-model-xyz", "~/nowhere"])
def test_a_model_that_does_not_exist_raises(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"smollm2-135m.*config.json"):
        load_model(name, device="cpu")


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_model_folder_is_loaded(name, tmp_path, device):
    """Weights are identical. A soft-capped model uses eager attention, so that the caps are applied."""
    tiny_model(name).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    model = load_model(tmp_path, device=device)
    assert model.weights_hash == wrap(tiny_model(name)).weights_hash
    assert model.name == str(tmp_path) and model.tokenizer("w5 w96").input_ids == [5, 96]
    assert model.hf.config._attn_implementation == ("eager" if name == "gemma2" else "sdpa")
    assert not any(p.requires_grad for p in model.hf.parameters())
    half = load_model(str(tmp_path), dtype="bfloat16", device=device)
    assert half.dtype == torch.bfloat16


# The same weights under LayerNorm


def llama(**settings):
    """Rotary base and ε as no configuration has them by itself."""
    return tiny.llama(**{"num_hidden_layers": 3, "rope_theta": 700.0, "rms_norm_eps": 0.03, **settings})


@torch.no_grad()
def by_hand(hf, tokens, norm_kind):
    """Logits `[pos, vocab]` of a Llama in float64, its norms as they are or after the mean is removed."""
    config, weight = hf.config, {name: value.double() for name, value in hf.state_dict().items()}
    n, heads, size = len(tokens), config.num_attention_heads, config.head_dim
    frequency = 700.0 ** (-torch.arange(size // 2, dtype=torch.float64) / (size // 2))
    turn = torch.polar(torch.ones(()).double(), torch.arange(n)[:, None] * frequency)[:, None]

    def normed(x, name):
        x = x - x.mean(-1, keepdim=True) if norm_kind == "LayerNorm" else x
        return weight[f"model.{name}.weight"] * x / (x.square().mean(-1, keepdim=True) + 0.03).sqrt()

    def rotated(x):
        turned = torch.complex(x[..., : size // 2], x[..., size // 2 :]) * turn
        return torch.cat([turned.real, turned.imag], -1)

    x = weight["model.embed_tokens.weight"][torch.tensor(tokens)]
    for layer in range(config.num_hidden_layers):
        block = f"model.layers.{layer}"
        read = normed(x, f"layers.{layer}.input_layernorm")
        q, k, v = (
            (read @ weight[f"{block}.self_attn.{name}_proj.weight"].T).view(n, -1, size) for name in ("q", "k", "v")
        )
        k, v = (each.repeat_interleave(heads // config.num_key_value_heads, 1) for each in (rotated(k), v))
        score = torch.einsum("qhd,khd->hqk", rotated(q), k) / size**0.5
        attention = score.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)
        found = torch.einsum("hqk,khd->qhd", attention, v).reshape(n, -1)
        x = x + found @ weight[f"{block}.self_attn.o_proj.weight"].T
        read = normed(x, f"layers.{layer}.post_attention_layernorm")
        gate, up = (read @ weight[f"{block}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (torch.nn.functional.silu(gate) * up) @ weight[f"{block}.mlp.down_proj.weight"].T
    return normed(x, "norm") @ weight["lm_head.weight"].T


def logits(hf, tokens):
    with torch.no_grad():
        return hf(input_ids=torch.tensor([tokens], device=hf.device)).logits[0].cpu().double()


@pytest.mark.parametrize("settings", [{}, {"tie_word_embeddings": True, "num_key_value_heads": 4}], ids=["", "tied"])
def test_layernorm_counterpart_equals_a_forward_pass_by_hand(settings, device):
    hf = llama(**settings).to(device)
    tokens = tiny.prompts((40,))[0]
    found = layernorm_counterpart(wrap(hf))
    assert (logits(hf, tokens) - by_hand(hf.cpu(), tokens, "RMSNorm")).abs().max() <= TOLERANCE
    expected = by_hand(hf, tokens, "LayerNorm")
    assert (logits(found.hf, tokens) - expected).abs().max() <= TOLERANCE
    assert (logits(hf, tokens) - expected).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layernorm_counterpart_keeps_weights_and_names_its_origin(dtype, device):
    model = wrap(fresh("llama", device, dtype), "a tokenizer", name="mine", note="dequantised")
    before, state = model.weights_hash, torch.get_rng_state()
    found = layernorm_counterpart(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert (found.name, found.tokenizer, found.wrapper) == ("mine-layernorm", "a tokenizer", "huggingface")
    assert found.note == (
        "dequantised; the same weights under LayerNorm: a parity test, not a model trained with LayerNorm"
    )
    assert layernorm_counterpart(wrap(model.hf)).note == found.note.removeprefix("dequantised; ")
    assert (found.dtype, found.device.type, found.norm_kind) == (dtype, torch.device(device).type, "LayerNorm")
    assert found.hf.config._attn_implementation == model.hf.config._attn_implementation
    assert torch.equal(found.hf.model.rotary_emb.inv_freq, tiny_model("llama", device).model.rotary_emb.inv_freq)
    kept = dict(model.hf.named_parameters())
    for name, value in found.hf.named_parameters():
        assert not value.requires_grad
        assert torch.equal(value, kept[name]) if name in kept else name.endswith("norm.bias") and not value.any()
    assert found.counterpart_of == before and model.counterpart_of is None
    assert found.weights_hash == layernorm_counterpart(model).weights_hash != before
    for weight in found.hf.parameters():
        weight.add_(1.0)
    assert wrap(model.hf).weights_hash == before  # copied


def test_a_randomly_initialised_model_is_no_counterpart(device):
    other = untrained(layernorm_counterpart(wrap(fresh("llama", device), name="mine")), 0)
    assert type(other.hf).__name__ == "StableLmForCausalLM"
    assert (other.counterpart_of, other.note) == (None, "random weights, seed 0")


@pytest.mark.parametrize("wrapper", [pytest.param("bridge", marks=pytest.mark.bridge), "nnsight"])
def test_wrapped_and_plain_models_have_equal_counterparts(wrapper, device):
    expected = layernorm_counterpart(wrap(tiny_model("llama", device)))
    found = layernorm_counterpart(wrap(wrapped("llama", wrapper, device)))
    assert found.weights_hash == expected.weights_hash and found.counterpart_of == expected.counterpart_of


def test_models_without_a_counterpart_raise(device):
    for name in ("qwen3", "gpt2", "stablelm"):
        with pytest.raises(ModelError, match=f"no LayerNorm counterpart of a '{name}' model .*; expected 'llama'"):
            layernorm_counterpart(wrap(tiny_model(name, device)))
    for settings, seen in (
        ({"attention_bias": True}, r"biases \(LlamaForCausalLM: layers.0.self_attn.q_proj.bias, .*\); expected none"),
        ({"mlp_bias": True}, r"biases \(LlamaForCausalLM: layers.0.mlp.gate_proj.bias, .*\); expected none"),
        ({"head_dim": 16}, r"heads span 64 of 32 dimensions \(LlamaForCausalLM\); expected as many"),
    ):
        with pytest.raises(ModelError, match=seen):
            layernorm_counterpart(wrap(llama(**settings)))
    hf = llama()
    hf.lm_head.bias = torch.nn.Parameter(torch.ones(VOCAB), requires_grad=False)
    with pytest.raises(ModelError, match="of the unembedding"):
        layernorm_counterpart(wrap(hf))


def test_randomly_initialised_models_keep_their_rotary_frequencies(device):
    """The frequencies equal those of a loaded model, whatever the dtype of the weights."""
    for dtype in (torch.float32, torch.bfloat16):
        other = untrained(wrap(fresh("llama", device, dtype)), 0)
        assert other.dtype == dtype
        assert torch.equal(other.hf.model.rotary_emb.inv_freq, tiny_model("llama", device).model.rotary_emb.inv_freq)


# The packaged model


@pytest.fixture(scope="module")
def packaged(device):
    return load_model(device=device)


@pytest.fixture(scope="module")
def counterpart(device):
    return load_model("smollm2-135m-layernorm", device=device)


@pytest.mark.model
def test_packaged_model_loads_and_predicts(packaged):
    assert (packaged.n_layers, packaged.d_model, packaged.vocab_size) == (30, 576, 49152)
    assert packaged.norm_kind == "RMSNorm" and packaged.dtype == torch.float32
    assert packaged.tokenizer is not None and "Q4_1" in packaged.note and packaged.name == "smollm2-135m"
    assert (cache_folder()).exists()
    ids = packaged.tokenizer("The capital of France is", return_tensors="pt").input_ids.to(packaged.device)
    with torch.no_grad():
        best = packaged.hf(input_ids=ids).logits[0, -1].argmax()
    assert packaged.tokenizer.decode(best).strip() == "Paris"


@pytest.mark.model
def test_a_cached_model_is_not_converted_again(packaged, monkeypatch):
    from interventions.models import packaged as models

    folder = models.packaged_model_folder()
    before = os.stat(folder / "config.json").st_mtime_ns
    monkeypatch.setattr(models, "_convert_gguf", lambda *_: pytest.fail("converted again"))
    assert models.packaged_model_folder() == folder
    assert os.stat(folder / "config.json").st_mtime_ns == before


@pytest.mark.model
def test_packaged_counterpart_is_slightly_worse(packaged, counterpart):
    """Its loss is about 0.06 nats above the original's; a mistake in the conversion would cost far more."""
    assert counterpart.counterpart_of == packaged.weights_hash
    assert (counterpart.name, counterpart.norm_kind) == ("smollm2-135m-layernorm", "LayerNorm")
    assert counterpart.note.startswith(
        "SmolLM2-135M-Instruct, dequantised from Q4_1; the same weights under LayerNorm:"
    )
    prompts = tokenize(load_texts(), packaged.tokenizer, max_length=64, n_prompts=5).tokens
    loss = {"RMSNorm": [], "LayerNorm": []}
    for model in (packaged, counterpart):
        for ids in prompts:
            found = logits(model.hf, ids)[:-1].log_softmax(-1)
            loss[model.norm_kind] += (-found.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]).tolist()
    worse = torch.tensor(loss["LayerNorm"]).mean() - torch.tensor(loss["RMSNorm"]).mean()
    assert 0 < worse < 0.3


@pytest.mark.model
@pytest.mark.parametrize(("fixture", "layer"), [("packaged", 0), ("counterpart", 15)])
def test_replay_is_exact_on_the_packaged_models(request, fixture, layer):
    """Float32 logits of up to 30 after 30 blocks: 1e-4 is 50 units in their last place."""
    packaged = request.getfixturevalue(fixture)
    generator = torch.Generator().manual_seed(layer)
    tokens = [torch.randint(3, 49152, (n,), generator=generator).tolist() for n in (40, 11)]
    site, pairs = Site(layer), [(0, 0), (0, 39), (0, 39), (1, 5)]
    recording = record(packaged, tokens, [site])
    prompt, position = tiny.rows(pairs)
    values = recording.at(site, prompt, position)
    other = torch.randn(values.shape, generator=generator).to(values)
    vectors = values + other * values.norm(dim=-1, keepdim=True) / 576**0.5
    vectors[2] = 2 * values[2]
    slow = tiny.all_alone("llama", packaged.hf, tokens, site, prompt, position, vectors)
    whole = [logits(packaged.hf, ids) for ids in tokens]
    clean = torch.stack([whole[p][q] for p, q in pairs])
    fast = intervened_logits(recording, site, prompt, position, vectors, path="replay")
    at = prompt.to(packaged.device), position.to(packaged.device)
    fast_clean = unembed(recording, recording.final_hidden[at])
    delta = float(torch.maximum((fast - slow).abs().max(), (fast_clean - clean).abs().max()))
    assert delta <= 1e-4
    effects = measure(recording, site, prompt, position, vectors, path="replay")
    tiny.assert_same_effect(effects["kl"], tiny.exact_kl(clean, slow), delta, rounding=1e-4)
    assert effects["kl"].max() > 0.1

"""Tiny random models of many architectures, and full forward passes that owe the engine nothing.

A model has 6 blocks of width 32 over 97 tokens, with Gaussian noise of 0.3 added to every weight: the norms' gains
and biases too, so that no block is close to the identity and no mistake hides behind a gain of 1.
"""

import copy
import functools

import torch
import transformers
from torch import nn

from interventions import Site

VOCAB, D_MODEL, N_LAYERS, WINDOW = 97, 32, 6, 8
TOLERANCE = 1e-4
"""Largest logit difference allowed between two float32 ways to one row: logits stay below 10, so 1 000 half-units in the
last place for 6 blocks of a few hundred additions each; about 1e-5 is seen."""

_SMALL = {"vocab_size": VOCAB, "hidden_size": D_MODEL, "num_hidden_layers": N_LAYERS, "num_attention_heads": 4}
_GROUPED = {**_SMALL, "intermediate_size": 64, "num_key_value_heads": 2}
_PLAIN = {**_GROUPED, "num_key_value_heads": 4}
_GPT2 = {"vocab_size": VOCAB, "n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": 4}

# name: configuration class, its settings, where the blocks are, a hub id of this architecture for TransformerLens
_MODELS = {
    "llama": ("LlamaConfig", _GROUPED, "model.layers", "meta-llama/Llama-2-7b-hf"),
    "qwen3": ("Qwen3Config", {**_GROUPED, "head_dim": 8}, "model.layers", "Qwen/Qwen3-8B"),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **_GROUPED,
            "head_dim": 8,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
        },
        "model.layers",
        "google/gemma-3-1b-it",
    ),
    "gemma2": (
        "Gemma2Config",
        {**_GROUPED, "head_dim": 8, "sliding_window": WINDOW},
        "model.layers",
        "google/gemma-2-2b",
    ),
    "mistral": ("MistralConfig", {**_GROUPED, "sliding_window": None}, "model.layers", "mistralai/Mistral-7B-v0.1"),
    "mistral_window": (
        "MistralConfig",
        {**_GROUPED, "sliding_window": WINDOW},
        "model.layers",
        "mistralai/Mistral-7B-v0.1",
    ),
    "gpt2": ("GPT2Config", {**_GPT2, "n_positions": 64}, "transformer.h", "gpt2"),
    "gpt_neox": (
        "GPTNeoXConfig",
        {**_SMALL, "intermediate_size": 64, "max_position_embeddings": 64},
        "gpt_neox.layers",
        "EleutherAI/pythia-70m",
    ),
    "opt": (
        "OPTConfig",
        {**_SMALL, "ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": D_MODEL},
        "model.decoder.layers",
        "facebook/opt-125m",
    ),
    "phi": ("PhiConfig", _PLAIN, "model.layers", "microsoft/phi-1"),
    "olmo2": ("Olmo2Config", _GROUPED, "model.layers", "allenai/OLMo-2-1124-7B"),
    "stablelm": ("StableLmConfig", _PLAIN, "model.layers", "stabilityai/stablelm-base-alpha-3b"),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": D_MODEL,
            "num_layers": N_LAYERS,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 3]],
            "window_size": WINDOW,
            "max_position_embeddings": 64,
            "intermediate_size": 64,
        },
        "transformer.h",
        "EleutherAI/gpt-neo-125M",
    ),
    "bloom": (
        "BloomConfig",
        {"vocab_size": VOCAB, "hidden_size": D_MODEL, "n_layer": N_LAYERS, "n_head": 4},
        "transformer.h",
        "bigscience/bloom-560m",
    ),
    "mpt": (
        "MptConfig",
        {"vocab_size": VOCAB, "d_model": D_MODEL, "n_layers": N_LAYERS, "n_heads": 4},
        "transformer.blocks",
        None,
    ),
    "mamba": (
        "MambaConfig",
        {"vocab_size": VOCAB, "hidden_size": D_MODEL, "num_hidden_layers": N_LAYERS},
        "backbone.layers",
        None,
    ),
}
REPLAYED = (
    *("llama", "qwen3", "gemma3", "gemma2", "mistral", "mistral_window"),
    *("gpt2", "gpt_neox", "opt", "phi", "olmo2", "stablelm"),
)
"""replay must be exact here: RMSNorm and LayerNorm, sequential and parallel blocks, rotary and learned positions, windows, soft caps"""
HOOKED = ("gpt_neo", "bloom", "mpt", "mamba")
"""replay cannot serve these: masks ignored, shapes not taken, no keys"""
BRIDGED = (*REPLAYED, "gpt_neo", "bloom")
SITES = tuple(Site(layer, point) for layer in (0, 3, N_LAYERS - 1) for point in ("resid_pre", "resid_post"))
LENGTHS = (24, 10, 17, 24, 1)
ROWS = (
    *((0, p) for p in (0, 3, 12, 12, 12, 23, 23)),
    *((1, p) for p in (0, 9, 9)),
    *((2, p) for p in (8, 16)),
    *((3, p) for p in (23, 22, 0, 9, 9)),
    *((4, 0), (4, 0)),
)
"""(prompt, position): first, short of the window, beyond it, last; several edits of one token; a prompt of one token"""


@functools.cache
def tiny_model(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32, vocab: int = VOCAB) -> nn.Module:
    """A plain Hugging Face model, shared by tests: copy it (`fresh`) before changing anything."""
    config_class, settings, _, _ = _MODELS[name]
    config = getattr(transformers, config_class)(**{**settings, "vocab_size": vocab})
    config.architectures = [transformers.AutoModelForCausalLM._model_mapping[type(config)].__name__]
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="eager" if name == "gemma2" else None
        )
    model.eval().requires_grad_(False)
    for weight in model.parameters():
        weight.add_(torch.randn(weight.shape, generator=generator) * 0.3)
    return model.to(device=device, dtype=dtype)


def fresh(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32, vocab: int = VOCAB) -> nn.Module:
    """A copy of one's own."""
    return copy.deepcopy(tiny_model(name, device, dtype, vocab))


def tokenizer():
    """A tokenizer of 97 words, which wrappers want to see. (TransformerLens reloads from a folder one that has a BOS token.)"""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        eos_token="w2",
        pad_token="w0",
        unk_token="w0",
    )


def bridge(name: str, hf: nn.Module):
    """A TransformerBridge around `hf`, which it changes."""
    from transformer_lens.model_bridge import TransformerBridge

    device = next(hf.parameters()).device
    return TransformerBridge.boot_transformers(_MODELS[name][3], hf_model=hf, tokenizer=tokenizer(), device=str(device))


def traced(hf: nn.Module):
    """An nnsight model around `hf`."""
    import nnsight

    return nnsight.TransformersModel(hf, task="text-generation", tokenizer=tokenizer())


def prompts(lengths: tuple[int, ...] = LENGTHS, vocab: int = VOCAB) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, vocab, (n,), generator=generator).tolist() for n in lengths]


def rows(pairs=ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt and position of each row."""
    prompt, position = torch.tensor(pairs, dtype=torch.long).T
    return prompt.contiguous(), position.contiguous()


def noise(n: int, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 2) -> torch.Tensor:
    """Vectors from slight to violent."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([1.0, 0.01, 0.3, 3.0]).repeat(n)[:n, None]
    return (scale * torch.randn(n, D_MODEL, generator=generator)).to(device, dtype)


def edited(recording, site: Site, prompt, position, seed: int = 2) -> torch.Tensor:
    """Activations with noise of 0.01 to 3 times their own size added."""
    values = recording.at(site, prompt, position)
    size = values.float().norm(dim=-1, keepdim=True) / D_MODEL**0.5
    return (values + size * noise(len(prompt), str(values.device), seed=seed)).to(values.dtype)


def blocks(name: str, hf: nn.Module) -> nn.ModuleList:
    return hf.get_submodule(_MODELS[name][2])


@torch.no_grad()
def alone(name: str, hf: nn.Module, tokens: list[int], site: Site | None, position: int, edit=None) -> torch.Tensor:
    """Logits `[vocab]` at `position` of one full forward pass of one unpadded prompt, by a torch hook set here.

    edit: a vector, or a function of the vector that stands there. No site: the clean pass.
    """

    def edited(hidden):
        hidden = hidden.clone()
        hidden[0, position] = edit(hidden[0, position]) if callable(edit) else edit
        return hidden

    def before(_, args, kwargs):
        return (
            ((edited(args[0]), *args[1:]), kwargs)
            if args
            else (args, {**kwargs, "hidden_states": edited(kwargs["hidden_states"])})
        )

    def after(_, __, output):
        return (edited(output[0]), *output[1:]) if isinstance(output, tuple) else edited(output)

    ids = torch.tensor([tokens], device=next(hf.parameters()).device)
    if site is None:
        return hf(input_ids=ids).logits[0, position]
    block = blocks(name, hf)[site.layer]
    if site.point == "resid_pre":
        handle = block.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = block.register_forward_hook(after)
    try:
        return hf(input_ids=ids).logits[0, position]
    finally:
        handle.remove()


def all_alone(name: str, hf: nn.Module, tokens, site, prompt, position, vectors) -> torch.Tensor:
    """`alone` for each row: `[row, vocab]`; vectors None: clean."""
    return torch.stack(
        [
            alone(name, hf, tokens[p], None if vectors is None else site, q, None if vectors is None else vectors[i])
            for i, (p, q) in enumerate(zip(prompt.tolist(), position.tolist(), strict=True))
        ]
    )


def exact_kl(clean: torch.Tensor, intervened: torch.Tensor) -> torch.Tensor:
    """KL(p‖q), nats, of logits, in float64 on the CPU, by terms that are all ≥ 0: Σ (q − p − p·w), w = log q − log p."""
    log_p, log_q = (x.double().cpu().log_softmax(-1) for x in (clean, intervened))
    return growth(log_p, log_q).sum(-1)


def growth(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """q − p − p·(log q − log p), where these are alike by its series p·w²·(1/2 + w/6 + w²/24 + w³/120)."""
    p, q, w = log_p.exp(), log_q.exp(), log_q - log_p
    return torch.where(w.abs() < 1e-3, p * w * w * (1 / 2 + w * (1 / 6 + w * (1 / 24 + w / 120))), q - p - p * w)


def assert_same_effect(kl: torch.Tensor, exact: torch.Tensor, delta: float, rounding: float = 1e-5) -> None:
    """A KL formed of float32 logits that are off by `delta` at most.

    |∂KL/∂logit_q| = q − p, so first order is ≤ δ·‖q − p‖₁ ≤ δ·√(2KL) (Pinsker), second order ≤ δ²; `rounding` of KL is
    what the float32 sum itself may lose. Where an effect is worth reporting, 1e-4 of it.
    """
    kl, exact = kl.double().cpu(), exact.double().cpu()
    error = (kl - exact).abs()
    assert (error <= (2 * exact).sqrt() * delta + delta**2 + rounding * exact).all()
    assert (error <= 1e-4 * exact)[exact >= 0.05].all()

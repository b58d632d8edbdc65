"""Tiny random models of many architectures, and full forward passes that owe the engine nothing.

A model has 6 blocks of width 32 over 97 tokens, with Gaussian noise of 0.3 added to every weight: the norms' gains
and biases too, so that no block is close to the identity and no mistake hides behind a gain of 1.
"""

import copy
import functools

import torch
import transformers
from torch import nn

from interventions import Site, record

VOCAB, D_MODEL, N_LAYERS, WINDOW = 97, 32, 6, 8
TOLERANCE = 1e-4
"""Largest logit difference allowed between two float32 ways to one row: logits stay below 10, so 1 000 half-units in the
last place for 6 blocks of a few hundred additions each; about 1e-5 is seen."""

_SMALL = {"vocab_size": VOCAB, "hidden_size": D_MODEL, "num_hidden_layers": N_LAYERS, "num_attention_heads": 4}
_GROUPED = {**_SMALL, "intermediate_size": 64, "num_key_value_heads": 2}
_PLAIN = {**_GROUPED, "num_key_value_heads": 4}
_GPT2 = {"vocab_size": VOCAB, "n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": 4}

_WINDOWED = {**_GROUPED, "head_dim": 8, "sliding_window": WINDOW}
_NEOX = {**_SMALL, "intermediate_size": 64, "max_position_embeddings": 64}
_OPT = {**_SMALL, "ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": D_MODEL}
_MODELS = {
    "llama": ("LlamaConfig", _GROUPED),
    "qwen3": ("Qwen3Config", {**_GROUPED, "head_dim": 8}),
    "gemma3": ("Gemma3TextConfig", {**_WINDOWED, "layer_types": ["sliding_attention", "full_attention"] * 3}),
    "gemma2": ("Gemma2Config", _WINDOWED),
    "mistral": ("MistralConfig", {**_GROUPED, "sliding_window": None}),
    "mistral_window": ("MistralConfig", {**_GROUPED, "sliding_window": WINDOW}),
    "gpt2": ("GPT2Config", {**_GPT2, "n_positions": 64}),
    "gpt_neox": ("GPTNeoXConfig", _NEOX),
    "opt": ("OPTConfig", _OPT),
    "phi": ("PhiConfig", _PLAIN),
    "olmo2": ("Olmo2Config", _GROUPED),
    "stablelm": ("StableLmConfig", _PLAIN),
    "phi3": ("Phi3Config", {**_GROUPED, "pad_token_id": 0}),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            **{"vocab_size": VOCAB, "hidden_size": D_MODEL, "num_layers": N_LAYERS, "num_heads": 4},
            **{"attention_types": [[["global", "local"], 3]], "window_size": WINDOW},
            **{"max_position_embeddings": 64, "intermediate_size": 64},
        },
    ),
    "bloom": ("BloomConfig", {"vocab_size": VOCAB, "hidden_size": D_MODEL, "n_layer": N_LAYERS, "n_head": 4}),
    "mpt": ("MptConfig", {"vocab_size": VOCAB, "d_model": D_MODEL, "n_layers": N_LAYERS, "n_heads": 4}),
    "mamba": ("MambaConfig", {"vocab_size": VOCAB, "hidden_size": D_MODEL, "num_hidden_layers": N_LAYERS}),
    "granite": ("GraniteConfig", {**_GROUPED, "residual_multiplier": 0.5}),
    "opt_post_norm": ("OPTConfig", {**_OPT, "do_layer_norm_before": False}),
    "gpt_neox_sequential": ("GPTNeoXConfig", {**_NEOX, "use_parallel_residual": False}),
    "stablelm_parallel": ("StableLmConfig", {**_PLAIN, "use_parallel_residual": True}),
}
_BLOCKS = {
    **dict.fromkeys(("gpt2", "gpt_neo", "bloom"), "transformer.h"),
    **dict.fromkeys(("gpt_neox", "gpt_neox_sequential"), "gpt_neox.layers"),
    **dict.fromkeys(("opt", "opt_post_norm"), "model.decoder.layers"),
    "mpt": "transformer.blocks",
    "mamba": "backbone.layers",
}
"""where the blocks are, if not at `model.layers`"""
_HUB = {
    "llama": "meta-llama/Llama-2-7b-hf",
    "qwen3": "Qwen/Qwen3-8B",
    "gemma3": "google/gemma-3-1b-it",
    "gemma2": "google/gemma-2-2b",
    "mistral": "mistralai/Mistral-7B-v0.1",
    "mistral_window": "mistralai/Mistral-7B-v0.1",
    "gpt2": "gpt2",
    "gpt_neox": "EleutherAI/pythia-70m",
    "opt": "facebook/opt-125m",
    "phi": "microsoft/phi-1",
    "olmo2": "allenai/OLMo-2-1124-7B",
    "stablelm": "stabilityai/stablelm-base-alpha-3b",
    "phi3": "microsoft/Phi-3-mini-4k-instruct",
    "gpt_neo": "EleutherAI/gpt-neo-125M",
    "bloom": "bigscience/bloom-560m",
}
"""a hub id of each architecture, for TransformerLens"""

_ADDED = {
    **dict.fromkeys(("llama", "qwen3", "mistral", "mistral_window", "phi", "stablelm"), ("self_attn", "mlp")),
    **dict.fromkeys(("gemma3", "gemma2", "olmo2"), ("post_attention_layernorm", "post_feedforward_layernorm")),
    **dict.fromkeys(("gpt2", "gpt_neo"), ("attn", "mlp")),
    **dict.fromkeys(("gpt_neox", "gpt_neox_sequential"), ("attention", "mlp")),
    "opt": ("self_attn", "fc2"),
    "stablelm_parallel": ("self_attn", "mlp"),
}
"""the modules of a block whose outputs are added to the stream, read off each architecture's code; no entry: none are"""
PARALLEL = ("gpt_neox", "phi", "stablelm_parallel")
"""attention and MLP read the same stream: nothing stands between the two"""
REPLAYED = (
    *("llama", "qwen3", "gemma3", "gemma2", "mistral", "mistral_window"),
    *("gpt2", "gpt_neox", "opt", "phi", "olmo2", "stablelm"),
)
"""replay must be exact here: RMSNorm and LayerNorm, sequential and parallel blocks, rotary and learned positions, windows, soft caps"""
HOOKED = ("gpt_neo", "bloom", "mpt", "mamba")
"""replay does not support these: masks ignored, shapes not taken, no keys"""
VARIANTS = ("granite", "opt_post_norm", "gpt_neox_sequential", "stablelm_parallel")
"""replay must be exact here too: settings that change which sites a block has"""
BRIDGED = (*REPLAYED, "gpt_neo", "bloom")
LAYERS = (0, 3, N_LAYERS - 1)
STREAM = ("resid_pre", "resid_post")
LENGTHS = (24, 10, 17, 24, 1)
ROWS = (
    *((0, p) for p in (0, 3, 12, 12, 12, 23, 23)),
    *((1, p) for p in (0, 9, 9)),
    *((2, p) for p in (8, 16)),
    *((3, p) for p in (23, 22, 0, 9, 9)),
    *((4, 0), (4, 0)),
)
"""(prompt, position): first, short of the window, beyond it, last; several edits of one token; a prompt of one token"""
SEVERAL = (
    *((0, (3, 5, 4)), (0, (-1, 0, 4)), (0, (4, -1, 3)), (0, (12, -1, 1)), (0, (23, 0, 12)), (0, (23, -1, -1))),
    *((1, (5, -1, -1)), (1, (9, 8, -1)), (2, (16, -1, 12)), (2, (-1, 7, 15))),
    *((3, (20, 23, -1)), (3, (3, 4, 5)), (3, (-1, -1, 1)), (4, (0, -1, -1)), (4, (-1, -1, 0))),
)
"""(prompt, positions edited at once): in any order, padding anywhere, neighbours, beyond a window, the whole prompt's length"""


@functools.cache
def tiny_model(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32, vocab: int = VOCAB) -> nn.Module:
    """A plain Hugging Face model, shared by tests: copy it (`fresh`) before changing anything."""
    config_class, settings = _MODELS[name]
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


def llama(**settings):
    """A new Llama of 4 blocks with settings of one's own."""
    config = transformers.LlamaConfig(**{**_GROUPED, "num_hidden_layers": 4, **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
        for weight in hf.parameters():
            weight.add_(torch.randn(weight.shape) * 0.3)
    return hf


def fresh(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32, vocab: int = VOCAB) -> nn.Module:
    """A copy of one's own."""
    return copy.deepcopy(tiny_model(name, device, dtype, vocab))


def tokenizer(n: int = VOCAB):
    """A tokenizer of n words, which wrappers want to see. (TransformerLens reloads from a folder one that has a BOS token.)"""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(n)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w0", unk_token="w0")


def bridge(name: str, hf: nn.Module):
    """A TransformerBridge around `hf`, which it changes."""
    from transformer_lens.model_bridge import TransformerBridge

    device = next(hf.parameters()).device
    return TransformerBridge.boot_transformers(_HUB[name], hf_model=hf, tokenizer=tokenizer(), device=str(device))


def traced(hf: nn.Module):
    """An nnsight model around `hf`."""
    import nnsight

    return nnsight.TransformersModel(hf, task="text-generation", tokenizer=tokenizer())


def far_away(hf: nn.Module, folder, revision: str | None = "c0ffee"):
    """An nnsight model of which this machine has the shape alone; what it runs reads the weights from `folder`."""
    import nnsight

    hf.save_pretrained(folder)
    model = nnsight.TransformersModel(str(folder), task="text-generation", tokenizer=tokenizer())
    model._module.config._commit_hash = revision
    return model


@functools.cache
def wrapped(name: str, wrapper: str, device: str = "cpu"):
    """A plain model, a bridge or an nnsight model that tests share: they leave nothing on it."""
    if wrapper == "plain":
        return tiny_model(name, device)
    return bridge(name, fresh(name, device)) if wrapper == "bridge" else traced(fresh(name, device))


@functools.cache
def recorded(name: str, *sites: Site, device: str = "cpu"):
    """A recording of `prompts()` that tests share: they change neither it nor its model."""
    return record(tiny_model(name, device), prompts(), sites)


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


def several() -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt `[row]` and edited positions `[row, edit]` of each row."""
    prompt, position = zip(*SEVERAL, strict=True)
    return torch.tensor(prompt), torch.tensor(position)


def within(position: torch.Tensor, horizon) -> torch.Tensor:
    """Which rows are read at every position that they edit."""
    if horizon == "last" or position.ndim == 1:
        return torch.ones(len(position), dtype=torch.bool)
    start = torch.where(position < 0, 10**6, position).amin(1)
    return position.amax(1) - start < horizon


def edited(recording, site: Site, prompt, position, seed: int = 2) -> torch.Tensor:
    """Activations with noise of 0.01 to 3 times their own size added; `[row, d_model]` or `[row, edit, d_model]`."""
    at = prompt if position.ndim == 1 else prompt[:, None]
    values = recording.activations[site][at, position.clamp(min=0)]
    size = values.float().norm(dim=-1, keepdim=True) / D_MODEL**0.5
    scaled = size * noise(position.numel(), str(values.device), seed=seed).view(values.shape)
    return (values + scaled).to(values.dtype)


def points(name: str) -> tuple[str, ...]:
    """The points that a block of this architecture has."""
    if name not in _ADDED:
        return STREAM
    between = () if name in PARALLEL else ("resid_mid",)
    return ("resid_pre", "attn_out", *between, "mlp_out", "resid_post")


def sites(name: str, layers: tuple[int, ...] = LAYERS) -> list[Site]:
    """Every site of these blocks."""
    return [Site(layer, point) for layer in layers for point in points(name)]


def points_by_turns(*names: str, turn: int = 0) -> list[tuple[str, str]]:
    """Architectures with their points: llama and gpt2 with each, every other one with one point, by turns."""
    found = []
    for i, name in enumerate(names, turn):
        here = points(name)
        found += [(name, point) for point in (here if name in ("llama", "gpt2") else [here[i % len(here)]])]
    return found


def blocks(name: str, hf: nn.Module) -> nn.ModuleList:
    return hf.get_submodule(_BLOCKS.get(name, "model.layers"))


def changed_in(name: str, hf: nn.Module, site: Site, change):
    """A torch hook under which `change` replaces what stands at a site, `[1, pos, d_model]`; for `resid_mid` the same
    change is made to what attention adds. Returns what removes it."""
    block, entered = blocks(name, hf)[site.layer], []

    def before(_, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        if site.point != "resid_pre":
            entered[:] = [hidden]
            return None
        return ((change(hidden), *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": change(hidden)})

    def after(_, __, output):
        whole = output[0] if isinstance(output, tuple) else output
        value = whole.reshape(1, -1, whole.shape[-1])
        if site.point == "resid_mid":
            stream = entered[0] + value
            value = value + (change(stream) - stream)
        else:
            value = change(value)
        value = value.reshape(whole.shape)
        return (value, *output[1:]) if isinstance(output, tuple) else value

    handles = []
    if site.point in ("resid_pre", "resid_mid"):
        handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
    if site.point == "resid_post":
        handles.append(block.register_forward_hook(after))
    elif site.point != "resid_pre":
        path = _ADDED[name][site.point == "mlp_out"]
        handles.append(block.get_submodule(path).register_forward_hook(after))
    return lambda: [handle.remove() for handle in handles]


@torch.no_grad()
def forward_alone(name: str, hf: nn.Module, tokens: list[int], site: Site | None, edits: dict) -> torch.Tensor:
    """Logits `[pos, vocab]` of one full forward pass of one unpadded prompt, by torch hooks set here.

    edits: position -> a vector, or a function of the vector that stands there. No site: the clean pass.
    """

    def change(hidden):
        hidden = hidden.clone()
        for position, edit in edits.items():
            hidden[0, position] = edit(hidden[0, position]) if callable(edit) else edit
        return hidden

    ids = torch.tensor([tokens], device=next(hf.parameters()).device)
    remove = changed_in(name, hf, site, change) if site is not None else lambda: None
    try:
        return hf(input_ids=ids).logits[0]
    finally:
        remove()


def alone(name: str, hf: nn.Module, tokens: list[int], site: Site | None, position: int, edit=None) -> torch.Tensor:
    """`forward_alone` with one edit, `[vocab]` at its position."""
    return forward_alone(name, hf, tokens, site, {position: edit})[position]


def full_logits(name: str, hf: nn.Module, tokens, site, prompt, position, vectors) -> list[torch.Tensor]:
    """`forward_alone` of each row, `[pos, vocab]`; position `[row]` or `[row, edit]`; vectors None: clean."""
    found = []
    for i, p in enumerate(prompt.tolist()):
        at = position[i].reshape(-1).tolist()
        edits = {} if vectors is None else {q: vectors[i].view(len(at), -1)[j] for j, q in enumerate(at) if q >= 0}
        found.append(forward_alone(name, hf, tokens[p], None if vectors is None else site, edits))
    return found


def read(logits: list[torch.Tensor], position: torch.Tensor, horizon) -> torch.Tensor:
    """`[row, vocab]` at the first edited or the last position, or `[row, horizon, vocab]` from there on, nan beyond the end."""
    if horizon == "last":
        return torch.stack([x[-1] for x in logits])
    rows = position.view(len(position), -1).tolist()
    start = [min(q for q in row if q >= 0) for row in rows]
    if horizon == 1:
        return torch.stack([x[q] for x, q in zip(logits, start, strict=True)])
    whole = logits[0].new_full((len(logits), horizon, logits[0].shape[-1]), torch.nan)
    for row, x, q in zip(whole, logits, start, strict=True):
        row[: len(x[q : q + horizon])] = x[q : q + horizon]
    return whole


def all_alone(name: str, hf: nn.Module, tokens, site, prompt, position, vectors, horizon=1) -> torch.Tensor:
    """Full forward passes of each row alone, read where `measure` reads; vectors None: clean."""
    return read(full_logits(name, hf, tokens, site, prompt, position, vectors), position, horizon)


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
    assert torch.equal(kl.isnan(), exact.isnan())
    kl, exact = kl[~exact.isnan()], exact[~exact.isnan()]
    error = (kl - exact).abs()
    assert (error <= (2 * exact).sqrt() * delta + delta**2 + rounding * exact).all()
    assert (error <= 1e-4 * exact)[exact >= 0.05].all()

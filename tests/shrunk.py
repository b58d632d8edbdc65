"""Any configuration class of transformers made tiny, by the names of its settings: width 32, 4 blocks, 97 tokens, windows of 8."""

import dataclasses
import inspect
import re
from typing import Any

import torch
from torch import nn

VOCAB, WIDTH, LAYERS, HEADS, WINDOW, POSITIONS = 97, 32, 4, 4, 8, 64

# The first pattern that fits the whole name of an integer setting decides; none: a number above 64 becomes 32.
_SIZES = [
    (r"index_topk", WINDOW),
    (r".*vocab.*size.*", VOCAB),
    (r".*max_.*position.*|n_positions|n_ctx|max_seq_len|model_max_length|context_length", POSITIONS),
    (r"(num_|n_)?(hidden_|encoder_|decoder_)?(layer|layers|blocks|block)|depth|num_(encoder|decoder)_layers", LAYERS),
    (r".*(key_value|kv).*head.*|linear_num_key_heads|.*kv_heads|multi_query_group_num", 2),
    (r".*head_dim|d_kv|mamba_d_head|kv_channels|.*rope_head_dim|.*nope_head_dim|attn_head_size", 8),
    (r"qk_head_dim", 16),
    (r".*(num|n)_.*heads?|.*attention_heads|num_heads|mamba_n_heads", HEADS),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r".*(per_tok|per_token|topk|top_k|moe_k|experts_topk)", 2),
    (r".*n_group|.*expert_group|.*topk_group|n_groups|mamba_n_groups", 1),
    (r"(num|n|moe_num)_.*shared_experts", 1),
    (r".*experts|moe_num_experts", 4),
    (r".*lora_rank|.*_rank|laurel_rank", 16),
    (r".*window.*|attention_chunk_size|.*local_attention", WINDOW),
    (r".*intermediate.*|.*ffn.*|n_inner|d_ff|mlp_dim|ffn_hidden_size", 2 * WIDTH),
    (
        r".*hidden_size.*|.*hidden_dim|d_model|n_embd|dim|emb_dim|.*embed_dim|embedding_size|.*proj_dim|projection_dim",
        WIDTH,
    ),
    (r"rotary_dim", 4),
    (r"image_size", 16),
    (r"patch_size", 4),
]
_TOKEN = r".*_token_(id|index)|.*_(id|index)"
_INDICES = r".*(_layers|_idxs|_indexes|_indices|_layer_ids|_index)"

_MIXED = {"layer_types": ["conv", "full_attention"] * 2}
_IMAGE_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
# What the names do not say: sizes that must agree with one another, and defaults of None that are read as numbers.
_BY_KIND: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 4},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "hidden_size": WIDTH},
    },
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "falcon_h1": {"mamba_n_heads": 8},
    "gemma3n_text": {
        "intermediate_size": 64,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.9, 0.9, 0.0, 0.0],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": LAYERS, "num_heads": HEADS},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"] * 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": _MIXED,
    "lfm2_moe": _MIXED,
    "longcat_flash": {"qk_head_dim": 16, "num_key_value_heads": HEADS, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        **{"num_key_value_heads": 2, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8},
        **{"indexer_budget": 8, "indexer_compress_ratio": 2},
    },
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8]},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    **{f"{kind}_text": {"rope_parameters": _IMAGE_ROPE} for kind in ("qwen2_vl", "qwen2_5_vl", "glm4v", "glm4v_moe")},
    **{f"{kind}_text": {"rope_parameters": _IMAGE_ROPE} for kind in ("glm46v", "glm_ocr", "paddleocr_vl", "glmga")},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16},
    **{kind: {"is_decoder": True} for kind in ("bert", "roberta", "electra", "camembert", "xlm-roberta")},
}


def _accepted(kind: type) -> set[str]:
    names = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    names |= set(getattr(kind, "attribute_map", {}).values())
    return names | set(inspect.signature(kind.__init__).parameters) - {"self", "kwargs"}


def _number(name: str, value: int) -> int:
    if value < 0:
        return value
    if re.fullmatch(_TOKEN, name):
        return value if value < VOCAB else 80 + value % 16
    for pattern, size in _SIZES:
        if re.fullmatch(pattern, name):
            return size if size == LAYERS and "layer" in name and value else min(value, size)
    return value if value <= 64 else WIDTH


def _list(name: str, value: list, layers: int | None) -> list:
    if value and all(isinstance(x, str) for x in value):
        kinds = list(dict.fromkeys(value))
        return (kinds * LAYERS)[:LAYERS] if len(value) == layers else value
    if re.fullmatch(_INDICES, name) and value and all(isinstance(x, int) for x in value) and len(value) != layers:
        return [x for x in value if x < LAYERS] or [1, LAYERS - 1]
    if layers is not None and len(value) == layers:
        return value[:LAYERS]
    return value


def settings(config: Any) -> dict[str, Any]:
    """The settings of `config` that are to change, for its class or for `for_model`."""
    kind, given, found = type(config), config.to_dict(), {}
    accepted = _accepted(kind)
    layers = getattr(config, "num_hidden_layers", None)
    for name, value in given.items():
        sub = getattr(config, name, None) if isinstance(value, dict) else None
        if hasattr(sub, "to_dict"):
            found[name] = _own(sub) | settings(sub) | ({"model_type": sub.model_type} if sub.model_type else {})
        elif name not in accepted or isinstance(value, (bool, dict)) or value is None:
            continue
        elif isinstance(value, int):
            found[name] = _number(name, value)
        elif isinstance(value, (list, tuple)):
            found[name] = _list(name, list(value), layers)
    if "kv_lora_rank" in given and "num_key_value_heads" in found:
        found["num_key_value_heads"] = found["num_attention_heads"]
    rope = given.get("rope_parameters")
    if isinstance(rope, dict) and "mrope_section" in rope:
        found["rope_parameters"] = {**rope, "mrope_section": [2, 1, 1]}
    if per_layer := given.get("per_layer_config"):
        kinds = given["layer_types"]
        like = [f"{kinds.index(kind):02}" for kind in found["layer_types"]]
        found["per_layer_config"] = {
            f"{i:02}": {
                name: _number(name, value) * (1 + (name == "head_dim")) for name, value in per_layer[key].items()
            }
            for i, key in enumerate(like)
            if key in per_layer
        }
    return {name: value for name, value in found.items() if value != given[name]} | _BY_KIND.get(config.model_type, {})


def _own(config: Any) -> dict[str, Any]:
    """What a configuration within another sets, which may differ from the defaults of its class."""
    simple = (int, float, str, list)
    accepted = _accepted(type(config))
    return {name: value for name, value in config.to_dict().items() if name in accepted and isinstance(value, simple)}


def shrunk(kind: type, **given: Any) -> Any:
    """A tiny configuration of a class. Raises whatever the class raises where that is not possible."""
    return kind(**settings(kind()) | given)


def build(kind: type, model: type[nn.Module], noise: float = 0.2, **given: Any) -> nn.Module:
    """A model with random weights, and noise on each of them so that no gain is 1 and no bias 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = shrunk(kind, **given)
        text = config.sub_configs.get("text_config")
        built = model(config.get_text_config() if text is not None and model.config_class is text else config)
    built.eval().requires_grad_(False)
    for weight in built.parameters():
        if weight.is_floating_point():
            weight.add_(torch.randn(weight.shape, generator=generator) * noise)
    return built

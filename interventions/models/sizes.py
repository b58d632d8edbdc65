"""How much memory a model and its recording take, from its configuration alone.

python -m interventions.models.sizes [CONFIG.JSON or FOLDER ...]        (none: the models of docs/scale.md)
"""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

from interventions.models.blocks import find_blocks
from interventions.models.memory import DEVICE_SHARE

HALF = 2
"""bytes of a bfloat16"""
BYTES = {"bf16": 2.0, "int8": 1 + 2 / 64, "int4": 0.5 + 2 / 64}
"""of a weight of the blocks' linear layers, a scale of two bytes for 64 of them included; other weights stay bfloat16"""
GPUS = (80, 24)
"""GB"""
EXAMPLES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-3-8B": ("LlamaConfig", dict(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=False)),
    "Qwen3-8B": ("Qwen3Config", dict(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=False)),
    "Gemma-2-27B": ("Gemma2Config", dict(
        vocab_size=256000, hidden_size=4608, intermediate_size=36864, num_hidden_layers=46, num_attention_heads=32,
        num_key_value_heads=16, head_dim=128, tie_word_embeddings=True)),
}  # fmt: skip
"""as their makers' config.json files say"""


class Sizes(NamedTuple):
    """Bytes, unless another unit is named; activations and keys are bfloat16."""

    parameters: int
    """numbers, tied ones once"""
    weights: dict[str, int]
    """by the blocks' format, see `BYTES`"""
    keys: int
    """and values, of all blocks, a token"""
    site: int
    """activations at one site, a token"""
    logits: int
    """of 4,096 rows, bfloat16"""
    directions: int
    """of a thousand directions: their logits and final states, float32"""

    @property
    def token(self) -> int:
        """What a recording of one site keeps of a token: keys, values, the site, the last block and the final norm."""
        return self.keys + 3 * self.site

    def tokens(self, gpu: float, weights: str) -> int:
        """Tokens whose recording stays on a GPU of so many bytes, by the default budget; 0 where the weights do not fit."""
        return max(0, int(DEVICE_SHARE * (gpu - self.weights[weights]) / self.token))


def sizes(config: Any) -> Sizes:
    """The sizes of a model of this configuration, whose modules are made without memory (on the meta device)."""
    with torch.device("meta"):
        hf = transformers.AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    _, blocks = find_blocks(hf, getattr(text, "num_hidden_layers", None))
    linear = sum(m.weight.numel() for block in blocks for m in block.modules() if isinstance(m, nn.Linear))
    total = sum(p.numel() for p in hf.parameters())
    d_head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    vocab = hf.get_output_embeddings().weight.shape[0]
    return Sizes(
        total,
        {name: round(HALF * (total - linear) + each * linear) for name, each in BYTES.items()},
        2 * len(blocks) * kv * d_head * HALF,
        text.hidden_size * HALF,
        4096 * vocab * HALF,
        1000 * (vocab + text.hidden_size) * 4,
    )


def table(configs: dict[str, Any]) -> str:
    """The sizes of some models as a table in Markdown, and how many tokens fit beside their weights."""
    every = {name: sizes(config) for name, config in configs.items()}
    lines: list[tuple[str, Sequence[str]]] = [("weights, bf16", [_gb(s.weights["bf16"]) for s in every.values()])]
    lines += [(f"weights, {kind} blocks", [_gb(s.weights[kind]) for s in every.values()]) for kind in ("int8", "int4")]
    lines += [
        ("keys and values of a token", [_kb(s.keys) for s in every.values()]),
        ("activations of a token at one site", [_kb(s.site) for s in every.values()]),
        ("logits of 4,096 rows", [_gb(s.logits) for s in every.values()]),
        ("table of 1,000 directions, float32", [_gb(s.directions) for s in every.values()]),
    ]
    for gpu in GPUS:
        for kind in BYTES:
            fit = [s.tokens(gpu * 1e9, kind) for s in every.values()]
            said = [f"{round(n, -3):,} tokens" if n >= 1000 else "does not fit" for n in fit]
            lines.append((f"recorded on one {gpu} GB GPU, {kind}", said))
    head = f"| |{'|'.join(f' {name} ' for name in every)}|\n|---|{'---|' * len(every)}\n"
    return head + "\n".join(f"| {name} | {' | '.join(cells)} |" for name, cells in lines)


def _gb(n: float) -> str:
    return f"{n / 1e9:.1f} GB"


def _kb(n: float) -> str:
    return f"{n / 1e3:.0f} kB"


def examples() -> dict[str, Any]:
    """Configurations of `EXAMPLES`."""
    return {name: getattr(transformers, kind)(**settings) for name, (kind, settings) in EXAMPLES.items()}


if __name__ == "__main__":
    given = {name: transformers.AutoConfig.from_pretrained(name) for name in sys.argv[1:]}
    print(table(given or examples()))

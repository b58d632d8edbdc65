"""Maps of `transformer_lens.patching` for one IOI pair on the packaged model, and ours cell by cell beside them.

`python -m tests.tl_maps build/tl_maps.pt` makes the file where it is missing (seven minutes on one core), then compares.

Its `get_act_patch_attn_head_by_pos_every` stacks five maps (out = z, q, k, v, pattern), `get_act_patch_block_every` three. Each cell is one
run of the corrupt prompt with the clean activation at that cell (denoising). The functions that they stack are called here with the
same indices, for some blocks where a map has heads: all of them would take half an hour.
"""

import contextlib
import importlib
import io
import itertools
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from interventions.effects import measure
from interventions.metrics import LogitDifference
from interventions.models.causal_model import CausalModel
from interventions.models.loading import load_model
from interventions.recording import record
from interventions.sites import Site

CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPT = "When Mary and John went to the store, Mary gave a drink to"  # S2 replaced by IO
RIGHT, WRONG = " Mary", " John"
LAYERS = (0, 7, 13, 18, 23, 29)
"""blocks of the maps that have heads"""
HEADS = ("z", "q", "k", "v", "pattern")
BLOCKS = ("resid_pre", "attn_out", "mlp_out")
RELATIVE, ABSOLUTE = 1e-3, 1e-4
"""largest difference allowed: a share of the cell's effect m − m_corrupt, or logits, whichever is more"""


def make(path: Path) -> None:
    """Write tokens, answers, both logit differences and the maps: kind -> `[layer, pos, head]` (heads as the model has them) or
    `[layer, pos]`, each value a logit difference."""
    from transformer_lens.model_bridge import TransformerBridge

    patching: Any = importlib.import_module("transformer_lens.patching")
    plain = load_model("smollm2-135m", device="cpu")
    tokenizer: Any = plain.tokenizer
    clean, corrupt = (torch.tensor([tokenizer(text).input_ids]) for text in (CLEAN, CORRUPT))
    right, wrong = (tokenizer(text).input_ids[0] for text in (RIGHT, WRONG))
    bridge: Any = TransformerBridge.boot_transformers(
        "HuggingFaceTB/SmolLM2-135M-Instruct", hf_model=plain.hf, tokenizer=tokenizer
    )

    def difference(logits: Tensor) -> Tensor:
        return logits[0, -1, right] - logits[0, -1, wrong]

    logits, cache = bridge.run_with_cache(clean)
    found: dict[str, Any] = {
        "clean": clean[0],
        "corrupt": corrupt[0],
        "right": right,
        "wrong": wrong,
        "m_clean": difference(logits).item(),
        "m_corrupt": difference(bridge(corrupt)).item(),
        "layers": LAYERS,
    }
    n = clean.shape[1]
    for kind in HEADS:
        n_heads = bridge.cfg.n_key_value_heads if kind in ("k", "v") else bridge.cfg.n_heads
        cells = pd.DataFrame(itertools.product(LAYERS, range(n), range(n_heads)), columns=["layer", "pos", "head"])
        setter = patching.layer_pos_head_vector_patch_setter
        if kind == "pattern":
            cells, setter = cells[["layer", "head", "pos"]], patching.layer_head_pos_pattern_patch_setter
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            values = patching.generic_activation_patch(bridge, corrupt, cache, difference, setter, kind, index_df=cells)
        found[kind] = values.view(len(LAYERS), n, n_heads)
        print(f"{kind}: {len(cells)} cells", flush=True)
    with contextlib.redirect_stderr(io.StringIO()):
        found |= dict(zip(BLOCKS, patching.get_act_patch_block_every(bridge, corrupt, cache, difference), strict=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(found, path)
    print(f"wrote {path}")


def ours(model: CausalModel, theirs: dict[str, Any], kind: str, layer: int, head: int | None) -> Tensor:
    """Logit difference of each position's cell, float32."""
    prompts = [theirs["clean"].tolist(), theirs["corrupt"].tolist()]
    site = Site(layer, kind) if head is None else Site(layer, kind, head=head)
    recording = record(model, prompts, [site])
    position = torch.arange(len(prompts[0]))
    vectors = recording.at(site, torch.zeros_like(position), position)
    metric = LogitDifference([theirs["right"]], [theirs["wrong"]])
    effects = measure(recording, site, torch.ones_like(position), position, vectors, metrics=(metric,), horizon="last")
    return effects["logit_difference"]


def main(path: Path) -> int:
    """Print, for each kind, how far the furthest cell is; 1 if any is too far."""
    if not path.exists():
        with torch.no_grad():
            make(path)
    theirs = torch.load(path)
    model = load_model("smollm2-135m", device="cpu")
    n_bad = 0
    for kind in HEADS + BLOCKS:
        expected = theirs[kind]
        layers = theirs["layers"] if kind in HEADS else range(len(expected))
        heads = range(expected.shape[2]) if kind in HEADS else [None]
        found = torch.stack([torch.stack([ours(model, theirs, kind, i, h) for h in heads], -1) for i in layers])
        found = found.view_as(expected)
        off = (found - expected).abs()
        effect = (expected - theirs["m_corrupt"]).abs()
        bad = off > torch.clamp(RELATIVE * effect, min=ABSOLUTE)
        n_bad += int(bad.sum())
        print(
            f"{kind}: {expected.numel()} cells, largest effect {effect.max():.3g}, largest difference {off.max():.2g}, "
            f"{int(bad.sum())} too far"
        )
    return int(n_bad > 0)


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))

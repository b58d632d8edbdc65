"""`bench_patching.py` stops unless its ways agree on every kind of cell; no test depends on speed."""

import importlib
import json

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from interventions.models.wrapping import wrap
from tests.tiny import fresh

BY_HAND = (
    "by hand: 32 hooked forward passes",
    "by hand: from the patched block up",
    "by hand: from there up, earlier keys kept",
)
LLAMA = "meta-llama/Llama-2-7b-hf"  # as TransformerLens knows it; nothing is fetched
T, LAYERS, HEADS, KV_HEADS, LATER = 13, 6, 4, 2, 5
"""LATER: positions from S2 on"""


@pytest.fixture
def bench(script, monkeypatch):
    def tiny(name, dtype, device):
        words = ["unk", "When", "Mary", "and", "John", "went", "to", "the", "store,", "gave", "a", "drink"]
        split = Tokenizer(WordLevel({word: i + 3 for i, word in enumerate(words)}, unk_token="unk"))
        split.pre_tokenizer = WhitespaceSplit()
        model = wrap(fresh("llama"))
        made.append(model)
        if len(made) == 2:  # the copy that TransformerLens runs
            model.hf.model.layers[-1].mlp.down_proj.weight.mul_(scale)
        model.name = name
        model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=split, eos_token="unk", unk_token="unk")
        return model

    made, scale = [], 1.0
    script.patch(monkeypatch, "bench_patching", load_model=tiny)

    def run(*words, theirs=1.0):
        nonlocal scale
        scale = theirs
        return script("bench_patching", "--device", "cpu", "--model", LLAMA, *words)

    return run


@pytest.mark.bridge
@pytest.mark.long  # runs with TransformerLens 3 (make tl3)
def test_methods_agree_and_their_cells_are_counted(bench):
    run = bench()
    assert run.status == 0, run.err
    rows = json.loads((run.folder / "bench_patching.json").read_text())["rows"]
    cells = {(row["map"], row["way"]): row["cells"] for row in rows}
    for way in BY_HAND:
        assert cells["heads, z", way] == LAYERS * LATER * HEADS
        assert cells["blocks", way] == 3 * LAYERS * LATER
        assert ("heads, z q k v pattern", way) not in cells
    edges = HEADS**2 * LAYERS * (LAYERS - 1) // 2
    assert {cells["edges, q", way] for way in BY_HAND} == {edges}
    theirs = hasattr(importlib.import_module("transformer_lens.patching"), "get_act_patch_direct_path")
    assert cells.get(("edges, q", "TransformerLens")) == (edges if theirs else None)
    assert cells["heads, z", "TransformerLens"] == LAYERS * T * HEADS
    assert cells["heads, z q k v pattern", "TransformerLens"] == LAYERS * T * (3 * HEADS + 2 * KV_HEADS)
    assert cells["blocks", "TransformerLens"] == 3 * LAYERS * T
    assert all(row["seconds"] > 0 and 0 < row["timed"] <= row["cells"] for row in rows)


@pytest.mark.bridge
def test_disagreeing_methods_are_an_error(bench):
    assert bench(theirs=1.01).error.startswith("the ways disagree on")


def test_an_unknown_pair_is_an_error(bench):
    assert "known: S2, early, quarter" in bench("--pairs", "S3").error

"""`bench_replay.py` times every way; no test depends on speed."""

import gc
import json

import pytest

from interventions.models.wrapping import wrap
from interventions.texts.prompts import Texts
from tests.tiny import fresh, tokenizer

WAYS = {
    "replay with KL, 5 edits a position",
    "replay with KL, 1 edit a position",
    "replay with KL and direct effect, 1 edit a position",
    "replay with KL at 8 positions",
    "replay with KL at the last position",
    "replay with KL, attn_out",
    "by hand: cached keys, all blocks, a batch a prompt",
    "by hand: from the recorded stream up, whole prompts, batch 32",
    "dense limit",
    "TransformerBridge hooks, attn_out, batch 16",
    "TransformerBridge hooks, batch 16",
    "nnsight trace, batch 16",
    "one-token context, batch 1 (published)",
}


@pytest.mark.bridge
@pytest.mark.long  # runs with TransformerLens 3 (make tl3)
def test_every_method_is_timed(script, monkeypatch):
    def tiny(name, dtype, device):
        model = wrap(fresh("llama"))
        model.name, model.tokenizer = name, tokenizer()
        return model

    words = [" ".join(f"w{(i * j + j * j * (i // 89)) % 89 + 1}" for j in range(1, 40)) for i in range(1, 210)]
    texts = Texts(words, "words", "0", "", "")
    script.patch(monkeypatch, "bench_replay", load_model=tiny, load_texts=lambda name, n: texts)
    monkeypatch.setattr(gc, "collect", lambda: 0)  # of all that other tests hold, 24 times
    llama = "meta-llama/Llama-2-7b-hf"  # as TransformerLens knows it; nothing is fetched
    run = script("bench_replay", "--device", "cpu", "--model", llama)
    assert run.status == 0, run.err
    read = json.loads((run.folder / "bench_replay.json").read_text())
    for layer in (3, 4):
        rows = [row for row in read["rows"] if row["layer"] == layer]
        assert {row["way"] for row in rows} == WAYS and len(rows) == len(WAYS)
        assert all(row["rows_per_s"] > 0 and row["rows_timed"] > 0 for row in rows)
        assert all((row["dtype"], row["tokens"]) == ("float32", 12) for row in rows)
    assert read["matmul_gflops"]["float32"] > 0 and read["machine"]["threads"] == 1
    assert read["provenance"]["model"] == llama and len(read["provenance"]["weights_sha256"]) == 64
    tables = run.said.split("\n\n")[:2]
    for table in tables:  # one a layer, and no row of another
        shown = [line.split()[2] for line in table.splitlines() if line.split()[:1] == ["float32"]]
        assert "dense limit" in table and len(shown) == len(WAYS) and len(set(shown)) == 1

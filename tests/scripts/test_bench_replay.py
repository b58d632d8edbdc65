import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from interventions.models import wrap
from interventions.texts import Texts
from tests.tiny import fresh, tokenizer

ROOT = Path(__file__).parents[2]
WAYS = {
    "replay with KL, 5 edits a position",
    "replay with KL, 1 edit a position",
    "replay with KL and direct effect, 1 edit a position",
    "replay with KL at 8 positions",
    "replay with KL, attn_out",
    "dense limit",
    "TransformerBridge hooks, attn_out, batch 16",
    "TransformerBridge hooks, batch 16",
    "nnsight trace, batch 16",
    "one-token context, batch 1 (published)",
}


@pytest.fixture(scope="module")
def script():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("bench_replay", ROOT / "scripts" / "bench_replay.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their own annotations
    spec.loader.exec_module(module)
    return module


@pytest.mark.bridge
def test_every_way_is_timed(script, run, monkeypatch, tmp_path):
    """That the comparison runs and says what it compared; how fast decides no test."""

    def tiny(name, dtype, device):
        model = wrap(fresh("llama"))
        model.name, model.tokenizer = name, tokenizer()
        return model

    words = [" ".join(f"w{(i * j + j * j * (i // 89)) % 89 + 1}" for j in range(1, 40)) for i in range(1, 210)]
    monkeypatch.setattr(script, "load_texts", lambda name, n: Texts(words, "words", "0", "", ""))
    monkeypatch.setattr(script, "load_model", tiny)
    monkeypatch.setattr(script, "gc", SimpleNamespace(collect=lambda: 0))  # of all that other tests hold, 24 times
    few = ["--lengths", "12", "--layers", "3", "4", "--rows", "40", "--repeats", "1", "--dtypes", "float32"]
    llama = "meta-llama/Llama-2-7b-hf"  # as TransformerLens knows it; nothing is fetched
    status, said, err = run("--out", tmp_path, "--device", "cpu", "--model", llama, *few, model=False)
    assert status == 0, err
    read = json.loads((tmp_path / "bench_replay.json").read_text())
    for layer in (3, 4):
        rows = [row for row in read["rows"] if row["layer"] == layer]
        assert {row["way"] for row in rows} == WAYS
        assert len(rows) == len(WAYS)
        for row in rows:
            assert row["rows_per_s"] > 0
            assert row["rows_timed"] > 0
            assert (row["dtype"], row["tokens"]) == ("float32", 12)
    assert read["matmul_gflops"]["float32"] > 0
    assert read["machine"]["threads"] == 1
    assert read["provenance"]["model"] == llama
    assert len(read["provenance"]["weights_sha256"]) == 64
    tables = said.split("\n\n")
    assert sum("dense limit" in table for table in tables) == 2
    for table in tables[:2]:  # a table a layer, and no row of another
        shown = [line.split()[2] for line in table.splitlines() if line.split()[:1] == ["float32"]]
        assert len(shown) == len(WAYS)
        assert len(set(shown)) == 1

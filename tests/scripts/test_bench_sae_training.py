"""The bench runs, and says what it compared; what it measures decides nothing here."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from interventions.models import wrap
from interventions.texts import Texts
from tests.tiny import tiny_model, tokenizer

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_sae_training.py"


@pytest.fixture(scope="module")
def script():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("bench_sae_training", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their own annotations
    spec.loader.exec_module(module)
    return module


def test_every_way_is_timed_and_written_down(script, run, monkeypatch, tmp_path):
    words = [" ".join(f"w{(i * j) % 40 + 1}" for j in range(1, 40)) for i in range(1, 80)]
    model = wrap(tiny_model("llama"))
    model.tokenizer = tokenizer()
    monkeypatch.setattr(script, "load_texts", lambda name, n: Texts(words, "words", "0", "", ""))
    monkeypatch.setattr(script, "load_model", lambda name, device: model)
    small = ("--layer", 1, "--d-sae", 64, "--k", 4, "--batch-tokens", 128, "--steps", 2, "--repeats", 1)
    status, said, err = run("--out", tmp_path / "out", *small, "--text-tokens", 1024, model=False)
    assert status == 0, err
    found = json.loads((tmp_path / "out" / "bench_sae_training.json").read_text())["tokens_per_second"]
    assert {"ours, standard", "ours, cosine", "limit: the encoder's product alone"} <= found["cached"].keys()
    assert found["text"].keys() == {"one pass", "six passes", "limit: the model's pass alone"}
    assert all(rate > 0 for rates in found.values() for rate in rates.values())
    assert "ratio to six passes" in said
    again = run("--out", tmp_path / "out", *small, model=False)
    assert again[0] == 2 and "holds another run" in again[2]

"""`bench_sae_training.py` times every way; no test depends on speed."""

import json

from interventions.models.wrapping import wrap
from interventions.texts.prompts import Texts
from tests.tiny import tiny_model, tokenizer


def test_every_method_is_timed_and_saved(script, monkeypatch):
    words = [" ".join(f"w{(i * j) % 40 + 1}" for j in range(1, 40)) for i in range(1, 80)]
    model = wrap(tiny_model("llama"))
    model.tokenizer = tokenizer()
    texts, loads = Texts(words, "words", "0", "", ""), {"load_model": lambda name, device: model}
    script.patch(monkeypatch, "bench_sae_training", load_texts=lambda name, n: texts, **loads)
    run = script("bench_sae_training")
    assert run.status == 0, run.err
    found = json.loads((run.folder / "bench_sae_training.json").read_text())["tokens_per_second"]
    assert {"ours, standard", "ours, cosine", "limit: the encoder's product alone"} <= found["cached"].keys()
    assert found["text"].keys() == {"one pass", "six passes", "limit: the model's pass alone"}
    assert all(rate > 0 for rates in found.values() for rate in rates.values())
    assert "ratio to six passes" in run.said
    assert "holds another run" in script("bench_sae_training").error

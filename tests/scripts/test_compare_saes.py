"""`compare_saes.py` measures what the library measures on the same text."""

import pandas as pd

from diagnostics.dictionary_comparison.result import DictionaryComparison
from diagnostics.dictionary_comparison.run import compare_dictionaries
from interventions import load_model
from interventions.texts.held_out import split
from interventions.texts.prompts import load_texts, tokenize
from sae_models.loading import load_sae


def test_table_matches_the_library(script, given):
    words = ("--data", given / "labelled.csv", "--per-class", 12, "--max-length", 16)
    run = script("compare_saes", *words)
    assert run.status == 0 and "matched" in run.said, run.err
    found = DictionaryComparison.load(run.folder)
    assert {name: some["texts"] for name, some in found.provenance["labelled"].items()} == {"labelled.csv": 36}
    model = load_model(given / "model", device="cpu")
    text = tokenize(load_texts(str(given / "text.txt")), model.tokenizer, max_length=16, n_prompts=24)
    saes = {name: load_sae(given / "saes/1" / name) for name in ("standard", "cosine")}
    by_hand = compare_dictionaries(model, text, saes, min_active=3)
    pd.testing.assert_frame_equal(found.frame, by_hand.frame, rtol=1e-4, atol=1e-6)
    assert found.names == ["standard", "cosine"] and found.tokens == by_hand.tokens


def test_prompts_are_held_out(script, given):
    assert script("compare_saes", "--held-out", 0.5, "--n-prompts", 6).status == 0
    read = load_model(given / "model", device="cpu").tokenizer
    held = {tuple(read(text)["input_ids"]) for text in split(load_texts(str(given / "text.txt")), 0.5)[1].texts}
    assert {tuple(ids) for ids in DictionaryComparison.load(script.folder / "out").tokens} <= held

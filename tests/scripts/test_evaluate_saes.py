"""`evaluate_saes.py` measures what the library measures on the same paragraphs."""

import pandas as pd

from diagnostics.sae_evaluation.result import SAEEvaluation
from diagnostics.sae_evaluation.run import evaluate_saes
from interventions import load_model
from interventions.texts.held_out import split
from interventions.texts.prompts import load_texts, tokenize
from sae_models.loading import load_sae

NAMES = ["1/cosine", "1/standard", "4/standard"]


def test_tables_match_the_library(script, given):
    saes = {name: given / "saes" / name for name in NAMES}
    second = ("--prompts-second", given / "other.txt")
    run = script("evaluate_saes", "--saes", *saes.values(), *second)
    assert run.status == 0 and "KL score" in run.said, run.err
    found = SAEEvaluation.load(run.folder)
    assert found.names == NAMES and found.corpora == ["text.txt", "other.txt"]
    model = load_model(given / "model", device="cpu")
    texts = {name: split(load_texts(str(given / name)), 0.5)[1] for name in found.corpora}
    prompts = {n: tokenize(text, model.tokenizer, max_length=128, n_prompts=8) for n, text in texts.items()}
    by_hand = evaluate_saes(model, prompts, {n: load_sae(path) for n, path in saes.items()}, splice_prompts=4)
    pd.testing.assert_frame_equal(found.frame, by_hand.frame, rtol=1e-5)
    pd.testing.assert_frame_equal(found.latents, by_hand.latents, rtol=1e-5)
    assert found.tokens == by_hand.tokens
    assert "held out (0.5 of it by blake2b" in found.provenance["texts"]["text.txt"]["name"]
    assert "sae_exponents.png" in run.files
    assert "sae_exponents.png" not in script("evaluate_saes", "--overwrite").files  # these SAEs have no exponents


def test_prompts_are_held_out_or_training_text(script, given):
    tokens = {}
    for name, more in (("held", ()), ("training", ("--on-training-text",))):
        run = script(
            "evaluate_saes",
            "--saes",
            given / "saes/1/standard",
            *more,
            "--sink-filter",
            0,
            "--out",
            script.folder / name,
        )
        found = SAEEvaluation.load(run.folder)
        assert found.counted == "all"
        tokens[name] = {tuple(ids) for ids in found.tokens}
    read = load_model(given / "model", device="cpu").tokenizer
    training, held = split(load_texts(str(given / "text.txt")), 0.5)
    parts = {"training": training, "held": held}
    for name, part in parts.items():
        assert tokens[name] <= {tuple(read(text)["input_ids"]) for text in part.texts}

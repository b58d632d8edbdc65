"""`n2g.py` measures what the library measures on the same prompts, and refuses bad input on one line."""

import pandas as pd
import pytest

from diagnostics.token_patterns.result import TokenPatterns
from diagnostics.token_patterns.run import n2g
from interventions import load_model
from interventions.texts.prompts import load_texts, tokenize
from sae_models.loading import load_sae


def test_tables_match_the_library(script, given):
    run = script.finished("n2g")
    found = TokenPatterns.load(run.folder)
    assert "all patterns" in run.said and "forward passes" in run.said
    model = load_model(given / "model", device="cpu")
    text = tokenize(load_texts(str(given / "text.txt")), model.tokenizer, max_length=128, n_prompts=24)
    saes = {"standard": load_sae(given / "saes/2/standard")}
    by_hand = n2g(model, text, saes, latents=3, examples=3, longest=4, min_active=3, pad=1)
    pd.testing.assert_frame_equal(found.frame, by_hand.frame, rtol=1e-4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--latent", 10**6), "latents [1000000] of standard do not exist"),
        (("--test-share", 1), "--test-share"),
        (("--min-active", 10**6), "no latent of standard to ask about"),
        (("--pad", 10**6), "padding token 1000000"),
        (("--saes",), "--saes is empty"),
    ],
)
def test_invalid_input_exits_2_with_one_line(script, words, said):
    assert said in script("n2g", *words).error

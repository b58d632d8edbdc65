"""`disentangle.py` measures what the library measures on the same facts."""

import pandas as pd
import pytest

from diagnostics.disentanglement.result import Disentanglement
from diagnostics.disentanglement.run import disentangle
from interventions import load_model
from sae_models.loading import load_sae


def test_tables_match_the_library(script, given):
    run = script.finished("disentangle")
    found = Disentanglement.load(run.folder)
    assert "known: a " in run.said and "over_random" in run.said
    model, sae = load_model(given / "model", device="cpu"), load_sae(str(given / "saes/2/standard"))
    by_hand = disentangle(
        model, {"standard": sae}, given / "facts.csv", given / "questions.csv", ks=(2, 8), pairs=10, learn=1
    )
    pd.testing.assert_frame_equal(found.frame, by_hand.frame, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--saes",), "no SAE"),
        (("--pairs", 0), "--pairs"),
        (("--facts", "{given}/nothing.csv"), "cannot read"),
        (("--questions", "{given}/labelled.csv"), "no column 'attribute'"),
    ],
)
def test_invalid_input_exits_2_with_one_line(script, given, no_model, words, said):
    assert said in script("disentangle", *(str(word).format(given=given) for word in words)).error


def test_facts_without_questions_are_refused(script, given, no_model):
    words = ("--saes", given / "saes/2/standard", "--facts", given / "facts.csv")
    assert "belong together" in script("disentangle", *words, small=False).error

"""`causal_dimension.py` measures what the library measures on the same prompts."""

import pandas as pd
import pytest

from diagnostics.causal_dimension.result import CausalDimension
from diagnostics.causal_dimension.run import causal_dimensionality
from interventions import Site, load_model
from interventions.texts.prompts import load_texts, tokenize


def test_tables_match_the_library(script, given):
    run = script.finished("causal_dimension")
    found = CausalDimension.load(run.folder)
    assert "effective_rank" in run.said and "span of k directions" in run.said
    assert set(found.spans["k"]) == {2, 8} and set(found.spans["layer"]) == {2}
    model = load_model(given / "model", device="cpu")
    text = tokenize(load_texts(str(given / "text.txt")), model.tokenizer, max_length=128, n_prompts=24)
    by_hand = causal_dimensionality(model, text, layers=[2, 4], tokens=20)
    pd.testing.assert_frame_equal(found.frame, by_hand.frame, rtol=1e-4)


def test_sketches_are_measured_at_the_sites_given(script):
    run = script("causal_dimension", "--saes", "--sites", "3.mlp_out", "resid_pre", "--layers", 1, "--directions", 6)
    assert run.status == 0, run.err
    found = CausalDimension.load(run.folder)
    assert found.provenance["sites"] == ["1.resid_pre", "3.mlp_out"]
    assert set(found.spectrum.query("matrix == 'fisher'")["index"]) == set(range(6))
    assert Site.parse("3.mlp_out").point in set(found.frame["point"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--sites", "2.resid_psot"), "no site 'resid_psot'"),
        (("--directions", 8), "shares of the trace need every direction"),
        (("--tokens", 0), "--tokens"),
        (("--layers",), "--layers"),
    ],
)
def test_invalid_input_exits_2_with_one_line(script, no_model, words, said):
    assert said in script("causal_dimension", *words).error

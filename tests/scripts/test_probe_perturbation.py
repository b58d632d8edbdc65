"""`probe_perturbation.py` measures what the library measures on the same texts."""

import pandas as pd
import pytest

from diagnostics.probe_perturbation.result import ProbePerturbation
from diagnostics.probe_perturbation.run import perturb_probes
from interventions import load_model
from sae_models.loading import load_sae


def test_tables_match_the_library(script, given):
    run = script.finished("probe_perturbation")
    found = ProbePerturbation.load(run.folder)
    assert "targeted probe perturbation" in run.said and "spurious correlation removal" in run.said
    assert set(found.frame["protocol"]) == {"tpp", "scr"} and set(found.frame["k"]) == {0, 1, 4}
    model, sae = load_model(given / "model", device="cpu"), load_sae(str(given / "saes/1/standard"))
    by_hand = perturb_probes(
        model,
        str(given / "labelled.csv"),
        {"standard": sae},
        crossed=str(given / "crossed.csv"),
        ks=(1, 4),
        seeds=2,
        per_class=12,
    )
    pd.testing.assert_frame_equal(found.frame, by_hand.frame, rtol=1e-4)
    pd.testing.assert_frame_equal(found.held_out, by_hand.held_out)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--data", "--crossed"), "no data"),
        (("--test-share", 1), "--test-share"),
        (("--data", "nothing.csv"), "no labelled texts"),
    ],
)
def test_invalid_input_exits_2_with_one_line(script, no_model, words, said):
    assert said in script("probe_perturbation", *words).error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--data", "{given}/crossed.csv", "--crossed", "{given}/labelled.csv"), "expected four"),
        (("--data", "sentiment", "--crossed"), "expected three or more"),
    ],
)
def test_wrong_numbers_of_classes_exit_2(script, given, words, said):
    assert said in script("probe_perturbation", *(str(word).format(given=given) for word in words)).error

"""`ablate_features.py` measures what the library measures on the same texts."""

import pandas as pd

from diagnostics.concept_ablation.concepts import labelled_concepts
from diagnostics.concept_ablation.result import FeatureAblation
from diagnostics.concept_ablation.run import feature_ablation
from interventions import load_model
from interventions.texts.labelled import load_labelled
from sae_models.loading import load_sae


def test_table_matches_the_library(script, given):
    found = FeatureAblation.load(script.finished("ablate_features").folder)
    assert found.concepts == [("labelled.csv", "b"), ("labelled.csv", "c")] and found.saes == ["standard"]
    model, sae = load_model(given / "model", device="cpu"), load_sae(given / "saes/4/standard")
    labelled = load_labelled(str(given / "labelled.csv"), per_class=160)
    texts = labelled_concepts(labelled, model.tokenizer, classes=["b", "c"], per_class=40)
    by_hand = feature_ablation(
        model, {"labelled.csv": texts}, {"standard": sae}, counts=(1, 3), reads=3, sink_filter=None
    )
    pd.testing.assert_frame_equal(found.frame, by_hand.frame, check_dtype=False)
    b = found.provenance["texts"]["labelled.csv"]["concepts"]["b"]
    assert b["measuring"] == [20, 20] and b["targets"][0].strip() == "w91"

"""`probe_saes.py` measures what the library measures on the same texts."""

import pandas as pd

from diagnostics.sparse_probing.result import SparseProbing
from diagnostics.sparse_probing.run import probe_saes
from interventions import load_model
from interventions.texts.labelled import load_labelled
from sae_models.loading import load_sae


def test_tables_match_the_library(script, given):
    run = script.finished("probe_saes")
    assert "probe loss" in run.said
    found = SparseProbing.load(run.folder)
    assert found.names == ["standard"] and found.datasets == ["labelled.csv"]
    texts = load_labelled(str(given / "labelled.csv"), per_class=10)
    saes = {"standard": load_sae(given / "saes/1/standard")}
    by_hand = probe_saes(
        load_model(given / "model", device="cpu"), texts, saes, ks=(1, 3), seeds=2, shuffles=9, refits=3, per_class=10
    )
    pd.testing.assert_frame_equal(found.frame, by_hand.frame, rtol=1e-5)
    pd.testing.assert_frame_equal(found.held_out, by_hand.held_out, rtol=1e-5)
    assert found.provenance["texts"]["labelled.csv"]["counts"] == {"a": 10, "b": 10, "c": 10}
    assert "max_length was 128, is 6" in script("probe_saes", "--max-length", 6, "--out", run.folder).error

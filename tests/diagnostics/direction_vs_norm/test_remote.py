"""The diagnostic on a model that runs elsewhere, end to end."""

import pandas as pd

from diagnostics.direction_vs_norm.run import direction_norm
from interventions import wrap
from tests.tiny import far_away, fresh, prompts


def test_effects_of_a_remote_model_equal_local_ones(tmp_path):
    hf, texts = fresh("llama"), prompts((9, 11, 13, 8, 12, 10, 9, 14, 11, 10, 12, 9))
    there = wrap(far_away(hf, tmp_path), remote="local")
    mine, theirs = (
        direction_norm(model, texts, layers=(2,), pairs=10, context="both", path="hooks") for model in (hf, there)
    )
    pd.testing.assert_frame_equal(theirs.frame, mine.frame, rtol=0, atol=1e-5)
    assert len(mine.frame) > 100 and mine.frame.kl.max() > 0.1
    assert theirs.provenance["weights_sha256"] == f"{tmp_path}@c0ffee" and theirs.provenance["wrapper"] == "nnsight"

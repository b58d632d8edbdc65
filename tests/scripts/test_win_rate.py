"""`win_rate.py` ablates as `ablate_projections.py` does, and reports the same on its own run as on a finished one."""

import pandas as pd
import pytest

from diagnostics.projections.result import ProjectionEffects
from diagnostics.projections.run import projection_effects
from interventions import load_model
from interventions.texts.prompts import load_texts, tokenize
from sae_models.loading import load_sae


def test_tables_match_the_library_and_a_report_from_results(script, given):
    saes = {"standard": given / "saes/2/standard", "cosine": given / "saes/5/cosine"}
    run = script("win_rate", "--saes", *saes.values())
    assert run.status == 0 and "true margin > 0" in run.said, run.err
    found = ProjectionEffects.load(run.folder)
    assert found.saes == list(saes) and found.provenance["context"] == ["in_place", "single_token"]
    model = load_model(given / "model", device="cpu")
    text = tokenize(load_texts(str(given / "text.txt")), model.tokenizer, max_length=128, n_prompts=24)
    by_hand = projection_effects(
        *(model, text, {name: load_sae(path) for name, path in saes.items()}), latents=4, tokens_per_latent=30,
        detail=0.3, single_token_share=1.0, context="both",
    )  # fmt: skip
    pd.testing.assert_frame_equal(found.frame, by_hand.frame)
    other = script(
        "win_rate", "--saes", *saes.values(), "--draws", 12
    )  # the same run with another number of simulations
    assert other.status == 2 and "holds another result (win_rate.json)" in other.err and other.files == run.files
    again = script("win_rate", "--results", run.folder, "--draws", 10, "--out", script.folder / "report", small=False)
    one, two = (pd.read_parquet(folder / "win_rate.parquet") for folder in (run.folder, again.folder))
    pd.testing.assert_frame_equal(one, two)


def test_ablations_alone_report_the_norm_exponent(script):
    run = script.finished("ablate_projections")
    assert "norm exponent" in run.said and len(ProjectionEffects.load(run.folder).frame)


def test_invalid_results_exit_2_with_one_line(script, given, tmp_path):
    for words, message in (
        ((tmp_path / "none",), "holds no projections result"),
        ((tmp_path, "--latents", 3), "leave out --latents"),
        ((given, given), "is given twice"),
    ):
        assert message in script("win_rate", "--results", *words, small=False).error


@pytest.mark.model
def test_kinds_name_packaged_saes_at_each_layer(script, no_model):
    """The SAEs are loaded before the model, so reaching the model means that all were found."""
    for words in (("--layers", 7, 22), ("--model", "smollm2-135m-layernorm", "--saes", "cosine", "--layers", 15)):
        with pytest.raises(pytest.fail.Exception, match="the model was loaded"):
            script("win_rate", *words, "--device", "cpu", small=False)

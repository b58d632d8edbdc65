"""`win_rate.py` ablates as `ablate_projections.py` does, and judges its own run as it judges a finished one."""

import pandas as pd
import pytest

from diagnostics.projections.result import ProjectionEffects
from diagnostics.projections.run import projection_effects
from interventions import load_model
from interventions.texts.prompts import load_texts, tokenize
from sae_models.loading import load_sae


def test_its_tables_are_those_of_the_library_and_of_the_finished_run(script, given):
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
    other = script("win_rate", "--saes", *saes.values(), "--draws", 12)  # the same run, judged in another way
    assert other.status == 2 and "holds another result (win_rate.json)" in other.err and other.files == run.files
    again = script("win_rate", "--results", run.folder, "--draws", 10, "--out", script.folder / "report", small=False)
    one, two = (pd.read_parquet(folder / "win_rate.parquet") for folder in (run.folder, again.folder))
    pd.testing.assert_frame_equal(one, two)


def test_ablations_alone_say_the_exponent(script):
    run = script.finished("ablate_projections")
    assert "norm exponent" in run.said and len(ProjectionEffects.load(run.folder).frame)


def test_results_that_cannot_be_used_are_refused(script, given, tmp_path):
    for words, message in (
        ((tmp_path / "none",), "holds no projections result"),
        ((tmp_path, "--latents", 3), "leave out --latents"),
        ((given, given), "is given twice"),
    ):
        assert message in script("win_rate", "--results", *words, small=False).error


@pytest.mark.model
def test_kinds_are_those_of_the_packaged_zoo_at_each_layer(script, no_model):
    """The model is loaded after them: reaching it means that all were found."""
    for words in (("--layers", 7, 22), ("--model", "smollm2-135m-layernorm", "--saes", "cosine", "--layers", 15)):
        with pytest.raises(pytest.fail.Exception, match="the model was loaded"):
            script("win_rate", *words, "--device", "cpu", small=False)

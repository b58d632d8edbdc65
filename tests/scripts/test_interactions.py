"""`interactions.py` measures what the library measures, each part in its own folder."""

import json

from diagnostics.latent_edits.concentration import Concentration
from diagnostics.latent_edits.interactions import Interactions, interactions
from diagnostics.latent_edits.polarities import PolarityEffects, polarity_effects
from interventions import load_model
from interventions.texts.prompts import load_texts, tokenize
from sae_models.loading import load_sae


def test_every_part_has_a_folder_and_pairs_match_the_library(script, given):
    run = script.finished("interactions")
    for part in ("pairs", "matrix", "concentration", "steering", "substitution", "sparsity"):
        names = {path.name for path in (run.folder / part).iterdir()}
        assert {"run.json", "tokens.npy"} < names and any(name.endswith(".png") for name in names)
        assert f"into {run.folder / part}" in run.said
    model = load_model(given / "model", device="cpu")
    text = tokenize(load_texts(str(given / "text.txt")), model.tokenizer, max_length=128, n_prompts=24)
    sae = load_sae(given / "saes/1/standard")
    by_hand = interactions(model, text, {"standard": sae}, n_tokens=14, per_token=3, min_tokens=2)
    assert Interactions.load(run.folder / "pairs").frame.equals(by_hand.frame)
    kept = json.loads((run.folder / "concentration/causal_concentration.json").read_text())
    assert kept["provenance"]["n_tokens"] == 14 and len(Concentration.load(run.folder / "concentration").frame)


def test_polarities_match_the_library(script, given):
    words = ("--parts", "polarity", "--tokens-per-latent", 2, "--latents", 3)
    refused = script("interactions", *words, "--out", script.folder / "unsigned")
    assert "no latent of standard has both polarities" in refused.error
    run = script("interactions", *words, "--saes", given / "saes/2/abstopk", "--out", script.folder / "signed")
    assert run.status == 0, run.err
    model = load_model(given / "model", device="cpu")
    text = tokenize(load_texts(str(given / "text.txt")), model.tokenizer, max_length=128, n_prompts=24)
    by_hand = polarity_effects(
        model, text, {"abstopk": load_sae(given / "saes/2/abstopk")}, latents=3, tokens_per_latent=2
    )
    assert PolarityEffects.load(run.folder / "polarity").frame.equals(by_hand.frame)

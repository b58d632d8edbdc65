"""`train_sae.py` trains what the library trains on the same text."""

import json

import torch

from interventions import Site, load_model
from interventions.texts.held_out import split
from interventions.texts.prompts import load_texts, tokenize
from sae_models import load_sae
from sae_models.architectures import named
from sae_models.training.from_model import SAESpec, train_saes
from sae_models.training.trainer import Recipe
from tests.tiny import D_MODEL


def test_saes_match_the_library(script, given):
    words = ("--layers", 1, 3, "--saes", "standard", "cosine:topk", "--sites", "resid_post", "mlp_out", "2.resid_pre")
    run = script("train_sae", *words, "--seeds", 0, 5, "--log-every", 4)
    assert run.status == 0, run.err
    places = {"1": Site(1), "3": Site(3), "1.mlp_out": Site(1, "mlp_out"), "3.mlp_out": Site(3, "mlp_out")}
    places["2.resid_pre"] = Site(2, "resid_pre")
    wanted = {
        f"{where}/{name.replace(':', '-')}{'-seed5' if seed else ''}": SAESpec(
            site, named(name), Recipe(d_sae=48, k=4, lr=0.01, seed=seed)
        )
        for where, site in places.items()
        for name in ("standard", "cosine:topk")
        for seed in (0, 5)
    }
    weights = {f"{name}/{file}" for name in wanted for file in ("cfg.json", "sae_weights.safetensors")}
    assert run.files.keys() == {"run.json", "metrics.jsonl", "manifest.json", *weights}
    assert "wrote 20 SAEs into" in run.said and run.said.count("FVE") == 20
    texts, _ = split(load_texts(str(given / "text.txt")), 0.1)
    model = load_model(given / "model", device="cpu")
    prompts = tokenize(texts, model.tokenizer, max_length=20, seed=0)
    library = train_saes(model, prompts, wanted, tokens=330, batch_tokens=32, buffer_tokens=96)
    x = 30 * torch.randn(20, D_MODEL, generator=torch.Generator().manual_seed(0))
    for name, sae in library.items():
        ours = load_sae(run.folder / name)
        assert torch.equal(ours(x), sae(x)) and ours.encode(x).any()
        assert ours.hook_name == wanted[name].site.hook_name
    steps = [json.loads(line)["step"] for line in run.files["metrics.jsonl"].splitlines()]
    assert steps == [n for n in (4, 8, 10) for _ in wanted]


def test_sae_of_an_unknown_run_is_not_replaced(script):
    (script.folder / "out/1").mkdir(parents=True)
    other = script.finished("train_sae").folder / "1/standard"
    (script.folder / "out/1/standard").symlink_to(other)
    refused = script("train_sae")
    assert "has 1/standard, and no run.json that says which run wrote it; it is left as it is" in refused.error
    assert (script.folder / "out/1/standard").is_symlink()


def test_options_reach_recipe_and_stream(script):
    words = ("--saes", "aligned", "--layer-norm", "--held-out", 0, "--sink-filter", 0, "--lr-scale", 0.5)
    run = script("train_sae", *words, "--seed", 3, "--order-seed", 2)
    sae = load_sae(run.folder / "1/aligned-seed3")
    assert sae.normalise.kind == "layer_norm" and (sae.alignment() - 1).abs().max() < 1e-6
    assert (sae.metadata["recipe"]["lr_scale"], sae.metadata["recipe"]["seed"]) == (0.5, 3)
    assert (sae.metadata["seed"], sae.metadata["sink_filter"]) == (2, None)
    assert sae.d_sae == 48 and sae.metadata["tokens"] == 320

"""The command from its options to its files, on a tiny model and a small SAE in a folder."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from diagnostics.concentration import Concentration
from diagnostics.latent_pairs import Interactions, interactions
from interventions import Site, load_model, record
from interventions.texts import load_texts, tokenize
from sae_models.architectures import build, named
from sae_models.loading import load_sae
from sae_models.saving import save_sae
from tests.tiny import prompts

SCRIPT = Path(__file__).parents[2] / "scripts" / "interactions.py"
SMALL = (
    "--n-tokens", 14, "--per-token", 3, "--matrix-latents", 5, "--min-tokens", 2, "--latents", 8, "--tokens-per-latent", 2,
    "--coefficients", 1, 4, "--ahead", 2, "--held-out", 0,
)  # fmt: skip


@pytest.fixture(scope="module")
def script():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("interactions_command", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their own annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sae(given) -> Path:
    """A folder of an SAE of block 1."""
    model = load_model(given / "model", device="cpu")
    recording = record(model, prompts((20, 20, 20)), [Site(1)], keep_cache=False)
    x = recording.activations[Site(1)].flatten(0, 1)
    found = build(
        named("standard:topk"),
        40,
        5,
        x,
        torch.Generator().manual_seed(0),
        model_name="model",
        hook_name=Site(1).hook_name,
    )
    return save_sae(found, given / "saes" / "standard")


@pytest.mark.filterwarnings("ignore:an interval from")
def test_every_part_writes_its_folder_and_says_what_the_library_says(run, sae, given, tmp_path):
    parts = ("pairs", "matrix", "concentration", "steering", "substitution", "sparsity")
    status, said, errors = run("--saes", sae, "--out", tmp_path / "out", *SMALL)
    assert (status, "error" in errors) == (0, False), errors
    for part in parts:
        names = {path.name for path in (tmp_path / "out" / part).iterdir()}
        assert {"run.json", "tokens.npy"} < names and any(name.endswith(".png") for name in names)
        assert str(tmp_path / "out" / part) in said
    model = load_model(given / "model", device="cpu")
    text = tokenize(load_texts(str(given / "text.txt")), model.tokenizer, max_length=128, n_prompts=24, seed=0)
    own = interactions(model, text, {"standard": load_sae(sae)}, n_tokens=14, per_token=3, min_tokens=2)
    assert Interactions.load(tmp_path / "out" / "pairs").frame.equals(own.frame)
    kept = json.loads((tmp_path / "out" / "concentration" / "causal_concentration.json").read_text())
    assert kept["provenance"]["n_tokens"] == 14 and len(Concentration.load(tmp_path / "out" / "concentration").frame)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--parts", "pears"), "known: pairs, matrix"),
        (("--horizon", 4), "Unrecognized options: --horizon"),
        (("--batch-rows", 4), "Unrecognized options: --batch-rows"),
        (("--unit", "z"), "--unit z"),
        (("--ahead", 0), "--ahead 0; expected 1 or more"),
        (("--per-token", 1), "--per-token 1; expected 2 or more"),
        (("--coefficients", 1, 2, 1), "each once"),
        (("--latent", 3, -1), "numbered from 0"),
        (("--saes", "nowhere/at/all"), "nowhere"),
    ],
    ids=["part", "horizon", "batch", "unit", "ahead", "per-token", "coefficients", "latent", "sae"],
)
def test_what_cannot_serve_is_said_on_one_line_and_before_the_model(run, sae, tmp_path, monkeypatch, words, said):
    monkeypatch.setattr("diagnostics.inputs.load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    first = () if "--saes" in words else ("--saes", sae)
    status, _, errors = run(*first, "--out", tmp_path / "out", *words)
    assert status == 2 and said in errors and len(errors.strip().splitlines()) == 1

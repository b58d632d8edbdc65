"""`train_zoo.py` trains, prints and packages SAEs."""

import pytest

from interventions.models.names import DEFAULT_MODEL
from interventions.models.wrapping import wrap
from interventions.texts.prompts import Texts
from sae_models import load_sae
from sae_models.training import zoo
from sae_models.training.recipe import Recipe
from tests.tiny import tiny_model, tokenizer


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A zoo of one SAE of a tiny model, in its own cache folder."""
    words = Texts([" ".join(f"w{(i * j) % 40 + 1}" for j in range(1, 30)) for i in range(1, 60)], "words", "0", "", "")
    model = wrap(tiny_model("llama"))
    model.tokenizer = tokenizer()
    monkeypatch.setenv("MECHDIAG_CACHE", str(tmp_path / "cache"))
    for name, value in {
        "ZOO": ("1/standard",),
        "PACKAGED": ("1/standard",),
        "LAYERS": (1,),
        "RECIPE": Recipe(d_sae=24, k=4),
        "BATCH": 64,
        "load_texts": lambda name: words,
        "load_model": lambda name, device=None: model,
    }.items():
        monkeypatch.setattr(zoo, name, value)


def test_zoo_is_trained_printed_and_packaged(script, small, tmp_path):
    run = script("train_zoo", "--package", tmp_path / "package")
    assert run.status == 0, run.err
    assert (
        "1/standard" in run.said
        and "FVE 0." in run.said
        and f"1 SAE in {zoo.zoo_folder()}" in " ".join(run.said.split())
    )
    assert load_sae(tmp_path / "package" / DEFAULT_MODEL / "1/standard").d_sae == 24
    again = script("train_zoo")  # nothing left to train
    assert again.status == 0 and again.said.split("\n")[:2] == run.said.split("\n")[:2]

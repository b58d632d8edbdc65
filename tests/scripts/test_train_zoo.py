"""The command around the zoo: what it trains, prints and packages, and what it refuses on one line."""

import importlib.util
import sys
from pathlib import Path

import pytest

from diagnostics import zoo
from interventions.loading import DEFAULT_MODEL
from interventions.models import wrap
from interventions.texts import Texts
from sae_models import load_sae
from sae_models.training import Recipe
from tests.tiny import tiny_model, tokenizer

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_zoo.py"


@pytest.fixture(scope="module")
def script():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("train_zoo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their own annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A zoo of one SAE of a tiny model, in a cache folder of its own."""
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


def test_it_trains_prints_and_packages(run, small, tmp_path):
    status, said, err = run("--tokens", 640, "--package", tmp_path / "package", model=False)
    assert status == 0, err
    assert "1/standard" in said and "FVE 0." in said and f"1 SAEs in {zoo.zoo_folder()}" in said
    assert load_sae(tmp_path / "package" / DEFAULT_MODEL / "1/standard").d_sae == 24
    again = run("--tokens", 640, model=False)  # nothing left to train
    assert again[0] == 0 and again[1] == "\n".join(said.split("\n")[:2]) + "\n"


def test_what_is_not_in_the_zoo_is_refused_on_one_line(run):
    status, said, err = run("--only", "tiger", model=False)
    assert (status, said) == (2, "") and err.startswith("error: nothing in the zoo is called tiger; known: ")
    assert err.count("\n") == 1

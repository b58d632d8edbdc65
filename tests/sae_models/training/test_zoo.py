"""The zoo: which parts there are, that a part is trained as the whole is, and that the packaged SAEs load and are good."""

import json
import os
import shutil

import pytest
import torch

from interventions import load_model, record
from interventions.errors import MechdiagError
from interventions.models.names import DEFAULT_MODEL
from interventions.models.wrapping import wrap
from interventions.texts.held_out import split
from interventions.texts.prompts import Texts, load_texts, tokenize
from sae_models import load_sae
from sae_models.belonging import sae_site
from sae_models.loading import PACKAGED_ZOO
from sae_models.training import zoo
from sae_models.training.recipe import Recipe
from tests.tiny import tiny_model, tokenizer


def test_names_are_unique_and_packaged_saes_come_first():
    assert len(set(zoo.ZOO)) == len(zoo.ZOO) == 19
    assert zoo.ZOO[:6] == zoo.PACKAGED


@pytest.mark.parametrize(
    ("only", "n"),
    [((), 19), (("15/cosine",), 1), (("cosine",), 5), (("7",), 5), (("cosine-seed1", "22/bypass"), 2), (("15",), 9)],
)
def test_names_choose_a_part_of_the_zoo(only, n):
    found = zoo.chosen(only)
    assert len(found) == n and found == [name for name in zoo.ZOO if name in found]


def test_unknown_names_raise():
    with pytest.raises(MechdiagError, match="nothing in the zoo is called tiger, 16; known: 7/standard, "):
        zoo.chosen(["tiger", "15", "16"])


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A zoo of a tiny model, in a cache folder of its own."""
    words = Texts(
        [" ".join(f"w{(i * j) % 40 + 1}" for j in range(1, 30)) for i in range(1, 60)], "words", "0" * 64, "", ""
    )
    model = wrap(tiny_model("llama"))
    model.tokenizer = tokenizer()
    monkeypatch.setenv("MECHDIAG_CACHE", str(tmp_path))
    for name, value in {
        "ZOO": ("1/standard", "3/cosine", "3/cosine-seed1"),
        "PACKAGED": ("3/cosine",),
        "LAYERS": (1, 3),
        "RECIPE": Recipe(d_sae=24, k=4),
        "BATCH": 64,
        "load_texts": lambda name: words,
        "load_model": lambda name, device=None: model,
    }.items():
        monkeypatch.setattr(zoo, name, value)
    return tmp_path


def weights(name: str) -> bytes:
    return (zoo.zoo_folder() / name / "sae_weights.safetensors").read_bytes()


def test_training_a_part_equals_training_the_whole_zoo(small):
    assert zoo.train_zoo(tokens=640) == list(zoo.ZOO)
    whole = {name: weights(name) for name in zoo.ZOO}
    assert len(set(whole.values())) == 3
    shutil.rmtree(zoo.zoo_folder())
    assert zoo.train_zoo(["1"], tokens=640) == ["1/standard"]
    assert not (zoo.zoo_folder() / "3").exists()
    zoo.train_zoo(tokens=640)  # the rest
    assert {name: weights(name) for name in zoo.ZOO} == whole
    assert not list((small / "zoo" / "runs").iterdir())
    manifest = json.loads((zoo.zoo_folder() / "3/cosine/manifest.json").read_text())
    assert manifest["stream"]["tokens"]["emitted"] >= 640
    assert load_sae(f"{DEFAULT_MODEL}/3/cosine-seed1").hook_name == "blocks.3.hook_resid_post"


def test_training_a_part_resumes_an_interrupted_run(small, monkeypatch):
    class Stopped(Exception):
        pass

    steps = []

    def stop(n, total, said):
        steps.append(n)
        if sum(steps) == 7:
            raise Stopped

    with pytest.raises(Stopped):
        zoo.train_zoo(tokens=640, progress=stop)
    steps.clear()
    assert zoo.train_zoo(["3/cosine"], tokens=640, progress=lambda n, total, said: steps.append(n)) == ["3/cosine"]
    assert steps[0] == 7 and sum(steps) == 10  # and the others are there with it
    monkeypatch.setattr(zoo, "train_saes", None)
    zoo.train_zoo(tokens=640)


def test_kill_while_results_are_moved_loses_no_training(small, monkeypatch):
    real, put = zoo._put, []

    def once(source, target):
        if put:
            raise OSError("killed")
        put.append(target)
        real(source, target)

    monkeypatch.setattr(zoo, "_put", once)
    with pytest.raises(OSError, match="killed"):
        zoo.train_zoo(tokens=640)
    monkeypatch.setattr(zoo, "_put", real)
    steps = []
    zoo.train_zoo(tokens=640, progress=lambda n, total, said: steps.append(n))
    assert steps == [] and all((zoo.zoo_folder() / name / "manifest.json").exists() for name in zoo.ZOO)


@pytest.mark.parametrize("label", [None, "", "[]", "{"])
def test_foreign_folder_is_left_unchanged(small, label):
    place = zoo.zoo_folder() / "3/cosine"
    place.mkdir(parents=True)
    (place / "sae_weights.safetensors").write_bytes(b"theirs")
    if label is not None:
        (place / zoo.LABEL).write_text(label)
    before = {path: path.read_bytes() for path in place.iterdir()}
    with pytest.raises(MechdiagError, match=r"3/cosine has no zoo\.json that can be read: .* is left as it is"):
        zoo.train_zoo(["3/cosine"], tokens=640)
    assert {path: path.read_bytes() for path in place.iterdir()} == before


def test_kill_during_replacement_leaves_one_sae(small, monkeypatch):
    zoo.train_zoo(["3/cosine"], tokens=640)
    replace, calls = os.replace, []

    def killed(*args):
        calls.append(args)
        if str(args[1]).endswith(("3/cosine", "cosine.former")):
            raise OSError("killed")
        replace(*args)

    with monkeypatch.context() as patched, pytest.raises(OSError, match="killed"):
        patched.setattr(os, "replace", killed)
        zoo.train_zoo(["3/cosine"], tokens=704)
    before = weights("3/cosine")
    zoo.train_zoo(["3/cosine"], tokens=704)
    assert weights("3/cosine") != before
    assert not list((zoo.zoo_folder() / "3").glob("*.*"))


def test_packaging_untrained_saes_raises(small, tmp_path):
    with pytest.raises(MechdiagError, match="3/cosine are not trained yet"):
        zoo.package_zoo(tmp_path / "package")


def test_saes_are_trained_again_only_if_settings_differ(small, monkeypatch):
    zoo.train_zoo(["cosine"], tokens=640)
    before = weights("3/cosine")
    real = zoo.train_saes
    monkeypatch.setattr(zoo, "train_saes", None)
    zoo.train_zoo(["cosine"], tokens=640)
    monkeypatch.setattr(zoo, "train_saes", real)
    zoo.train_zoo(["3/cosine"], tokens=704)
    assert weights("3/cosine") != before


def test_packaged_saes_are_in_half_precision(small, tmp_path):
    zoo.train_zoo(["3/cosine"], tokens=640)
    assert zoo.package_zoo(tmp_path / "package") == ["3/cosine"]
    full = load_sae(zoo.zoo_folder() / "3/cosine")
    half = load_sae(tmp_path / "package" / DEFAULT_MODEL / "3/cosine")
    assert half.dtype == torch.float32 and half.hook_name == full.hook_name
    torch.testing.assert_close(half.W_dec, full.W_dec, atol=1e-3, rtol=1e-3)
    assert not torch.equal(half.W_dec, full.W_dec)


@pytest.mark.model
def test_packaged_saes_reconstruct_held_out_activations():
    """FVE and L0 are computed here on held-out paragraphs, not taken from the training metrics."""
    model = load_model(DEFAULT_MODEL)
    assert model.tokenizer is not None
    _, held_out = split(load_texts("boolq", n=300))
    prompts = tokenize(held_out, model.tokenizer, max_length=64, n_prompts=12)
    saes = {name: load_sae(PACKAGED_ZOO / DEFAULT_MODEL / name) for name in zoo.PACKAGED}
    sites = {name: sae_site(sae, model) for name, sae in saes.items()}
    recording = record(model, prompts.tokens, list(sites.values()), keep_cache=False)
    for name, sae in saes.items():
        assert str(sites[name].layer) == name.split("/")[0] and sae.d_sae == 2304
        lengths = recording.length.tolist()
        x = torch.cat([recording.activations[sites[name]][i, 1:n] for i, n in enumerate(lengths)])
        fve = 1 - (x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()
        assert float(fve) > 0.6, name
        assert 16 < float((sae.encode(x) != 0).double().sum(-1).mean()) < 64, name

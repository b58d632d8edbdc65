"""The command from its options to its files, on a tiny model and small SAEs in folders."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from diagnostics.held_out import split
from diagnostics.sae_evaluation import SAEEvaluation, evaluate_saes
from interventions import MechdiagError, ResultError, Site, load_model, record
from interventions.texts import load_texts, tokenize
from sae_models.architectures import build, named
from sae_models.loading import load_sae
from sae_models.saving import save_sae
from tests.tiny import prompts

SCRIPT = Path(__file__).parents[2] / "scripts" / "eval_sae.py"
SPLIT = ("--held-out", 0.5)

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def script():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("eval_sae", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their own annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def saes(given) -> dict[str, Path]:
    """Folders of SAEs of blocks 1 and 4, and of one of another width."""
    found, model = {}, load_model(given / "model", device="cpu")
    sites = {"1/standard": Site(1), "1/cosine": Site(1), "4/standard": Site(4)}
    recording = record(model, prompts((20, 20, 20)), list(sites.values()), keep_cache=False)
    for i, (name, site) in enumerate(sites.items()):
        x = recording.activations[site].flatten(0, 1)
        generator = torch.Generator().manual_seed(i)
        sae = build(named(name.split("/")[1]), 40, 6, x, generator, model_name="model", hook_name=site.hook_name)
        sae.selector.threshold.fill_(0.2)
        found[name] = save_sae(sae, given / "saes" / name)
    wide = build(named("standard:relu"), 8, 2, torch.randn(9, 16), generator, hook_name="blocks.1.hook_resid_post")
    found["wide"] = save_sae(wide, given / "saes" / "wide")
    return found


@pytest.fixture
def words(given, saes, tmp_path):
    """A command line that works, but for the model, its text and perhaps more SAEs before it."""
    return (saes["1/standard"], saes["4/standard"], "--out", tmp_path / "out", *SPLIT, "--n-prompts", 8)


@pytest.fixture
def evaluate(run, given):
    """The command with the tiny model and its text, and prompts of the paragraphs held out."""

    def command(*given_words, text: bool = True):
        usual = ("--model", given / "model", "--device", "cpu") + (("--prompts", given / "text.txt") if text else ())
        return run(*given_words, *usual, model=False)

    return command


def one_line(err: str) -> str:
    """The only line of an error, after what transformers says of a folder's weights."""
    *before, last = err.rstrip("\n").split("\n")
    assert all("Loading weights" in line for line in before)
    assert last.startswith("error: ")
    return last.removeprefix("error: ")


def test_a_run_leaves_its_files_and_they_are_those_of_the_library(evaluate, given, saes, words, tmp_path):
    out = tmp_path / "out"
    status, said, err = evaluate(
        saes["1/cosine"], *words, "--prompts-second", given / "other.txt", "--splice-prompts", 4
    )
    assert status == 0, err
    assert "Traceback" not in err
    figures = {
        f"{n}.{end}" for n in ("sae_evaluation", "sae_alignment", "sae_exponents") for end in ("png", "svg", "pdf")
    }
    assert {path.name for path in out.iterdir()} == {*SAEEvaluation.files(), *figures}
    assert f"into {out}" in said and "KL score" in said
    found = SAEEvaluation.load(out)
    assert found.names == ["1/cosine", "1/standard", "4/standard"]
    assert found.corpora == ["text.txt", "other.txt"]
    model = load_model(given / "model", device="cpu")
    texts = {name: split(load_texts(str(given / name)), 0.5)[1] for name in found.corpora}
    same = {n: tokenize(t, model.tokenizer, max_length=128, n_prompts=8) for n, t in texts.items()}
    by_hand = evaluate_saes(model, same, {name: load_sae(saes[name]) for name in found.names}, splice_prompts=4)
    pd.testing.assert_frame_equal(found.frame, by_hand.frame, rtol=1e-5)
    pd.testing.assert_frame_equal(found.latents, by_hand.latents, rtol=1e-5)
    assert found.tokens == by_hand.tokens
    provenance = json.loads((out / "sae_evaluation.json").read_text())["provenance"]
    assert "held out (0.5 of it by blake2b" in provenance["texts"]["text.txt"]["name"]
    status, said, err = evaluate(*words)
    assert (status, said) == (2, "") and "holds another run" in one_line(err)
    assert evaluate(*words, "--overwrite")[0] == 0
    assert SAEEvaluation.load(out).names == ["1/standard", "4/standard"]
    assert not list(out.glob("sae_exponents.*"))  # of the run before


def test_the_prompts_are_held_out_those_of_training_or_all(evaluate, given, saes, tmp_path):
    texts, tokens = load_texts(str(given / "text.txt")), {}
    for name, more in (("held", ()), ("training", ("--on-training-text",)), ("all", ("--held-out", 0))):
        words = (saes["1/standard"], "--out", tmp_path / name, *(() if name == "all" else SPLIT), *more)
        assert evaluate(*words, "--n-prompts", 8, "--splice-prompts", 2, "--sink-filter", 0)[0] == 0
        found = SAEEvaluation.load(tmp_path / name)
        tokens[name] = {tuple(ids) for ids in found.tokens}
        assert found.counted == "all"
    read = load_model(given / "model", device="cpu").tokenizer
    parts = {
        n: {tuple(read(text)["input_ids"]) for text in part.texts}
        for n, part in zip(("training", "held"), split(texts, 0.5), strict=True)
    }
    assert tokens["held"] <= parts["held"] and tokens["training"] <= parts["training"]
    assert tokens["held"].isdisjoint(tokens["training"])


def test_names_are_as_short_as_tells_them_apart(script):
    assert script.short_names(("results/saes/15/cosine", "zoo/7/standard/")) == ["cosine", "standard"]
    assert script.short_names(("a/15/standard", "a/7/standard", "a/7/cosine")) == [
        "15/standard",
        "7/standard",
        "7/cosine",
    ]
    assert script.short_names(("standard", "/x/standard")) == ["standard", "x/standard"]
    assert script.short_names(("hf:owner/name/layer",)) == ["layer"]
    assert script.short_names((".",)) == ["."]
    with pytest.raises(MechdiagError, match="a/b is given twice"):
        script.short_names(("a/b", "./a/b/"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--path", "replay"), "unknown path 'replay'; known: auto, blocks, hooks"),
        (("--held-out", 1), "--held-out 1"),
        (("--splice-prompts", -1), "--splice-prompts -1"),
        (("--sink-filter", -2), "--sink-filter -2"),
        (("--held-out", 0, "--on-training-text"), "give a share above 0"),
        (("--dtype", "int8"), "unknown dtype 'int8'"),
        (("--n-pairs", 3), "--n-pairs"),
    ],
)
def test_options_are_looked_at_before_the_model(run, words, tmp_path, more, message):
    status, said, err = run(*words, "--model", "/nowhere/at/all", *more, model=False)
    assert (status, said) == (2, "")
    assert message in one_line(err)
    assert not list((tmp_path / "out").glob("*"))


def test_saes_are_read_before_the_model(run, given, saes, tmp_path):
    for sae, message in ((given / "saes/none", "no SAE"), (given / "text.txt", "text.txt"), (given, "")):
        status, said, err = run(sae, "--out", tmp_path / "out", "--model", "/nowhere/at/all", model=False)
        assert (status, said) == (2, "")
        assert message in one_line(err)
    status, _, err = run(saes["wide"], saes["wide"], "--out", tmp_path / "out", "--model", "/nowhere", model=False)
    assert status == 2 and "is given twice" in one_line(err)
    status, _, err = run("--out", tmp_path / "out", model=False)
    assert status == 2 and "no SAE; name at least one" in one_line(err)


@pytest.mark.parametrize(
    ("sae", "more", "message"),
    [
        ("wide", (), "width 16 for activations of width 32"),
        ("1/standard", ("--n-prompts", 400), "expected 400"),
        ("1/standard", ("--held-out", 1e-9), "would be held out"),
        ("1/standard", ("--prompts-second", "no.txt"), "no file 'no.txt'"),
        ("1/standard", ("--sink-filter", 1e-6), "no token is left at 1.resid_post"),
    ],
)
def test_what_does_not_serve_is_one_line(evaluate, saes, tmp_path, sae, more, message):
    usual = ("--out", tmp_path / "out", *(() if "--held-out" in more else SPLIT), "--splice-prompts", 2)
    status, said, err = evaluate(saes[sae], *usual, *(() if "--n-prompts" in more else ("--n-prompts", 8)), *more)
    assert (status, said) == (2, "")
    assert message in one_line(err)


def test_a_folder_of_another_run_is_refused_first(script, saes, tmp_path):
    (tmp_path / "tokens.npy").write_text("kept")
    with pytest.raises(ResultError, match=r"holds another run \(tokens\.npy\)"):
        script.main(script.Settings(saes=(str(saes["wide"]),), out=tmp_path, model="/nowhere/at/all"))
    assert np.array_equal([p.name for p in tmp_path.iterdir()], ["tokens.npy"])

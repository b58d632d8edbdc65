"""The command from its options to its files, on a tiny model and small SAEs in folders."""

import importlib.util
import json
import sys
from inspect import signature
from pathlib import Path

import pandas as pd
import pytest
import torch

from diagnostics.dictionary_comparison import DictionaryComparison, compare_dictionaries
from diagnostics.held_out import split
from interventions import Site, load_model, record
from interventions.texts import load_texts, tokenize
from sae_models.architectures import build, named
from sae_models.loading import load_sae
from sae_models.saving import save_sae
from tests.tiny import prompts

SCRIPT = Path(__file__).parents[2] / "scripts" / "compare_saes.py"


@pytest.fixture(scope="module")
def script():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("compare_saes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their own annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def saes(given) -> dict[str, Path]:
    """Folders of SAEs of block 1, and one of block 4; labelled texts."""
    found, model = {}, load_model(given / "model", device="cpu")
    recording = record(model, prompts((20, 20, 20)), [Site(1), Site(4)], keep_cache=False)
    for i, (name, site) in enumerate({"1/standard": 1, "1/cosine": 1, "4/standard": 4}.items()):
        x = recording.activations[Site(site)].flatten(0, 1)
        hook = {"model_name": "model", "hook_name": Site(site).hook_name}
        sae = build(named(name.split("/")[1]), 40, 6, x, torch.Generator().manual_seed(i), **hook)
        sae.selector.threshold.fill_(0.2)
        found[name] = save_sae(sae, given / "saes" / name)
    lines = [
        f'{{"text": "{" ".join(f"w{t}" for t in p)}", "label": "{"ab"[i % 2]}"}}'
        for i, p in enumerate(prompts((9,) * 24))
    ]
    (given / "labelled.jsonl").write_text("\n".join(lines) + "\n")
    return found


def test_a_run_leaves_its_files_and_they_are_those_of_the_library(run, given, saes, tmp_path):
    out = tmp_path / "out"
    words = ("--saes", saes["1/standard"], saes["1/cosine"], "--out", out, "--held-out", 0, "--min-active", 3)
    status, said, err = run(*words, "--data", given / "labelled.jsonl", "--max-length", 16)
    assert status == 0, err
    figures = {
        f"dictionary_{n}.{e}"
        for n in ("quartiles", "stability", "gradients", "alignment")
        for e in ("png", "svg", "pdf")
    }
    there = {path.name for path in out.iterdir()}
    assert {*DictionaryComparison.files(), *figures} <= there and "dictionary_effect.png" not in there
    assert "matched" in said and f"into {out}" in said
    found = DictionaryComparison.load(out)
    assert found.names == ["standard", "cosine"]
    assert {name: some["texts"] for name, some in found.provenance["labelled"].items()} == {"labelled.jsonl": 24}
    model = load_model(given / "model", device="cpu")
    text = tokenize(load_texts(str(given / "text.txt")), model.tokenizer, max_length=16, n_prompts=24)
    some = {name: load_sae(saes[f"1/{name}"]) for name in found.names}
    by_hand = compare_dictionaries(model, text, some, min_active=3)
    pd.testing.assert_frame_equal(found.frame, by_hand.frame, rtol=1e-4, atol=1e-6)
    assert found.tokens == by_hand.tokens
    status, _, err = run(*words, "--max-length", 12)
    assert status == 2 and "holds units of another run" in err
    assert json.loads((out / "run.json").read_text())["diagnostic"] == "dictionary_comparison"


def test_the_prompts_are_held_out(run, given, saes, tmp_path):
    words = ("--saes", saes["1/standard"], saes["1/cosine"], "--out", tmp_path, "--held-out", 0.5, "--n-prompts", 6)
    assert (
        run(*words, "--model", given / "model", "--prompts", given / "text.txt", "--device", "cpu", model=False)[0] == 0
    )
    read = load_model(given / "model", device="cpu").tokenizer
    held = {tuple(read(text)["input_ids"]) for text in split(load_texts(str(given / "text.txt")), 0.5)[1].texts}
    assert {tuple(ids) for ids in DictionaryComparison.load(tmp_path).tokens} <= held


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--path", "blocks"), "unknown path 'blocks'; known: auto, replay, hooks"),
        (("--held-out", 1), "--held-out 1"),
        (("--cosine", 0), "threshold cosine 0.0; expected a number above 0"),
        (("--min-active", 0), "min_active 0; expected 1 or more"),
        (("--per-class", 4), "--per-class 4; expected"),
        (("--dtype", "int8"), "unknown dtype 'int8'"),
        (("--data", "/no/such.csv"), "/no/such.csv"),
    ],
)
def test_options_are_looked_at_before_the_model(run, saes, tmp_path, more, message):
    words = ("--saes", saes["1/standard"], saes["1/cosine"], "--out", tmp_path / "out", "--held-out", 0)
    status, said, err = run(*words, *more, "--model", "/nowhere/at/all", model=False)
    assert (status, said) == (2, "") and message in err and "Traceback" not in err


def test_what_does_not_serve_is_one_line(run, saes, tmp_path):
    status, _, err = run("--saes", saes["1/standard"], "--out", tmp_path, model=False)
    assert status == 2 and "1 SAE; a comparison needs two or more" in err
    several = ("--saes", saes["1/standard"], saes["4/standard"], "--model", "/nowhere/at/all")
    status, _, err = run(*several, "--out", tmp_path, model=False)
    assert status == 2 and "SAEs of blocks.1.hook_resid_post, blocks.4.hook_resid_post" in err
    assert "dictionaries are compared at one site" in err.strip().split("\n")[-1]


def test_the_zoos_kinds_are_of_the_layers(script):
    asked = script.Settings(out=Path("out"))
    assert (asked.saes, asked.layers) == (("standard", "cosine"), (15,))
    assert set(asked.asked()) <= set(signature(compare_dictionaries).parameters)
    assert script.Settings(out=Path("out"), sink_filter=0).asked()["sink_filter"] is None
    with pytest.raises(script.MechdiagError, match="1 SAE; a comparison needs two"):
        script.Settings(out=Path("out"), saes=("cosine",)).check()

"""The command from its options to its files, on a tiny model, a small SAE and labelled texts in files."""

import csv
import importlib.util
import json
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from diagnostics.concepts import labelled_concepts
from diagnostics.feature_ablations import FeatureAblation, feature_ablation
from interventions import Site, load_model, record
from interventions.labelled import load_labelled
from sae_models.architectures import build, named
from sae_models.loading import load_sae
from sae_models.saving import save_sae
from tests.tiny import prompts

SCRIPT = Path(__file__).parents[2] / "scripts" / "ablate_features.py"
CLASSES, N = ("a", "b", "c"), 44


@pytest.fixture(scope="module")
def script():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("ablate_features", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their own annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(given):
    """A folder with an SAE of block 4 and a table of texts, each class with a word of its own."""
    site = Site(4)
    recording = record(load_model(given / "model", device="cpu"), prompts((20, 20, 20)), [site], keep_cache=False)
    x = recording.activations[site].flatten(0, 1)
    sae = build(named("standard:relu"), 40, 6, x, torch.Generator().manual_seed(0), hook_name=site.hook_name)
    save_sae(sae, given / "saes" / "tiny")
    rows = prompts((10,) * (N * len(CLASSES)))
    with (given / "texts.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("text", "label"))
        for i, row in enumerate(rows):
            table.writerow((" ".join([f"w{90 + i % 3}", *(f"w{j}" for j in row), f"w{90 + i % 3}"]), CLASSES[i % 3]))
    return given


def words(made, out, *more):
    usual = (
        "--saes",
        made / "saes" / "tiny",
        "--model",
        made / "model",
        "--device",
        "cpu",
        "--data",
        made / "texts.csv",
    )
    small = ("--counts", 1, 3, "--per-class", 40, "--reads", 3, "--sink-filter", 0, "--concepts", "b", "c")
    return (*usual, *small, "--out", out, *more)


def test_a_run_leaves_its_files_and_they_are_those_of_the_library(run, made, tmp_path, undrawn):
    status, said, err = run(*words(made, tmp_path / "out"), model=False)
    assert status == 0, err
    figures = {
        f"feature_ablation_{name}.{end}" for name in ("kl", "logit", "probe", "counts") for end in ("png", "svg", "pdf")
    }
    assert figures < {path.name for path in (tmp_path / "out").iterdir()}
    assert "probe, at equal intended effect" in said and f"into {tmp_path / 'out'}" in said
    found = FeatureAblation.load(tmp_path / "out")
    assert found.concepts == [("texts.csv", "b"), ("texts.csv", "c")] and found.saes == ["tiny"]
    model = load_model(made / "model", device="cpu")
    labelled = load_labelled(str(made / "texts.csv"), per_class=160)
    texts = labelled_concepts(labelled, model.tokenizer, classes=["b", "c"], per_class=40)
    sae = load_sae(made / "saes" / "tiny")
    by_hand = feature_ablation(model, {"texts.csv": texts}, {"tiny": sae}, counts=(1, 3), reads=3, sink_filter=None)
    pd.testing.assert_frame_equal(found.frame, by_hand.frame, check_dtype=False)
    p = json.loads((tmp_path / "out" / "feature_ablation.json").read_text())["provenance"]
    assert p["texts"]["texts.csv"]["concepts"]["b"]["measuring"] == [20, 20]
    assert p["texts"]["texts.csv"]["concepts"]["b"]["targets"][0].strip() == "w91"
    status, said, err = run(*words(made, tmp_path / "out", "--seed", 1), model=False)
    assert status == 2 and "holds units of another run" in err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--arms", "best"), "--arms best; known: selected, random, placebo, keep"),
        (("--rankings", "worst"), "--rankings worst; known: mean_difference"),
        (("--path", "replay"), "unknown path 'replay'"),
        (("--counts", 0), "counts from 1"),
        (("--per-class", 3), "--per-class 3"),
        (("--concepts", "d"), "--concepts d; the texts have: a, b, c"),
        (("--data", "nothing.csv"), "nothing.csv"),
    ],
)
def test_what_does_not_serve_is_one_line_before_the_model(run, made, tmp_path, more, message):
    status, said, err = run(*words(made, tmp_path / "out", "--model", "/nowhere/at/all", *more), model=False)
    assert (status, said) == (2, "")
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert message in line

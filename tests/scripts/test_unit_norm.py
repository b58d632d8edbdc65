"""`unit_norm.py` measures what the library measures on the same prompts."""

import json

import numpy as np
import pandas as pd
import pytest

from diagnostics.unit_norm.result import UnitNorm
from diagnostics.unit_norm.run import unit_norm_sweep
from interventions import load_model
from interventions.texts.prompts import load_texts, tokenize
from tests.tiny import N_LAYERS


def test_table_matches_the_library(script, given):
    run = script("unit_norm", "--null-model", "random", "--null-seeds", 1, "--seed", 2)
    assert run.status == 0 and "unit norm ÷ rotation" in run.said, run.err
    found = UnitNorm.load(run.folder)
    model = load_model(given / "model", device="cpu")
    text = tokenize(load_texts(str(given / "text.txt")), model.tokenizer, max_length=128, n_prompts=24, seed=2)
    by_hand = unit_norm_sweep(model, text, layers=[1, 4], tokens=30, null_seeds=1, seed=2)
    same = ["model", "layer", "token", "edit", "target_prompt", "target_position"]
    pd.testing.assert_frame_equal(found.frame[same], by_hand.frame[same])
    np.testing.assert_allclose(found.frame.kl, by_hand.frame.kl, rtol=1e-4, atol=1e-9)
    assert found.tokens == text.tokens
    summary = json.loads((run.folder / "unit_norm.json").read_text(), parse_constant=pytest.fail)["summary"]
    assert [(g["model"], g["layer"]) for g in summary] == [(m, n) for m in ("trained", "random 0") for n in (1, 4)]


def test_all_blocks_are_the_default(script, given):
    words = ("--model", given / "model", "--prompts", given / "text.txt", "--n-prompts", 24, "--tokens", 6)
    run = script("unit_norm", *words, "--device", "cpu", small=False)
    assert sorted(set(UnitNorm.load(run.folder).frame.layer)) == list(range(N_LAYERS))

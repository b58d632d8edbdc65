"""`dose_response.py` measures what the library measures; files of directions."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from diagnostics.dose.result import DoseResponse
from diagnostics.dose.run import dose_response
from interventions import Site, load_model
from interventions.texts.prompts import load_texts, tokenize
from tests.tiny import D_MODEL


def test_table_matches_the_library(script, given, tmp_path):
    steer = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(3))
    np.save(tmp_path / "steer.npy", steer.double().numpy())
    torch.save(steer.flip(0), tmp_path / "back.pt")
    directions = ("--directions", tmp_path / "steer.npy", tmp_path / "back.pt")
    run = script("dose_response", *directions, "--null-model", "random", "--null-seeds", 1)
    assert run.status == 0 and "steer ÷ steer placebo token" in run.said.replace("\n  ", " "), run.err
    found = DoseResponse.load(run.folder)
    model = load_model(given / "model", device="cpu")
    text = tokenize(load_texts(str(given / "text.txt")), model.tokenizer, max_length=128, n_prompts=24)
    by_hand = dose_response(
        *(model, text), layers=[1, 4], doses=(0.1, 0.5), tokens=20, null_seeds=1,
        directions={"steer": steer, "back": steer.flip(0)},
    )  # fmt: skip
    same = ["model", "layer", "pair", "edit", "target_prompt", "target_position", "source_prompt", "source_position"]
    pd.testing.assert_frame_equal(found.frame[same], by_hand.frame[same])
    np.testing.assert_allclose(found.frame.kl, by_hand.frame.kl, rtol=1e-4, atol=1e-9)
    assert found.tokens == text.tokens and list(found.provenance["directions"]) == ["steer", "back"]


def test_sites_contexts_and_horizons_reach_the_result(script):
    few = ("--layers", 1, 2, "--tokens", 10)
    a, b = script.folder / "a", script.folder / "b"
    sites = ("--sites", "attn_out", "3.resid_pre", "--horizon", 2)
    assert script("dose_response", *few, *sites, "--out", a).status == 0
    found = DoseResponse.load(a)
    assert found.provenance["sites"] == [str(Site(1, "attn_out")), str(Site(2, "attn_out")), str(Site(3, "resid_pre"))]
    assert found.provenance["horizon"] == 2 and "kl_at_1" in found.frame
    contexts = ("--context", "both", "--sink-filter", 0, "--path", "hooks")
    assert script("dose_response", *few, *contexts, "--out", b).status == 0
    provenance = DoseResponse.load(b).provenance
    assert (provenance["context"], provenance["sink_filter"]) == (["in_place", "single_token"], None)
    assert set(provenance["path"].values()) == {"hooks"}


def _archive(path: Path) -> None:
    np.savez(path.with_suffix(".npz"), d=np.ones(D_MODEL))
    path.with_suffix(".npz").rename(path)


BAD = {
    "short.npy": lambda path: np.save(path, np.ones(D_MODEL - 1)),
    "wide.npy": lambda path: np.save(path, np.ones((1, D_MODEL))),
    "zero.npy": lambda path: np.save(path, np.zeros(D_MODEL)),
    "nan.npy": lambda path: np.save(path, np.full(D_MODEL, np.nan)),
    "objects.npy": lambda path: np.save(path, np.array([{}] * D_MODEL, dtype=object), allow_pickle=True),
    "words.npy": lambda path: np.save(path, np.array(["one"] * D_MODEL)),
    "archive.npy": _archive,
    "text.npy": lambda path: path.write_text("0.1 0.2"),
    "empty.npy": lambda path: path.write_bytes(b""),
    "dictionary.pt": lambda path: torch.save({"d": torch.ones(D_MODEL)}, path),
    "text.pt": lambda path: path.write_text("0.1 0.2"),
    "empty.pt": lambda path: path.write_bytes(b""),
    "complex.npy": lambda path: np.save(path, np.ones(D_MODEL) * 1j),
}


@pytest.mark.parametrize("name", BAD)
def test_file_without_a_direction_is_refused_by_name(script, tmp_path, name):
    BAD[name](tmp_path / name)
    assert Path(name).stem in script("dose_response", "--directions", tmp_path / name).error


def test_two_directions_of_one_name_are_refused(script, tmp_path):
    """Otherwise the second would replace the first."""
    files = [tmp_path / folder / "steer.npy" for folder in ("a", "b")]
    for file in files:
        file.parent.mkdir()
        np.save(file, np.ones(D_MODEL))
    assert "two directions have the name 'steer'" in script("dose_response", "--directions", *files).error

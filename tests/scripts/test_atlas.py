"""`atlas.py` writes shards and joins finished atlases; with --all-latents it writes a table of latents."""

import pandas as pd

from diagnostics.atlas.columns import COLUMNS
from diagnostics.atlas.result import CausalAtlas
from diagnostics.whole_dictionary.result import DictionaryEffects
from tests.scripts.conftest import ALL_LATENTS


def test_shards_form_one_data_set_and_partial_shards_are_removed(script):
    run = script("atlas")
    atlas = CausalAtlas.load(run.folder)
    assert list(atlas.frame) == list(COLUMNS) and len(atlas.frame)
    assert len(pd.read_parquet(run.folder / "atlas")) == len(atlas.frame)
    left = run.folder / ".partial-killed"  # by a process that ended while it wrote
    left.mkdir()
    (left / "00-00000.parquet").write_bytes(b"half")
    assert script("atlas").status == 0 and not left.exists()
    assert "steps was 6, is 3" in script("atlas", "--steps", 3).error
    unused = script("atlas", "--scan-tokens", 9, "--out", script.folder / "x").error
    assert "--scan-tokens does nothing without --all-latents; leave it out" in unused


def test_finished_atlases_are_joined_and_never_overwritten(script):
    one = script.finished("atlas").folder
    joining = ("--results", one)
    assert script("atlas", *joining, small=False).status == 0
    assert len(CausalAtlas.load(script.folder / "out").frame) == len(CausalAtlas.load(one).frame)
    assert "--overwrite" in script("atlas", *joining, small=False).error
    assert "is one of --results" in script("atlas", *joining, "--out", one, small=False).error
    assert "holds no atlas" in script("atlas", "--results", script.given, "--out", script.folder / "x").error


def test_all_latents_run_measures_several_saes_and_feeds_a_card(script):
    both = [script.given / "saes" / "2" / "standard", script.given / "saes" / "4" / "standard"]
    words = (*ALL_LATENTS, "--saes", *both)
    run = script("atlas", *words)
    assert run.status == 0, run.err
    found = DictionaryEffects.load(run.folder)
    assert found.saes == ["2/standard", "4/standard"] and sum(map(len, found.tokens)) <= 150
    assert found.latents.rows.max() == 4 and len(pd.read_parquet(run.folder / "rows")) == len(found.frame)
    assert "of 0 tested" in " ".join(run.said.split()) and "Example" not in run.said
    assert script("atlas", *words).files == run.files  # a finished run, again
    latent = int(found.frame.latent[0])
    card = (
        "--saes",
        both[0],
        "--latents",
        latent,
        "--atlas",
        run.folder,
        "--n-prompts",
        24,
        "--out",
        script.folder / "card",
    )
    assert script("latent_card", *card).status == 0
    for wrong, said in (
        (("--tokens-per-latent", 0), "--tokens-per-latent 0; expected 1 or more"),
        (("--path-share", 0.5), "--path-share does nothing with --all-latents; leave it out"),
        (("--results", run.folder), "--results joins atlases; it does not go with --all-latents"),
    ):
        assert said in script("atlas", *words, *wrong, "--out", script.folder / "x").error

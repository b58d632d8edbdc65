"""`atlas.py` writes shards and joins finished atlases."""

import pandas as pd

from diagnostics.atlas.columns import COLUMNS
from diagnostics.atlas.result import CausalAtlas


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


def test_finished_atlases_are_joined_and_never_overwritten(script):
    one = script.finished("atlas").folder
    joining = ("--results", one)
    assert script("atlas", *joining, small=False).status == 0
    assert len(CausalAtlas.load(script.folder / "out").frame) == len(CausalAtlas.load(one).frame)
    assert "--overwrite" in script("atlas", *joining, small=False).error
    assert "is one of --results" in script("atlas", *joining, "--out", one, small=False).error
    assert "holds no atlas" in script("atlas", "--results", script.given, "--out", script.folder / "x").error

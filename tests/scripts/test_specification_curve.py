"""`specification_curve.py` patches texts or takes finished results, and gives the same curve."""

import pandas as pd

from diagnostics.direction_vs_norm.result import DirectionNorm
from diagnostics.specifications.run import specification_curve


def test_texts_and_their_saved_results_give_the_same_curve(script, given):
    texts = ("--prompts", f"{given / 'text.txt'},{given / 'other.txt'}", "--null-model", "random", "--null-seeds", 1)
    run = script("specification_curve", *texts)
    assert run.status == 0 and "direction matters more than norm" in run.said, run.err
    found = {name: DirectionNorm.load(run.folder / name) for name in ("text", "other")}
    for name, result in found.items():
        p = result.provenance
        assert (p["context"], p["sink_filter"]) == (["in_place", "single_token"], None)
        assert p["pair_sets"] == ["random"] and p["text"]["name"].startswith(name)
    assert found["text"].tokens != found["other"].tokens
    frame = pd.read_parquet(run.folder / "specification.parquet")
    assert len(frame[(frame.claim == "direction") & (frame.model == "trained")]) == 2 * 2 * 2 * 3 * 3 * 3
    curve = specification_curve(found)
    pd.testing.assert_frame_equal(frame, curve.frame)
    results = ("--results", run.folder / "text", run.folder / "other", "--out", script.folder / "again")
    again = script("specification_curve", *results, small=False)
    assert again.status == 0, again.err
    pd.testing.assert_frame_equal(pd.read_parquet(again.folder / "specification.parquet"), frame)
    assert "holds another run (specification.parquet)" in script("specification_curve", *results, small=False).error


def test_invalid_results_exit_2_with_one_line(script, tmp_path):
    """With two results of one name the second would replace the first."""
    one = script.finished("specification_curve").folder / "text"
    (tmp_path / "text").symlink_to(one)
    twice = script("specification_curve", "--results", one, tmp_path / "text", small=False)
    assert "two results have the name 'text'" in twice.error
    missing = script("specification_curve", "--results", one, tmp_path / "none", small=False)
    assert "holds no direction_norm result: direction_norm.parquet is missing" in missing.error

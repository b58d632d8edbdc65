"""Runs of diagnostics of single latents: invalid numbers and latents, rows that are not finite, and what the folder keeps."""

import hashlib
import json

import numpy as np
import pandas as pd
import pytest

from diagnostics.latent_edits.items import asked_latents, check_numbers, token_items
from diagnostics.latent_edits.run import run_latent_edits
from diagnostics.results.result import Result
from interventions import ResultError
from tests.planted import planted_model
from tests.tiny import prompts

PROMPTS = prompts(tuple(8 + (3 * i) % 7 for i in range(70)))  # two shards


class Norms(Result):
    """The norm of what stands at some tokens."""

    NAME, NOTE = "norms", "read the docstring"

    @property
    def groups(self):
        return [{"sae": sae, "rows": int((self.frame["sae"] == sae).sum())} for sae in self.saes]


def norms(folder=None, lost: int = 0, latents=3, overwrite: bool = False):
    """With so many lines of each shard not finite."""

    def compute(bench, items):
        size = bench.x(items).norm(dim=1).numpy()
        size[:lost] = np.nan
        return items.assign(size=size, word="a")

    hf, sae = planted_model()
    return run_latent_edits(
        Norms, hf, PROMPTS, {"one": sae, "two": sae}, lambda clean, dictionary, firings: token_items(clean, firings, 90), compute,
        {"latents": latents}, ("size",), sink_filter=None, seed=0, path="auto", folder=folder, overwrite=overwrite, progress=None,
    )  # fmt: skip


def test_rows_that_are_not_finite_are_dropped_and_counted():
    result = norms(lost=2)
    assert result.provenance["rows_dropped"] == {"effect not finite": 8}  # 2 SAEs, 2 shards
    assert len(result.frame) == 2 * 90 - 8 and result.frame["size"].notna().all()
    assert "effect not finite" in result.table() and "read the docstring" in result.table()
    assert result.summary()["rows"].tolist() == [86, 86]
    with pytest.raises(ResultError, match="no row is left"):
        norms(lost=100)


def test_run_stores_prompt_hash_and_narrow_dtypes(tmp_path):
    result = norms(tmp_path)
    kept = json.loads((tmp_path / "run.json").read_text())
    assert kept["tokens"] == hashlib.sha256(json.dumps(PROMPTS).encode()).hexdigest()
    assert (tmp_path / "run.json").stat().st_size < 5000
    assert [str(t) for t in result.frame.dtypes] == ["str", "int32", "str", "int32", "int32", "float32", "str"]
    pd.testing.assert_frame_equal(norms(tmp_path).frame, result.frame)
    with pytest.raises(ResultError, match="latents was 3, is 4"):
        norms(tmp_path, latents=4)


def test_saes_share_tokens_and_dropped_ones_count_once():
    result = norms()
    one, two = (
        result.frame[result.frame["sae"] == name].drop(columns="sae").reset_index(drop=True) for name in result.saes
    )
    pd.testing.assert_frame_equal(one, two)
    said = result.provenance["drawn"]["one"]
    assert said["usable"] + sum(said["tokens left out"].values()) == sum(map(len, PROMPTS))


def test_too_small_numbers_and_unknown_latents_raise():
    check_numbers(n=1, m=5)
    with pytest.raises(ResultError, match="m 1, k 0; expected 2 or more"):
        check_numbers(2, n=2, m=1, k=0)
    assert asked_latents(3) == 3 and asked_latents(np.array([4, 1])) == [4, 1]
    for wrong in (0, []):
        with pytest.raises(ResultError, match="latents"):
            asked_latents(wrong)
    with pytest.raises(ResultError, match=r"latents \[12\] of one do not exist; it has 12"):
        norms(latents=[0, 12])

"""Atlas rows are joined by the tokens of their prompts; an atlas of another model, SAE, site or text is refused."""

import numpy as np
import pandas as pd
import pytest

from diagnostics.cards.atlas_rows import COLUMNS, atlas_rows
from diagnostics.cards.corpus import LatentCorpus
from interventions import ResultError
from interventions.texts.prompts import as_prompts
from sae_models.dictionaries import dictionaries_of
from tests.cards import PROMPTS, Table, model, of_tokens, sae


@pytest.fixture(scope="module")
def corpus():
    dictionary = dictionaries_of({"sae": sae()}, model(), None)[0]
    return LatentCorpus(model(), dictionary, as_prompts(PROMPTS, model().tokenizer), None, 0)


def test_rows_join_regardless_of_prompt_order(corpus):
    table = Table(sae(), [2, 7])
    order = np.random.default_rng(0).permutation(len(PROMPTS))
    table.tokens = [table.tokens[i] for i in order] + [[1, 2, 3]]
    table.frame["prompt"] = np.argsort(order)[table.frame.prompt]
    table.frame = table.frame.sample(frac=1, random_state=0)
    elsewhere = table.frame.iloc[:3].assign(prompt=len(PROMPTS), position=1)
    other_sae = table.frame.iloc[:4].assign(sae="another")
    table.frame = pd.concat([table.frame, elsewhere, other_sae], ignore_index=True)
    found = atlas_rows(table, corpus)
    assert found.provenance["rows"] == len(table.frame) - 4 and found.provenance["rows_of_other_prompts"] == 3
    assert found.provenance["prompts_joined"] == len(PROMPTS) < found.provenance["prompts"]
    for latent in (2, 7):
        rows = found.of(latent)
        np.testing.assert_allclose(rows.z.astype(float), corpus.of(latent)[rows.token], rtol=1e-4)
        assert len(rows) == (corpus.of(latent) != 0)[corpus.usable].sum()
    assert found.totals.is_monotonic_decreasing and set(found.totals.index) == {2, 7}


def test_rows_at_tokens_left_out_are_counted(corpus):
    table = Table(sae(), [7])
    prompt, position = of_tokens()
    first = np.flatnonzero((position == 0) & (corpus.of(7) != 0))[0]
    extra = table.frame.iloc[:1].assign(prompt=prompt[first], position=0, z=corpus.of(7)[first])
    table.frame = pd.concat([table.frame, extra], ignore_index=True)
    found = atlas_rows(table, corpus)
    assert found.provenance["rows_at_tokens_left_out"] == 1
    assert len(found.frame) == len(table.frame) - 1


def test_equal_prompts_are_joined_one_to_one():
    """The atlas has three copies of a prompt and this text two. No copy of an even prompt is held back."""
    dictionary = dictionaries_of({"sae": sae()}, model(), None)[0]
    some = [PROMPTS[0], PROMPTS[1], PROMPTS[1], PROMPTS[2], PROMPTS[3]]
    corpus = LatentCorpus(model(), dictionary, as_prompts(some, model().tokenizer), None, 0)
    table = Table(sae(), [2, 7])
    table.frame = table.frame.loc[table.frame.prompt <= 2]
    twice = [table.frame.loc[table.frame.prompt == 1].assign(prompt=prompt, kl=prompt) for prompt in (3, 4)]
    table.frame = pd.concat([table.frame, *twice], ignore_index=True)
    table.tokens = [PROMPTS[0], PROMPTS[1], PROMPTS[2], PROMPTS[1], PROMPTS[1]]  # rows of the copies: 1, 3, 4
    found = atlas_rows(table, corpus)
    assert not found.frame.duplicated(["token", "latent"]).any()
    own = found.frame.assign(prompt=corpus.prompt[found.frame.token])
    assert (own.kl[own.prompt == 2] == 3).all() and (own.prompt == 2).sum() == (own.prompt == 1).sum() > 0
    assert found.provenance["prompts_joined"] == 4 and found.provenance["rows_of_other_prompts"] == len(twice[1])
    assert found.held_back.tolist() == [False, False, False, False, True]
    assert found.provenance["prompts_joined_and_held_back"] == 0 and found.confirming.empty
    even = table.frame.loc[table.frame.prompt % 2 == 0].groupby("latent").kl.sum()
    assert found.ranking.to_dict() == pytest.approx(even.to_dict()) and found.totals.sum() > found.ranking.sum()


def _spoiled(what: str) -> Table:
    table = Table(sae(), [7])
    p = table.provenance
    if what == "weights":
        p["weights_sha256"] = "0" * 64
    elif what == "sae":
        p["saes"] = {"b": {"sha256": "0" * 16, "site": "2.resid_post"}}
    elif what == "site":
        p["saes"] = {"b": p["saes"]["named there"] | {"site": "3.resid_post"}}
    elif what == "text":
        table.tokens = [ids[:-1] for ids in table.tokens]
    elif what == "z":
        table.frame["z"] *= 1.5
    else:
        table.frame = table.frame.drop(columns=what)
    return table


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("weights", r"an atlas of weights 000000000000… \(tiny\) for weights"),
        ("sae", r"no rows of this SAE \(sae at 2.resid_post, .*; it has b"),
        ("site", "no rows of this SAE"),
        ("text", "none of the atlas' 24 prompts .* is among the 24 of this text"),
        ("z", "z of the atlas differ from the SAE's own at 9.% of"),
        ("kl_direct", f"no column 'kl_direct'; expected {', '.join(COLUMNS)}"),
    ],
)
def test_mismatched_atlas_raises(what, message, corpus):
    with pytest.raises(ResultError, match=message):
        atlas_rows(_spoiled(what), corpus)

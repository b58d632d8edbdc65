"""N2G on a model with planted patterns: found, judged right, controls of the same density, kept and resumed."""

import functools

import matplotlib.pyplot as plt
import numpy as np
import pytest

from diagnostics.results.caveats import caveats
from diagnostics.statistics.tables import lines_of
from diagnostics.token_patterns.result import TokenPatterns
from diagnostics.token_patterns.run import n2g
from diagnostics.token_patterns.work import COUNTS, KINDS
from interventions import ResultError
from tests.diagnostics.token_patterns.planted_patterns import PAD, PATTERNS, planted_patterns, planted_prompts
from tests.planted import planted_model
from tests.tiny import prompts

pytestmark = pytest.mark.filterwarnings("ignore:an interval from")


@functools.cache
def found(**settings) -> TokenPatterns:
    """Shared by tests, which leave it as it is."""
    hf, sae = planted_patterns()
    given = {"latents": (0, 1, 2), "pad": PAD, "sink_filter": None, "min_active": 3, "examples": 12}
    return n2g(hf, planted_prompts(), {"1/planted": sae}, **{**given, **settings})


def test_planted_patterns_are_found_with_precision_and_recall_1():
    result = found()
    for latent, (pattern, value) in enumerate(PATTERNS):
        own = lines_of(result.patterns, latent=latent, of="latent")
        assert own["pattern"].tolist() == [" ".join("*" if t == -1 else str(t) for t in pattern)]
        assert set(own["polarity"]) == {int(np.sign(value))}
    for kind in ("trie", "one"):
        own = lines_of(result.frame, of="latent", kind=kind)
        assert (own["precision"] == 1).all() and (own["recall"] == 1).all() and (own["entries"] == 1).all()
        assert (own["active"] > 0).all() and (own["no_suffix"] == 0).all()
    tokens = lines_of(result.frame, of="latent", kind="tokens_best")
    assert (
        tokens["precision"].iloc[1] == 1 and (tokens["precision"].iloc[[0, 2]] < 0.5).all()
    )  # a token alone is one of many
    assert (tokens["recall"] == 1).all()
    group = result.select(of="latent", kind="one")[0]
    assert group["explained"].value == 1 and result.select(of="latent", kind="one_token")[0][
        "explained"
    ].value == pytest.approx(1 / 3)


def test_counts_match_the_text():
    """Latent 0 counted by hand over held-out tokens past each prompt's first; the sums over prompts are the same."""
    result = found()
    test = set(result.provenance["test_prompts"])
    assert len(test) == 20
    where = [(p, i) for p, t in enumerate(result.tokens) for i in range(2, len(t)) if t[i] == 7 and t[i - 2] == 5]
    line = lines_of(result.frame, of="latent", latent=0, kind="trie").iloc[0]
    assert line["active"] == sum(p in test for p, _ in where) and line["fit_active"] == sum(
        p not in test for p, _ in where
    )
    for _, one in lines_of(result.frame, of="latent").iterrows():
        own = lines_of(result.held_out, of="latent", latent=one["latent"], kind=one["kind"])
        assert own[list(COUNTS)].sum().tolist() == [one[c] for c in COUNTS]


def test_signed_n2g_draws_controls_and_resumes(tmp_path):
    hf, sae = planted_model()
    sae.selector = type(planted_patterns()[1].selector)(6)
    text = prompts(tuple(20 + i % 3 for i in range(24)))
    how = {"latents": 10, "examples": 3, "longest": 6, "pad": 1, "sink_filter": None, "min_active": 3}
    steps: list[int] = []

    def stop(n: int, total: int) -> None:
        steps.append(n)
        if sum(steps) > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        n2g(hf, text, sae, folder=tmp_path, progress=stop, **how)
    assert len(list((tmp_path / "units").glob("*.parquet"))) == 4
    again: list[int] = []
    result = n2g(hf, text, sae, folder=tmp_path, progress=lambda n, total: again.append(n), **how)
    assert again[0] == 4 and sum(again) == 10
    fresh = n2g(hf, text, sae, **how)
    assert result.frame.equals(fresh.frame) and result.held_out.equals(fresh.held_out)
    assert set(result.frame["polarity"]) == {1, -1} and set(result.frame["kind"]) == set(KINDS)
    weight = lines_of(result.frame, of="latent", kind="trie")["weight"]
    assert weight.sum() == pytest.approx(result.provenance["drawn"]["inner"]["eligible"])
    n = [lines_of(result.frame, of=of, kind="trie")["fit_active"].tolist() for of in ("latent", "random")]
    assert n[0] == n[1]  # random directions are active as often
    result.write(tmp_path)
    loaded = TokenPatterns.load(tmp_path)
    assert loaded.table() == result.table() and "forward passes" in loaded.table()
    assert caveats(loaded) is not None and len(list(loaded.headlines())) == 2
    plt.close("all")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"examples": 0}, "examples 0; expected 1 or more"),
        ({"latents": (0, 3)}, r"latents \[3\] of 1/planted do not exist"),
        ({"min_active": 10**6}, "too rare|active at fewer than 1000000"),
        ({"test_share": 1.0}, "test_share 1.0 of 40 prompts"),
        ({"pad": 97}, "padding token 97; expected an id from 0, below 97"),
        ({"pad": None}, "the tokenizer has no padding token; give pad="),
    ],
)
def test_invalid_arguments_raise(settings, said):
    with pytest.raises(ResultError, match=said):
        found(**settings)

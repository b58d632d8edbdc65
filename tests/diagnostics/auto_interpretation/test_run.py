"""Detection on planted patterns: perfect, blind and failing judges, snippets, controls, correlation with alignment."""

import functools
from collections import Counter

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from diagnostics.auto_interpretation.judges import BASELINE, token_frequency
from diagnostics.auto_interpretation.result import AutoInterp
from diagnostics.auto_interpretation.run import autointerp
from diagnostics.auto_interpretation.snippets import window
from diagnostics.auto_interpretation.summary import correlations, detection
from diagnostics.results.caveats import caveats
from diagnostics.statistics.tables import lines_of
from interventions import ResultError
from tests.diagnostics.token_patterns.planted_patterns import PATTERNS, planted_patterns, planted_prompts

pytestmark = pytest.mark.filterwarnings("ignore:an interval from")
SHORT = {"latents": (0, 1, 2), "sink_filter": None, "min_active": 3, "snippets": 6, "width": 7, "top": 6, "more": 3}


def ends(pattern, words: list[str], at: int) -> bool:
    return at + 1 >= len(pattern) and all(t in (-1, int(words[at - i][1:-1])) for i, t in enumerate(reversed(pattern)))


def knowing(request):
    """Knows the planted patterns: explains with the one that ends at every active token, and looks for it."""
    if request["task"] == "explain":
        active = [(e["tokens"], i) for e in request["examples"] for i, z in enumerate(e["activations"]) if z and i > 1]
        return {"explanation": [i for i, (p, _) in enumerate(PATTERNS) if all(ends(p, *at) for at in active)]}
    patterns = [PATTERNS[i][0] for i in request["explanation"]]
    return {"scores": [float(any(ends(p, s, i) for p in patterns for i in range(len(s)))) for s in request["snippets"]]}


@functools.cache
def found(**settings) -> AutoInterp:
    """Shared by tests, which leave it as it is."""
    hf, sae = planted_patterns()
    return autointerp(hf, planted_prompts(80), {"1/planted": sae}, **{**SHORT, "judge": knowing, **settings})


def test_detection_matches_scikit_learn():
    rng = np.random.default_rng(0)
    for _ in range(20):
        active, score = rng.random(12) < 0.5, rng.integers(0, 4, 12) / 4
        if 0 < active.sum() < 12:
            auc, accuracy = detection(score, active)
            assert auc == pytest.approx(roc_auc_score(active, score))
            assert accuracy == pytest.approx(balanced_accuracy_score(active, score >= 0.5))


def test_knowing_judge_is_perfect_and_blind_judge_at_chance():
    own = lines_of(found().frame, judge="knowing", of="own")
    assert (own["auc"] == 1).all() and (own["balanced_accuracy"] == 1).all()
    assert own["polarity"].tolist() == [1, 1, -1]
    other = lines_of(found().frame, judge="knowing", of="shuffled")
    assert other["auc"].mean() < 0.8  # another latent's pattern
    assert (
        set(other["shuffled_with"]) == {"0", "1", "-2"}
        and (other["shuffled_with"].str.strip("-") != other["latent"].astype(str)).all()
    )
    baseline = lines_of(found().frame, judge=BASELINE, of="own").set_index("latent")["auc"]
    assert baseline[1] == 1  # token 11 alone says it
    blind = found(judge=lambda r: {"explanation": "", "scores": [0.3] * len(r.get("snippets", ()))}, judge_name="blind")
    assert (lines_of(blind.frame, judge="blind")["auc"] == 0.5).all()


def test_snippets_are_held_out_and_balanced():
    result, z = found(), {}
    for p, tokens in enumerate(result.tokens):
        for latent, (pattern, _) in enumerate(PATTERNS):
            words = [f"⟨{t}⟩" for t in tokens]
            z[p, latent] = [i > 0 and ends(pattern, words, i) for i in range(len(tokens))]
    fit = set()
    for (latent, judge, of), some in result.snippets.groupby(["latent", "judge", "of"]):
        assert Counter(some["active"]) == {True: 6, False: 6}, (judge, of)
        assert some.groupby("active")["prompt"].nunique().min() == 6  # one of a prompt
        for _, s in some.iterrows():
            here = z[s["prompt"], latent]
            inside = window(s["position"], len(here), 7)
            assert here[s["position"]] if s["active"] else not any(here[inside])
        fit |= set(some["prompt"])
    assert len(fit) <= 40 == result.provenance["test_prompts"]
    assert found().snippets.equals(found(more=3).snippets)


def test_window_surrounds_its_token_within_the_prompt():
    assert (
        window(10, 100, 7) == slice(7, 14) and window(1, 100, 7) == slice(0, 5) and window(99, 100, 7) == slice(96, 100)
    )


def test_failing_judge_keeps_finished_latents(tmp_path):
    hf, sae = planted_patterns()
    asked: list[str] = []

    def judge(request, fails: bool):
        asked.append(request["task"])
        if fails and asked.count("score") == 3:
            raise RuntimeError("quota")
        return knowing(request)

    how = {**SHORT, "folder": tmp_path, "judge_name": "mine"}
    with pytest.raises(ResultError, match="judge 'mine' failed on task score: RuntimeError: quota"):
        autointerp(hf, planted_prompts(80), {"1/planted": sae}, judge=lambda r: judge(r, True), **how)
    assert Counter(asked) == {"explain": 3, "score": 3}
    asked.clear()
    result = autointerp(hf, planted_prompts(80), {"1/planted": sae}, judge=lambda r: judge(r, False), **how)
    assert Counter(asked) == {"score": 4}  # two latents of three, own and shuffled
    columns = ["latent", "of", "auc"]
    mine, other = (
        lines_of(r.frame, judge=name)[columns].reset_index(drop=True)
        for r, name in ((result, "mine"), (found(), "knowing"))
    )
    pd.testing.assert_frame_equal(mine, other)


def test_saved_result_and_page(tmp_path):
    result = found()
    result.write(tmp_path)
    loaded = AutoInterp.load(tmp_path)
    assert loaded.table() == result.table() and "judge" in loaded.table()
    assert caveats(loaded) is not None and len(list(loaded.headlines())) == 2
    assert loaded.explanations["examples"].tolist()[:4] == [9] * 4  # of 6 top ones and 3 more; latent 2 is rarer
    group = loaded.select(judge="knowing")[0]
    assert group["auc"].value == 1 and group["auc_above_shuffled"].value == pytest.approx(
        1 - group["auc_shuffled"].value
    )
    plt.close("all")


def test_correlation_with_alignment():
    """A correlation that is all due to frequency vanishes given its ranks; a constant has none."""
    n, rng = 40, np.random.default_rng(0)
    frequency = rng.permutation(n) / n
    own = pd.DataFrame({"alignment": frequency + 0.2 * rng.normal(size=n), "alignment_cosine": 1 + 1e-9 * np.arange(n)})
    own = own.assign(auc=frequency + 0.2 * rng.normal(size=n), frequency=frequency)
    line = correlations(own)
    assert line["r_alignment"].value == pytest.approx(own["alignment"].corr(own["auc"], method="spearman"))
    ranks = own.rank().to_numpy().T
    x, y, f = ranks[0], ranks[2], np.stack([ranks[3], np.ones(n)], 1)
    left = [v - f @ np.linalg.lstsq(f, v, rcond=None)[0] for v in (x, y)]
    given = line["r_alignment_given_frequency"]
    assert given.value == pytest.approx(np.corrcoef(*left)[0, 1]) and given.low < 0 < given.high
    assert line["r_alignment"].low > 0.5 and line["r_alignment"].n_prompts == n
    assert np.isnan(line["r_alignment_cosine"].value) and np.isnan(line["r_alignment_cosine_given_frequency"].value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"latents": (1,)}, "one latent of 1/planted"),
        ({"top": 0}, "top 0; expected 1 or more"),
        ({"judge": token_frequency, "judge_name": BASELINE}, "the name of the baseline"),
        ({"latents": (7, 1)}, r"latents \[7\] of 1/planted do not exist"),
    ],
)
def test_invalid_arguments_raise(settings, said):
    with pytest.raises(ResultError, match=said):
        found(**settings)

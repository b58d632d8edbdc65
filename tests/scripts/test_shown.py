"""What every kind of result shows: a line of `repr`, 100 columns in a terminal, a sentence first, 760 px in a notebook."""

import re

import pytest

from diagnostics.results.html_tables import _px, fitting
from diagnostics.saved import KINDS, saved_results
from tests.pages import read
from tests.scripts.conftest import ALL_LATENTS, SMALL, Script

pytestmark = pytest.mark.filterwarnings("ignore:an interval from", "ignore:fewer than", "ignore:only")
NO_RESULT = {
    "latent_card",
    "plot_depth",
    "report",
    "train_sae",
    "train_zoo",
    *(name for name in SMALL if "bench" in name),
}
RUNS = {name: (name,) for name in SMALL.keys() - NO_RESULT} | {
    "whole dictionary": ("atlas", *ALL_LATENTS),
    "polarities": ("interactions", "--parts", "polarity", "--saes", "{given}/saes/2/abstopk"),
}
"""Runs that together make every kind of result: a command's small run, with further options."""
PARTS = {"ablation_sparsity", "atom_substitution", "causal_concentration", "interactions", "latent_steering"}
MADE = {
    "ablate_features": {"feature_ablation"}, "ablate_projections": {"projections"}, "compare_saes": {"dictionary_comparison"},
    "disentangle": {"disentanglement"}, "evaluate_saes": {"sae_evaluation"}, "interactions": PARTS, "n2g": {"token_patterns"},
    "patch_direction_norm": {"direction_norm"}, "polarities": {"polarity_effects"}, "probe_saes": {"sparse_probing"},
    "specification_curve": {"direction_norm", "specification"}, "whole dictionary": {"dictionary_effects"},
    "win_rate": {"projections", "win_rate"},
}  # fmt: skip
"""The kinds that a run makes, where they are not named like it."""
SHARES = {
    "atlas": ("recall", "captured", "missed", "top-1 changed"), "bipolar_census": ("bipolar", "bipolar_mass"),
    "win_rate": ("win rate", "placebo token", "placebo isotropic"), "sparse_probing": ("k=1", "k=3", "accuracy"),
    "causal_dimension": ("eigenvectors", "most_active", "principal", "random"), "disentanglement": ("cause", "isolation", "score"),
    "dictionary_comparison": ("gradient Q4/Q1 > 2", "error > 2"), "causal_concentration": ("n50 / active", "n90 / active"),
    "atom_substitution": ("wins",), "dictionary_effects": ("top-1 changed",),
}  # fmt: skip
"""Columns that are shares, by kind of result."""


@pytest.fixture(params=sorted(RUNS))
def run(request, script: Script):
    """What a run said, and its results."""
    name, *more = RUNS[request.param]
    given = [str(word).format(given=script.given) for word in more]
    ended = script(name, *given) if given else script.finished(name)
    assert ended.status == 0, ended.err
    found = saved_results(ended.folder)
    assert {result.NAME for result in found.values()} == MADE.get(request.param, {request.param})
    return ended, found


def test_results_fit_into_a_terminal_and_a_notebook(run, monkeypatch):
    ended, results = run
    lines = ended.said.replace(str(ended.folder), "out").splitlines()
    assert max(map(len, lines)) <= 100, max(lines, key=len)
    assert not re.search(r"\bnan\b", ended.said)
    said = " ".join(ended.said.removeprefix("one pass over the text, then edits are counted\n").split())
    assert said.startswith(tuple(" ".join(result.finding().split()) for result in results.values()))
    for result in results.values():
        line = repr(result)
        assert re.fullmatch(rf"{type(result).__name__}\(.*[\d,]+ rows?\)", line) and len(line) <= 100
        sentence = result.finding()
        assert re.match(r"\S.* is \S.*\.$", sentence, re.DOTALL) and " ".join(result.table().split()).startswith(
            " ".join(sentence.split())
        )
        assert "nan" not in sentence.split()
        for column in SHARES.get(result.NAME, ()):
            ends = [end for frame in result.tables().values() for cell in frame.get(column, ()) for end in _ends(cell)]
            assert all(0 <= end <= 1 for end in ends), (column, ends)
        for frame in result.tables().values():
            if len(frame):
                shown, _ = fitting(frame, 724, _px)
                assert (
                    sum(_px(shown.iloc[:, i], str(name)) for i, name in enumerate(shown)) <= 724
                    or len(shown.columns) == 1
                )


def test_pages_begin_with_the_finding_and_fold_the_rest(script, monkeypatch):
    monkeypatch.setattr("diagnostics.results.page.pictures", lambda draw: ({}, ""))  # drawn in other tests
    (result,) = saved_results(script.finished("ablate_projections").folder).values()
    page = read(result._repr_html_())
    assert page.words.index(result.finding()) < page.words.index("÷ placebo") and page.tags.count("details") == 1


def test_every_kind_of_result_is_tested():
    assert set().union(*(MADE.get(name, {name}) for name in RUNS)) == set(KINDS)


def _ends(cell: object) -> list[float]:
    found = re.search(r"\[(\S+), (\S+)\]", str(cell))
    return [] if found is None else [float(end) for end in found.groups()]

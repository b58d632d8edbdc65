"""Labelled texts are checked at the start; where filters leave too few texts, a line says so."""

import hashlib
import json

import numpy as np
import pytest
import torch

from diagnostics.dictionary_comparison.choices import FOLDS
from diagnostics.dictionary_comparison.discovery import discovery_split
from diagnostics.dictionary_comparison.probing_gap import LabelledTexts, gap_lines
from diagnostics.dictionary_comparison.quartiles import Sample
from interventions import ResultError
from interventions.models.wrapping import wrap
from sae_models.dictionaries import Dictionary, dictionaries_of
from tests.diagnostics.dictionary_comparison.test_run import PROMPTS, saes, stream
from tests.tiny import tiny_model

N = len(PROMPTS)
LABELS = ["even" if sum(tokens) % 2 else "odd" for tokens in PROMPTS]


def texts(labels=LABELS, *groups) -> LabelledTexts:
    return LabelledTexts.of("mine", (PROMPTS, labels, *groups), None, 1)


def probes() -> dict[str, Dictionary]:
    found = dictionaries_of({name: saes()[name] for name in ("standard", "cosine")}, wrap(tiny_model("llama")), None)
    return {probe.name: probe for probe in found}


def sample(which) -> Sample:
    """All tokens but the first of some texts."""
    prompt = np.concatenate([np.full(len(PROMPTS[i]) - 1, i) for i in which])
    x = torch.cat([stream()[i][1:] for i in which])
    none = np.zeros(len(prompt), dtype=int)
    return Sample(prompt, none, x, none)


def test_hash_covers_labels_and_groups_in_order():
    some = texts()
    said = some.provenance()
    stated = json.dumps([LABELS, [str(i) for i in range(N)]])
    assert said["labels_sha256"] == hashlib.sha256(stated.encode()).hexdigest()
    assert said["counts"] == said["groups"] == {label: LABELS.count(label) for label in ("even", "odd")}
    assert said["texts"] == N and "tokens_sha256" in said
    assert texts(LABELS[::-1]).provenance()["labels_sha256"] != said["labels_sha256"]
    assert texts(LABELS, ["one", *map(str, range(1, N))]).provenance()["labels_sha256"] != said["labels_sha256"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            (PROMPTS, LABELS[1:]),
            f"labelled texts 'mine': {N - 1} labels and {N} groups for {N} texts; give each text one",
        ),
        ((PROMPTS, LABELS, ["a"]), f"{N} labels and 1 groups for {N} texts"),
        ((PROMPTS, ["a"] * N), r"1 class \(a\), where a probe needs two"),
        (
            (PROMPTS, ["rare"] * 4 + ["a"] * (N - 4)),
            f"'mine': class 'rare' has 4 texts, and {FOLDS} folds need {FOLDS}",
        ),
        ((PROMPTS, LABELS, [str(i % 4) for i in range(N)]), "has 3 groups of texts, and 5 folds need 5"),
        (([tokens[:1] for tokens in PROMPTS], LABELS), f"no token of {N} texts is left without the first 1"),
    ],
)
def test_texts_that_cannot_be_probed_raise(given, message):
    with pytest.raises(ResultError, match=message):
        LabelledTexts.of("mine", given, None, 1)


@pytest.mark.filterwarnings("ignore:an interval from")
def test_gap_line_matches_discovery_split_of_mean_latents():
    which = [i for i in range(N) if i != 3]  # one text is lost to the filters
    matches = {("standard", "cosine"): np.array([[0, 1], [5, 2], [9, 9]])}
    groups = [str(i // 2) if i < 4 else str(i) for i in range(N)]
    table, (line,) = gap_lines(texts(LABELS, groups), probes(), sample(which), matches, 3)
    assert table["text"].tolist() == which
    mean = {name: torch.stack([saes()[name].encode(stream()[i][1:]).mean(0) for i in which]) for name in probes()}
    labels, own = ([some[i] for i in which] for some in (LABELS, groups))
    a, b = (mean[name].double().numpy() for name in ("standard", "cosine"))
    expected = discovery_split(a, b, matches["standard", "cosine"], labels, groups=own, folds=FOLDS, seed=3)
    assert line["gap"]["value"] == pytest.approx(expected.gap.value)
    assert line["accuracy_a"]["value"] == pytest.approx(expected.accuracy["a"].value)
    assert (line["texts"], line["groups"], line["matches"], line["why_not"]) == (N - 1, N - 2, 3, None)


def test_too_few_filtered_texts_give_no_accuracies():
    odd = [i for i in range(N) if LABELS[i] == "odd"]
    which = sorted({*range(N)} - {*odd[4:]})
    matches = {("standard", "cosine"): np.array([[0, 1]])}
    table, (line,) = gap_lines(texts(), probes(), sample(which), matches, 0)
    assert len(table) == len(which) and "gap" not in line
    assert line["why_not"] == "of texts with a token that counts, class 'odd' has 4 texts, and 5 folds need 5"
    _, (line,) = gap_lines(texts(), probes(), sample(range(N)), {("standard", "cosine"): np.zeros((0, 2), int)}, 0)
    assert (line["matches"], line["why_not"]) == (0, "no latents are matched") and "gap" not in line

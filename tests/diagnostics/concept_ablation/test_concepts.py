"""Concepts: the texts that have them, the half that ranks latents, and the tokens that tell them."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from diagnostics.concept_ablation.concepts import (
    Concept,
    ConceptTexts,
    given_concepts,
    labelled_concepts,
    mask,
    telling_tokens,
    token_concepts,
)
from interventions.errors import TextError
from interventions.texts.prompts import as_prompts
from tests.tiny import tokenizer


def labelled(per_group: int = 1, **classes: list[str]) -> SimpleNamespace:
    texts = [text for some in classes.values() for text in some]
    labels = [name for name, some in classes.items() for _ in some]
    grouped = [f"{name}{i // per_group}" for name, some in classes.items() for i in range(len(some))]
    groups = texts if per_group == 1 else grouped
    return SimpleNamespace(texts=texts, labels=labels, groups=groups, name="three", licence="CC0")


def sentences(word: str, n: int, of: int = 10) -> list[str]:
    """Texts that share one word; the other words differ."""
    return [" ".join([word] + [f"w{3 + (7 * i + j * j) % 80}" for j in range(of)]) for i in range(n)]


def test_classes_are_balanced_concepts():
    three = labelled(a=sentences("w90", 12), b=sentences("w91", 12), c=sentences("w92", 12))
    how = {"per_class": 8, "max_length": 16}
    texts = labelled_concepts(three, tokenizer(), **how)
    assert [c.name for c in texts.concepts] == ["a", "b", "c"] and texts.labels is not None
    for c in texts.concepts:
        assert {texts.labels[i] for i in c.own} == {c.name} and len(c.own) == len(c.others) == 8
        for side in (True, False):
            assert len(texts.side(c.own, side)) == len(texts.side(c.others, side)) == 4
            others = [texts.labels[i] for i in texts.side(c.others, side)]
            assert [others.count(name) for name in ("a", "b", "c") if name != c.name] == [2, 2]
        assert texts.tokens[c.own[0]].count(c.targets[0]) == 1  # the word that all its texts have
        assert c.targets[0] == {"a": 90, "b": 91, "c": 92}[c.name]
    assert texts.provenance["licence"] == "CC0"
    again = labelled_concepts(three, tokenizer(), classes=["b"], **how)
    assert [c.name for c in again.concepts] == ["b"] and again.sha256 != texts.sha256


def test_texts_with_equal_beginnings_are_dropped_and_counted():
    twice = [text + f" w{i}" for i, text in enumerate(sentences("w90", 6) + sentences("w90", 6))]
    texts = labelled_concepts(labelled(a=twice, b=sentences("w91", 12)), tokenizer(), per_class=8, max_length=10)
    assert len({tuple(ids) for ids in texts.tokens}) == len(texts.tokens)
    dropped = texts.provenance["texts_dropped"]
    assert dropped["a: the first 10 tokens of another prompt"] == 6 and dropped["a: fewer texts than asked for"] == 2


def test_groups_are_not_split_between_sides():
    some = labelled(3, a=sentences("w90", 24), b=sentences("w91", 24))
    texts = labelled_concepts(some, tokenizer(), per_class=12, max_length=16)
    assert texts.labels is not None and len(texts.tokens) == 24
    whole = {group: {texts.ranking[i] for i in range(24) if texts.groups[i] == group} for group in texts.groups}
    assert all(len(sides) == 1 for sides in whole.values())
    for name in "ab":
        sizes = Counter(g for g, label in zip(texts.groups, texts.labels, strict=True) if label == name)
        assert sorted(sizes.values()) == [1] * 4 + [2] * 4  # 8 groups of three for 12 texts
        ranking = sum(r for r, label in zip(texts.ranking, texts.labels, strict=True) if label == name)
        assert abs(ranking - 6) <= 1  # as close to half as groups of one and two come
    assert texts.groups == tuple(texts.groups[first] for first in texts.groups)  # each named after its first text
    with pytest.raises(TextError, match="of one group, and one ranks, one measures"):
        replace(texts, ranking=tuple(i % 2 == 0 for i in range(24)))
    few = labelled(8, a=sentences("w90", 24), b=sentences("w91", 24))
    with pytest.raises(TextError, match=r"fewer than 2 texts \(or groups of texts\) with the concept"):
        labelled_concepts(few, tokenizer(), per_class=12, max_length=16)


def test_telling_tokens_by_hand():
    """With ½ added: token 5 in 4 of 4 against 0 of 4, token 6 in 3 of 4 against 1 of 4; 7 in all; 9 is special.

    Token 4 tells the texts of the measuring half, which must not choose."""
    own = [[5, 6, 7, 9], [5, 6, 7, 9], [5, 6, 7, 9], [5, 7, 8, 9]]
    others = [[6, 7, 1], [7, 1, 1], [7, 1, 2], [7, 1, 3]]
    tokens = own + [[4, 7]] * 4 + others * 2
    special, ranking = [[t == 9 for t in ids] for ids in tokens], ((True,) * 4 + (False,) * 4) * 2
    texts = ConceptTexts("hand", tokens, special, ranking, (Concept("x", tuple(range(8)), tuple(range(8, 16)), (5,)),))
    assert telling_tokens(texts, texts.concepts[0]) == (5, 6)
    assert telling_tokens(texts, texts.concepts[0], 1) == (5,)
    with pytest.raises(TextError, match="no token occurs more often"):
        telling_tokens(texts, replace(texts.concepts[0], own=tuple(range(8, 16)), others=tuple(range(8, 16))))


def test_token_concepts_are_measured_before_their_token():
    rows = [[i, 2, 3, 50, 4, 50] if i % 2 else [i, 2, 3, 4] for i in range(20, 36)]
    texts = token_concepts(as_prompts(rows, None), {"fifty": [50]}, n_texts=6)
    (concept,) = texts.concepts
    assert concept.own == (1, 3, 5, 7, 9, 11) and concept.others == (0, 2, 4, 6, 8, 10)
    assert concept.targets == (50,) and concept.positions == {i: (2, 4) for i in concept.own}
    assert sum(texts.ranking[i] for i in concept.own) == 3 == sum(texts.ranking[i] for i in concept.others)
    assert texts.labels is None


def test_given_concepts_split_their_texts_evenly():
    a, b, c = ([[i, j, 7, 8] for j in range(6)] for i in (10, 11, 12))
    given, how = {"ab": (a + b, c), "a": (a, b)}, {"targets": {"ab": [1], "a": [2]}, "special": [8]}
    texts = given_concepts("mine", given, **how)
    assert len(texts.tokens) == 18 and [c.targets for c in texts.concepts] == [(1,), (2,)]
    assert texts.special[0] == [False, False, False, True] and mask(texts)[:, 3].all()
    for concept in texts.concepts:
        for some in (concept.own, concept.others):
            assert len(texts.side(some, True)) == len(texts.side(some, False))
    assert np.array_equal(texts.ranking, given_concepts("mine", given, **how).ranking)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"own": (0, 1, 2, 99)}, "text 99 does not exist"),
        ({"others": (0, 5, 6, 7)}, "text 0 both has the concept"),
        ({"own": (0, 1, 2)}, r"fewer than 2 texts \(or groups of texts\) with the concept to measure on"),
        ({"positions": {0: (5,)}}, r"positions \[5\] of text 0"),
    ],
)
def test_invalid_concepts_raise(change, message):
    concept = Concept("x", (0, 1, 2, 3), (4, 5, 6, 7), (1,))
    whole = ([[1, 2]] * 8, [[False] * 2] * 8, (True, False) * 4)
    ConceptTexts("fine", *whole, (concept,))
    with pytest.raises(TextError, match=message):
        ConceptTexts("not", *whole, (replace(concept, **change),))
    with pytest.raises(TextError, match="one a text"):
        ConceptTexts("not", *whole, (concept,), ("y",) * 8)

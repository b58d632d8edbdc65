"""Which paragraphs are held out: always the same ones, whatever else is in the text."""

import hashlib

import pytest

from interventions.errors import TextError
from interventions.texts.held_out import split
from interventions.texts.prompts import Texts


def texts(paragraphs: list[str]) -> Texts:
    digest = hashlib.sha256("\0".join(paragraphs).encode()).hexdigest()
    return Texts(paragraphs, "some", digest, "free", "a test", {"duplicate": 3})


MANY = texts([f"Paragraph {i} speaks of {i * i % 97} things, and of {i}." for i in range(2000)])


def test_parts_are_disjoint_complete_and_in_order():
    training, held_out = split(MANY)
    assert set(training.texts).isdisjoint(held_out.texts)
    assert sorted(training.texts + held_out.texts) == sorted(MANY.texts)
    for part in (training, held_out):
        assert part.texts == [text for text in MANY.texts if text in set(part.texts)]
    assert 0.07 < len(held_out.texts) / len(MANY.texts) < 0.13  # 0.1 ± 0.007 by chance


def test_share_is_met_and_a_larger_one_only_adds_texts():
    before: set[str] = set()
    for share in (0.05, 0.1, 0.3, 0.9):
        found = set(split(MANY, share)[1].texts)
        assert found > before
        assert abs(len(found) / len(MANY.texts) - share) < 5 * (share * (1 - share) / len(MANY.texts)) ** 0.5
        before = found


def test_split_of_a_paragraph_does_not_depend_on_others():
    held_out = set(split(MANY)[1].texts)
    some = texts(MANY.texts[700:1500][::-1])
    assert set(split(some)[1].texts) == held_out & set(some.texts)


def test_paragraphs_that_begin_alike_stay_together():
    heads = [f"{i:05d}: forty letters and digits, whatever else there stands" for i in range(60)]
    both = texts(
        [start(head) + end for head in heads for start in (str.lower, str.upper) for end in ("", " – more", "!")]
    )
    held_out = set(split(both, 0.5)[1].texts)
    sides = [{text in held_out for text in both.texts[i : i + 6]} for i in range(0, len(both.texts), 6)]
    assert all(len(side) == 1 for side in sides)
    assert len(set(map(frozenset, sides))) == 2


def test_split_depends_on_the_seed():
    assert split(MANY, seed=0)[1].texts == split(MANY)[1].texts
    one, other = (set(split(MANY, 0.5, seed)[1].texts) for seed in (0, 1))
    assert 0.15 < len(one & other) / len(MANY.texts) < 0.35


def test_parts_record_their_origin():
    training, held_out = split(MANY, 0.25, seed=4)
    assert held_out.name == "some, held out (0.25 of it by blake2b, seed 4)"
    assert training.name == "some, without what is held out (0.25 of it by blake2b, seed 4)"
    assert held_out.dropped == {"duplicate": 3, "not held out": len(training.texts)}
    assert training.dropped == {"duplicate": 3, "held out": len(held_out.texts)}
    assert held_out.sha256 == hashlib.sha256("\0".join(held_out.texts).encode()).hexdigest() != MANY.sha256
    assert (held_out.licence, held_out.source) == ("free", "a test")


def test_split_rule_is_unchanged():
    """The training texts of existing SAEs must stay the same."""
    found = split(texts([f"w{i}" for i in range(40)]), 0.1)[1].texts
    assert found == [
        f"w{i}"
        for i in range(40)
        if int.from_bytes(hashlib.blake2b(f"0:w{i}".encode(), digest_size=8).digest(), "big") < 0.1 * 2**64
    ]
    assert found == ["w6", "w7", "w31"]


@pytest.mark.parametrize("share", [0, 1, -0.1, 10])
def test_invalid_shares_raise(share):
    with pytest.raises(TextError, match=f"a held-out share of {share}"):
        split(MANY, share)


def test_an_empty_part_is_refused():
    with pytest.raises(TextError, match="0 of 1 paragraphs of some would be held out; give more text"):
        split(texts(["alone"]), 0.01)

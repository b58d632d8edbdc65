import numpy as np
import pytest

from diagnostics.pairs.pair import Pair, Pairs, labels
from interventions.errors import TextError

A = Pair((5, 6, 7, 8), (5, 9, 7, 1), 3, 4)
B = Pair((5, 6, 7), (5, 6, 2), 3, 4)
PAIRS = Pairs((A, B), np.array([1.0, 2.0]), np.array([-1.0, -3.0]), {"why": 2}, {"task": "mine"})


def test_differences_of_pairs_of_unequal_length():
    assert PAIRS.differs.tolist() == [[False, True, False, True], [False, False, True, False]]
    assert PAIRS.first_difference.tolist() == [1, 2] and PAIRS.length.tolist() == [4, 3]
    assert PAIRS.clean == [[5, 6, 7, 8], [5, 6, 7]] and PAIRS.corrupt == [[5, 9, 7, 1], [5, 6, 2]]
    assert PAIRS.right.tolist() == [3, 3] and PAIRS.wrong.tolist() == [4, 4]


def test_pools():
    def pool(clean, corrupt, roles=None):
        return Pair(clean, corrupt, 3, 4, roles).pool

    same = pool((1, 2, 3), (1, 5, 3))
    assert same == pool((9, 8, 7), (9, 2, 7))
    named = pool((1, 2, 3), (1, 5, 3), ("x", "IO", "END"))
    assert named == pool((1, 2), (5, 2), ("IO", "END"))  # every position has a role: lengths may differ
    others = [
        pool((1, 2, 3), (5, 2, 3)),
        pool((1, 2, 3, 4), (1, 5, 3, 4)),
        pool((1, 2, 3), (1, 5, 3), (None, "IO", "END")),
        pool((1, 2, 3), (1, 5, 3), (None, "IO", None)),
    ]
    assert len({same, named, *others}) == 6


def test_labels_are_roles_or_else_indices():
    assert labels(A) == ["0", "1", "2", "3"]
    assert labels(Pair((1, 2, 3), (1, 5, 3), 3, 4, (None, "IO", "END"))) == ["0", "IO", "END"]


def test_first_n_pairs_keep_their_measurements():
    first = PAIRS.first(1)
    assert list(first) == [A] and first.m_clean.tolist() == [1.0] and first.m_corrupt.tolist() == [-1.0]
    for n in (0, 3):
        with pytest.raises(TextError, match=f"{n} pairs asked for; there are 2"):
            PAIRS.first(n)


def test_description_counts_pairs_and_left_out_ones():
    said = PAIRS.description
    assert said["task"] == "mine" and said["pairs"] == 2 and said["left_out"] == {"why": 2} and said["tokens"] == [3, 4]
    assert said["mean_logit_difference_clean"] == 1.5 and said["mean_logit_difference_corrupt"] == -2
    assert sorted(said["pools"].values()) == [1, 1]
    assert said["sha256"] != PAIRS.first(1).sha256


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (((1, 2), (1, 2, 3), 3, 4), "clean prompt has 2 tokens, the corrupt prompt 3"),
        (((), (), 3, 4), "expected as many, 1 or more"),
        (((1, 2), (1, 2), 3, 4), "are the same"),
        (((1, 2), (1, 3), 4, 4), "both answers are token 4"),
        (((1, 2), (1, 3), 3, 4, ("IO",)), "1 roles for 2 tokens"),
        (((1, 2), (1, 3), 3, 4, ("IO", "IO")), "'IO' stands at two positions"),
        (((1, 2), (1, 3), 3, 4, ("1", None)), "'1' reads as a position"),
    ],
)
def test_invalid_pairs_raise(given, said):
    with pytest.raises(TextError, match=said):
        Pair(*given)

"""Damaged checkpoints of every reader: refused by name, or read for what they hold."""

from collections import Counter

from tests.fuzz_saes import formats, outcomes


def test_damaged_checkpoints_are_refused_or_read_right(tmp_path):
    """Four of each format; `python -m tests.fuzz_saes` makes thousands."""
    found = outcomes(4 * len(formats()), seed=0, root=tmp_path)
    assert [one for one in found if one.fault] == []
    kinds = Counter(one.kind for one in found)
    assert kinds["refused"] > 40 and kinds["same"] > 5 and kinds["right"] > 1

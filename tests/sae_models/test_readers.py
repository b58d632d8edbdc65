"""Every reader against its format's equation in numpy, on folders written by the format's own rules and on damaged ones."""

from collections import Counter

import pytest

from tests.fuzz_saes import FORMATS, X, alike, computed, loaded, outcomes, read, write_format


@pytest.mark.parametrize("name", FORMATS)
def test_reader_computes_the_formats_equation(tmp_path, name):
    valid = FORMATS[name]
    write_format(tmp_path, valid)
    expected = valid.evaluate(read(tmp_path, valid.file), dict(valid.config or {}), X)
    assert 0.02 < (expected[0] != 0).mean() < 0.98
    assert alike(computed(loaded(tmp_path, valid.options)), expected)
    assert alike(computed(loaded(tmp_path / valid.file, valid.options)), expected)


def test_damaged_checkpoints_are_refused_or_read_correctly(tmp_path):
    """Four of each format; `make fuzz` tests thousands."""
    found = outcomes(4 * len(FORMATS), seed=0, root=tmp_path)
    assert [one for one in found if one.fault] == []
    kinds = Counter(one.kind for one in found)
    assert kinds["refused"] > 40 and kinds["same"] > 5 and kinds["right"] > 1

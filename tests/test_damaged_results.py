"""Results damaged in every way that is known here, for every kind of result."""

import pytest

from diagnostics.results.stored import Stored
from tests import fuzz_results

pytestmark = pytest.mark.filterwarnings("ignore:an interval from")


def test_damaged_results_are_refused_or_loaded_as_written(tmp_path):
    ends, wrong = fuzz_results.fuzz(tmp_path, n=144, seed=1)
    assert not wrong
    assert sum(ends.values()) - ends["not damaged"] == 144
    assert ends["refused"] > 90


def test_the_fuzz_finds_what_is_believed_unchecked(tmp_path, monkeypatch):
    """Were digests not compared, other values would be loaded, and the fuzz would say so."""
    monkeypatch.setattr(Stored, "_digests", lambda self, document, files: None)
    _, wrong = fuzz_results.fuzz(tmp_path, n=144, seed=1)
    assert sum("loaded with other values" in one for one in wrong) > 10

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


def test_fuzz_detects_missing_digest_checks(tmp_path, monkeypatch):
    """Without digests, results with other values would be loaded, and the fuzz reports them."""
    monkeypatch.setattr(Stored, "_digests", lambda self, document, files: None)
    _, wrong = fuzz_results.fuzz(tmp_path, n=144, seed=1)
    assert sum("loaded with other values" in one for one in wrong) > 10

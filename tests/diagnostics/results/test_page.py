import matplotlib.pyplot as plt
import pytest

from diagnostics.results.result import BaseResult
from diagnostics.saved import KINDS
from interventions.errors import ResultError
from tests.pages import read
from tests.reports import EVIL, Planted, measured, planted, with_provenance

pytestmark = pytest.mark.filterwarnings("ignore:an interval from")


def test_a_page_has_settings_table_caveats_and_figure():
    before = plt.get_fignums()
    html = measured()._repr_html_()
    page, p = read(html), measured().provenance
    assert page.tags.count("details") == 1 and page.tags.count("img") == 1 and plt.get_fignums() == before
    for words in ("Unit norm", measured().finding(), f"{measured().groups[0]['unit_norm'].value:.3g}", "no randomly initialised models", measured().NOTE,
                  p["model"], f"{p['prompts']} prompts", "resid_post of blocks 1, 4", f"seed {p['seed']}", "by replay"):  # fmt: skip
        assert words in page.words, words
    for light_or_dark in ("prefers-color-scheme:dark", 'data-jp-theme-light="false"', ".vscode-dark"):
        assert light_or_dark in html
    assert {kind._repr_html_ for kind in KINDS.values()} == {BaseResult._repr_html_}


def test_names_and_reasons_are_escaped_once():
    page = read(with_provenance(model=EVIL, rows_dropped={EVIL: 3}, why_hooks=EVIL)._repr_html_())
    assert "script" not in page.tags and "".join(page.text).count(EVIL) >= 3 and EVIL in page.of("img", "alt")[0]


def test_long_tables_are_cut(monkeypatch):
    monkeypatch.setattr("diagnostics.results.page._MOST_LINES", 10)
    page = read(planted()._repr_html_())
    assert page.tags.count("tr") == 11 and "The first 10 of 40 lines" in page.words


def test_a_missing_figure_has_its_reason():
    class Undrawn(Planted):
        def plot(self):
            raise ResultError("no random pairs")

    page = read(Undrawn(planted().frame, [[1]], planted().provenance)._repr_html_())
    assert "img" not in page.tags and "No figure: no random pairs" in page.words

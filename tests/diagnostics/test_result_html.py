import matplotlib.pyplot as plt
import pytest

from diagnostics.results import BaseResult
from interventions.errors import ResultError
from tests.pages import read
from tests.reports import EVIL, Planted, measured, planted, with_provenance

pytestmark = pytest.mark.filterwarnings("ignore:an interval from")


def test_a_result_shows_its_table_what_to_know_and_its_figure_once():
    before = plt.get_fignums()
    page = read(measured()._repr_html_())
    text = " ".join(page.text)
    assert page.tags.count("table") == 1 and page.tags.count("img") == 1 and plt.get_fignums() == before
    assert str(measured().groups[0]["unit_norm"].value)[:4] in text and "no untrained network" in text
    assert "Unit norm" in page.text and measured().NOTE in page.text


def test_it_says_what_was_measured():
    text = "".join(read(measured()._repr_html_()).text)
    p = measured().provenance
    for part in (p["model"], f"{p['prompts']} prompts", "resid_post of blocks 1, 4", f"seed {p['seed']}", "by replay"):
        assert part in text


def test_it_is_light_or_dark_as_its_reader_s_page_is():
    html = planted()._repr_html_()
    assert "prefers-color-scheme:dark" in html and 'data-jp-theme-light="false"' in html and ".vscode-dark" in html


def test_text_is_escaped():
    html = with_provenance(model=EVIL, rows_dropped={EVIL: 3}, why_hooks=EVIL)._repr_html_()
    assert "script" not in read(html).tags and EVIL in "".join(read(html).text)


def test_a_long_table_says_where_the_rest_is(monkeypatch):
    monkeypatch.setattr("diagnostics.result_html._MOST_LINES", 10)
    page = read(planted()._repr_html_())
    assert page.tags.count("tr") == 11 and "The first 10 of 40 lines" in "".join(page.text)


def test_a_figure_that_cannot_be_drawn_says_why():
    class Undrawn(Planted):
        def plot(self):
            raise ResultError("no random pairs")

    undrawn = Undrawn(planted().frame, [[1]], planted().provenance)
    page = read(undrawn._repr_html_())
    assert "img" not in page.tags and "No figure: no random pairs" in page.text


def test_every_kind_shows_itself_in_the_same_way():
    from diagnostics.saved import KINDS

    assert {kind._repr_html_ for kind in KINDS.values()} == {BaseResult._repr_html_}

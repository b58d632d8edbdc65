import re

import pytest

from diagnostics.headlines import Headline
from diagnostics.report_html import FIRST_LINES, report
from interventions.errors import ResultError
from tests.pages import read
from tests.reports import EVIL, measured, planted, with_provenance

pytestmark = pytest.mark.filterwarnings("ignore:an interval from")


@pytest.fixture(scope="module")
def html():
    return report({"a/unit": measured(), "planted": planted(why_hooks=["no keys"])}, title="Mine", unfinished=["b"])


def test_the_page_needs_nothing_else(html):
    page = read(html)
    assert all(where.startswith(("#", "data:image/")) for where in page.loads) and page.tags.count("img") == 2
    assert "link" not in page.tags and "@import" not in html and "url(" not in html
    assert "".join(page.of("script", "src")[0] or "") == "" and page.tags.count("script") == 1


def test_every_link_within_the_page_leads_somewhere(html):
    page = read(html)
    ids = [found["id"] for found in page.attributes if "id" in found]
    links = [where.removeprefix("#") for where in page.loads if where.startswith("#")]
    assert len(ids) == len(set(ids)) and links and set(links) <= set(ids)
    assert set(page.of("button", "aria-controls")) - {None} <= set(ids)


def test_every_result_is_told_with_what_to_know_first(html):
    text = read(html).text
    assert "a/unit" in text and "planted" in text and "Mine" in text
    assert "full forward passes in place of the fast path: no keys" in text
    assert "unfinished run, left out: b" in text and any("no untrained network" in part for part in text)


def test_the_first_numbers_stand_before_everything_else(html):
    first = html.index('id="first"')
    assert str(measured().groups[1]["unit_norm ÷ rotation"]) in html[first : html.index('id="contents"')]
    assert first < html.index("<section")


def test_long_tables_fold_and_sort(html):
    table = html[html.index('id="r2-t1"') :]
    table = table[: table.index("</table>")]
    rows = re.findall(r"<tr( class=more)?>", table)
    assert (
        len(rows) == 41
        and rows.count(" class=more") == 40 - FIRST_LINES
        and "more" not in "".join(rows[: FIRST_LINES + 1])
    )
    assert table.count("aria-sort=none><button type=button>") == 2
    keys = [float(value) for value in re.findall(r'data-v="([^"]+)"', table)]
    assert keys == [pytest.approx((7 * i) % 40 / 10) for i in range(40)]
    assert "folded" in html and "Show all 40 lines" in html


def test_more_numbers_than_the_first_screen_holds_are_counted(monkeypatch):
    monkeypatch.setattr(
        "tests.reports.Planted.headlines", lambda result: [Headline(f"n {i}", str(i), "") for i in range(11)]
    )
    text = "".join(read(report({"x": planted()})).text)
    assert "n 7" in text and "n 8" not in text and "and 3 more such numbers in x" in text


def test_hostile_text_stays_text():
    evil = with_provenance(model=EVIL, rows_dropped={EVIL: 2}, text={"name": EVIL, "sha256": EVIL})
    page = read(report({EVIL: evil}, title=EVIL, unfinished=[EVIL], code={EVIL: EVIL}))
    assert page.tags.count("script") == 1 and "".join(page.text).count(EVIL) > 8
    assert EVIL in page.of("img", "alt")[0] or "Unit norm" in page.of("img", "alt")[0]


def test_the_same_results_give_the_same_bytes(html):
    again = report({"a/unit": measured(), "planted": planted(why_hooks=["no keys"])}, title="Mine", unfinished=["b"])
    assert again == html


def test_results_made_by_different_code_are_told():
    both = {"x": planted(), "y": planted()}
    assert "code of the package differs" in report(both, code={"x": "1", "y": "2"})
    assert "code of the package differs" not in report(both, code={"x": "1", "y": "1"})


def test_without_results_there_is_no_page():
    with pytest.raises(ResultError, match="no result"):
        report({})

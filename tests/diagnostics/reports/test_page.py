import re

import pytest

from diagnostics.reports.page import FIRST_LINES, report
from diagnostics.results.headlines import Headline
from interventions.errors import ResultError
from tests.pages import read
from tests.reports import EVIL, measured, planted, with_provenance

pytestmark = pytest.mark.filterwarnings("ignore:an interval from")


def made():
    results = {"a/unit": measured(), "planted": planted(why_hooks=["no keys"])}
    return report(results, title="Mine", unfinished=["b"], damaged={"c": "cut short"})


@pytest.fixture(scope="module")
def html():
    return made()


def test_the_page_is_self_contained_and_its_links_resolve(html):
    page = read(html)
    assert all(where.startswith(("#", "data:image/")) for where in page.loads) and page.tags.count("img") == 2
    assert "link" not in page.tags and "@import" not in html and "url(" not in html
    assert page.of("script", "src") == [None]
    ids = [found["id"] for found in page.attributes if "id" in found]
    links = [where.removeprefix("#") for where in page.loads if where.startswith("#")]
    assert len(ids) == len(set(ids)) and links and set(links) <= set(ids)
    assert set(page.of("button", "aria-controls")) - {None} <= set(ids)


def test_page_lists_caveats_and_missing_results(html):
    words = read(html).words
    for said in ("Mine", "a/unit: Unit norm", "planted: planted", "full forward passes in place of the fast path: no keys",
                 "unfinished run, left out: b", "damaged result, left out: c: cut short", "no randomly initialised models"):  # fmt: skip
        assert said in words, said


def test_headlines_come_first_and_further_ones_are_counted(html, monkeypatch):
    first = html.index('id="first"')
    assert str(measured().groups[1]["unit_norm ÷ rotation"]) in html[first : html.index('id="contents"')]
    assert first < html.index("<section")
    many = [Headline(f"n {i}", str(i), "") for i in range(11)]
    monkeypatch.setattr("tests.reports.Planted.headlines", lambda result: many)
    words = read(report({"x": planted()})).words
    assert "n 7" in words and "n 8" not in words and "and 3 more such numbers in x" in words


def test_long_tables_are_folded_and_sortable(html):
    table = html[html.index('id="r2-t1"') :]
    table = table[: table.index("</table>")]
    rows = re.findall(r"<tr( class=more)?>", table)
    assert rows == [""] * (1 + FIRST_LINES) + [" class=more"] * (40 - FIRST_LINES)
    assert table.count("aria-sort=none><button type=button>") == 2
    keys = [float(value) for value in re.findall(r'data-v="([^"]+)"', table)]
    assert keys == [pytest.approx((7 * i) % 40 / 10) for i in range(40)]
    assert "folded" in html and "Show all 40 lines" in html


def test_names_and_reasons_are_escaped_once():
    evil = with_provenance(model=EVIL, rows_dropped={EVIL: 2}, text={"name": EVIL, "sha256": EVIL})
    page = read(report({EVIL: evil}, title=EVIL, unfinished=[EVIL], code={EVIL: EVIL}))
    assert page.tags.count("script") == 1 and "".join(page.text).count(EVIL) > 8


def test_same_results_give_the_same_bytes(html):
    assert made() == html


def test_different_code_versions_are_reported():
    both = {"x": planted(), "y": planted()}
    assert "code of the package differs: 1 in x; 2 in y" in report(both, code={"x": "1", "y": "2"})
    assert "code of the package differs" not in report(both, code={"x": "1", "y": "1"})


def test_no_results_raises():
    with pytest.raises(ResultError, match="no result"):
        report({})

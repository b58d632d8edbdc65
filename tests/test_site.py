"""The site is easy to find one's way in: titles differ, the gallery is whole, results begin with what was found."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
RESULTS = [page for page in PAGES if page.startswith("results/")]


def test_titles_differ():
    """A page of results and the diagnostic's page, side by side in the sidebar and in searches, are told apart."""
    titles: dict[str, list[str]] = {}
    for page, text in PAGES.items():
        if title := re.search(r"^# (.+)$", text, flags=re.MULTILINE):
            titles.setdefault(title[1].casefold(), []).append(page)
    assert {title: pages for title, pages in titles.items() if len(pages) > 1} == {}


def test_gallery_shows_every_figure_once_and_leads_to_a_page_that_explains_it():
    explained = {page: text for page, text in PAGES.items() if page.startswith(("diagnostics/", "results/"))}
    used = {name for text in explained.values() for name in re.findall(r"\]\((?:\.\./)*(\w+\.png)\)", text)}
    shown = re.findall(
        r"^- \[!\[.+\]\((?:diagnostics/)?(\w+\.png)\)\]\((\S+)\)\n\n  \S.+\.", PAGES["gallery.md"], flags=re.MULTILINE
    )
    assert used <= {name for name, _ in shown} and len(dict(shown)) == len(shown)
    assert all(page in PAGES for _, page in shown)


@pytest.mark.parametrize("page", RESULTS)
def test_results_are_finding_figure_table_command(page):
    text = PAGES[page]
    assert text.split("\n\n")[1].startswith("**")
    figure, table, command = text.find("!["), text.find("|---"), text.find("```sh")
    assert 0 < figure < command, page
    assert table < 0 or figure < table < command, page

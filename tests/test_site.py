"""The site is easy to find one's way in: titles differ, the gallery is whole, results begin with what was found."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
RESULTS = [page for page in PAGES if page.startswith("results/")]


def test_page_titles_are_unique():
    """A page of results and the diagnostic's page must be distinguishable in the sidebar and in searches."""
    titles: dict[str, list[str]] = {}
    for page, text in PAGES.items():
        if title := re.search(r"^# (.+)$", text, flags=re.MULTILINE):
            titles.setdefault(title[1].casefold(), []).append(page)
    assert {title: pages for title, pages in titles.items() if len(pages) > 1} == {}


def test_gallery_shows_every_figure_once_with_its_page():
    explained = {page: text for page, text in PAGES.items() if page.startswith(("diagnostics/", "results/"))}
    used = {name for text in explained.values() for name in re.findall(r"\]\((?:\.\./)*(\w+\.png)\)", text)}
    shown = re.findall(
        r"^- \[!\[.+\]\((?:diagnostics/)?(\w+\.png)\)\]\((\S+)\)\n\n  \S.+\.", PAGES["gallery.md"], flags=re.MULTILINE
    )
    assert used <= {name for name, _ in shown} and len(dict(shown)) == len(shown)
    assert all(page in PAGES for _, page in shown)


@pytest.mark.parametrize("page", RESULTS)
def test_result_pages_show_finding_figure_table_and_command(page):
    text = PAGES[page]
    assert text.split("\n\n")[1].startswith("**")
    figure, table, command = text.find("!["), text.find("|---"), text.find("```sh")
    assert 0 < figure < command, page
    assert table < 0 or figure < table < command, page

import re
from pathlib import Path

import jinja2
import pytest

import diagnostics
from diagnostics.figures.looks import PAGE_COLOURS
from diagnostics.results.templates import part, render

FILES = {
    path.name: path.read_text(encoding="utf-8")
    for path in Path(diagnostics.__file__).parent.rglob("templates/**/*")
    if path.is_file()
}


def test_style_sheets_use_only_the_shared_colours():
    sheets = {name: text for name, text in FILES.items() if name.endswith(("css", "html", "svg"))}
    assert len(sheets) > 10
    found = {
        name: re.findall(r"#[0-9a-f]{3,8}\b|rgba?\(\d|: ?(?:white|black)\b", text) for name, text in sheets.items()
    }
    assert {name: colours for name, colours in found.items() if colours} == {}
    known = {"z", "k", "c", *PAGE_COLOURS["light"]}
    used = {name for text in sheets.values() for name in re.findall(r"var\(--(\w+)", text)}
    assert used == known and PAGE_COLOURS["light"].keys() == PAGE_COLOURS["dark"].keys()


def test_text_is_escaped_once_and_a_missing_value_raises():
    values = {"columns": [("a & b", True)], "lines": [[("1", "<i>", 1.0)]], "most": None, "sortable": False}
    table = part("results/table.html", caption="'\"", **values)
    assert "&#39;&#34;" in table and "a &amp; b" in table and "&lt;i&gt;" in table
    page = render(
        "results/result.html",
        title="",
        lead="",
        runs=[],
        tables=[(table, 1, 1)],
        note="",
        known=[],
        figures={},
        no_figure="",
    )
    assert table in page
    with pytest.raises(jinja2.UndefinedError, match="caption"):
        render("results/table.html", **values)

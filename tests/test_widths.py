"""The check of widths finds what it is for, on pages whose overflow is planted."""

import shutil

import pytest

from tests.widths import BROWSERS, overflowing, wrong

LONG = "x" * 200


@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="no Chromium on PATH")
def test_finds_pages_code_and_boxes_that_are_too_wide(tmp_path):
    pages = {
        "fits": "<p>some words</p>",
        "code": f"<pre style='overflow-x:auto'>{LONG}</pre>",
        "clipped": f"<div style='overflow:hidden'><span>{LONG}</span></div>",
        "page": "<div style='width:600px'>wide</div>",
    }
    for name, body in pages.items():
        (tmp_path / f"{name}.html").write_text(f"<body style='margin:0;font:16px monospace'><article>{body}</article>")
    lines = overflowing(tmp_path, widths=(2500, 500))
    assert {(line["page"], line["width"], line["how"], line["tag"]) for line in lines} == {
        ("code.html", 500, "scrolls", "pre"),
        ("clipped.html", 500, "clipped", "div"),
        ("page.html", 500, "page", "html"),
    }
    assert [line["page"] for line in lines if wrong(line)] == ["clipped.html", "page.html"]

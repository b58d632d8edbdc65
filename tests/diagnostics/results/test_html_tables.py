import re

import numpy as np
import pandas as pd
import pytest

from diagnostics.results.html_tables import folded_html, table_html
from diagnostics.results.narrow import cell_text, sort_value, text_table
from diagnostics.statistics.estimate import Estimate, FiellerInterval
from tests.pages import read
from tests.reports import EVIL


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        (3, 3.0), (2.5, 2.5), (np.int64(4), 4.0), (np.nan, None), (None, None), (True, None), (np.inf, None),
        ("1.2 [1, 1.4]", 1.2), ("≥ 1e+06", 1e6), ("42%", 42.0), ("0.3% of 2304", 0.3), ("20,283", 20283.0), ("-0.5 [-1, 0]", -0.5),
        ("−0.5", -0.5), ("1.68e+03", 1680.0), ("5e-10", 5e-10), ("265 / 139", 265.0), (".5", 0.5), ("6.0 … 8.4", 6.0),
        ("15/standard", None), ("standard", None), ("", None), ("4/5/5/86", None), ("3rd", None), ("not identified", None), ("0.resid", None),
    ],
)  # fmt: skip
def test_cells_sort_by_their_number(cell, value):
    assert sort_value(cell) == value


def test_estimates_sort_by_their_value():
    for value in (0.00123, 12.3, -4.56e-7):
        assert sort_value(str(Estimate(value, value - 1, value + 1, 0.5, 9, 30))) == pytest.approx(value, rel=1e-2)
        bound = Estimate(value, np.nan, np.nan, np.nan, 9, 30, bound=True)
        assert sort_value(str(bound)) == pytest.approx(value, rel=1e-2)
    for kind in ("bounded", "exclusive", "everything", "none"):
        assert sort_value(str(FiellerInterval(1.5, -np.inf, np.inf, kind, 9, 30))) == 1.5


def test_cells_have_three_digits_or_a_dash():
    cells = {1.23456: "1.23", 7: "7", 12345: "12,345", np.nan: "–", None: "–", "x": "x", "": "–"}
    assert [cell_text(cell) for cell in cells] == list(cells.values()) and cell_text(True) == "True"


def test_numeric_columns_are_right_aligned_and_have_sort_keys():
    frame = pd.DataFrame({"sae": ["b", "a"], "KL": ["1.5 [1, 2]", "≥ 3"], "n": [2, 1]})
    page = read(table_html(frame, "a title"))
    assert page.text.count("a title") == 1 and page.of("td", "class") == ["words", None, None] * 2
    assert page.of("td", "data-v") == [None, "1.5", "2.0", None, "3.0", "1.0"]
    assert page.of("th", "class") == ["words", None, None] and page.of("th", "aria-sort") == [None] * 3
    assert "".join(page.text).replace("\n", "") == "a titlesaeKLnb1.5 [1, 2]2a≥ 31"
    assert [words for words in page.text if words.startswith(" [")] == [" [1, 2]"]
    mixed = pd.DataFrame({"mostly words": ["few", "few", "0.5"], "half": ["few", "0.5", ""]})
    assert read(table_html(mixed)).of("th", "class") == ["words", None]


def test_sortable_headers_are_buttons_and_extra_rows_marked():
    page = read(table_html(pd.DataFrame({"n": [1, 2, 3]}), most=2, sortable=True))
    assert page.of("th", "aria-sort") == ["none"] and page.of("button", "type") == ["button"]
    assert page.of("tr", "class") == [None, None, None, "more"]


def test_names_cells_and_captions_are_escaped_once():
    page = read(table_html(pd.DataFrame({EVIL: [EVIL, f"1.5 {EVIL}"]}), EVIL, sortable=True))
    assert "script" not in page.tags and "".join(page.text).count(EVIL) == 4


def wide(lines=6, columns=14):
    """A table of named intervals that neither a terminal nor a notebook's cell can hold."""
    own = {f"quantity {i}": [f"{i}.{j} [1, 20]" for j in range(lines)] for i in range(columns)}
    return pd.DataFrame({"sae": "one", "edit": [f"e{j}" for j in range(lines)], **own})


def test_wide_tables_are_transposed_or_list_hidden_columns():
    text = text_table(wide())
    assert max(map(len, text.splitlines())) <= 100 and text.startswith("(in every line: sae one)\n")
    shown, named = text.partition("Not shown:")[::2]
    for i in range(14):
        assert (f" {i}.3 [1, 20]" in shown) != bool(re.search(rf"quantity\s+{i}[,.]", named))
    turned = [line.split() for line in text_table(wide(2)).splitlines()]
    assert (
        turned[1] == ["edit", "e0", "e1"]
        and turned[2] == ["quantity", "0", "0.0", "[1,", "20]", "0.1", "[1,", "20]"]
        and len(turned) == 16
    )
    assert text_table(wide(6, 2)).splitlines()[0].split() == ["sae", "edit", "quantity", "0", "quantity", "1"]


def test_wide_tables_on_a_page_fold_extra_columns():
    page = read(folded_html(wide(), "a title"))
    heads = [words for words in page.text if words.startswith("quantity") and "," not in words]
    assert page.tags.count("table") == 2 and sorted(heads) == sorted(f"quantity {i}" for i in range(14))
    assert (
        page.text.count("e3") == 2 and "a title (in every line: sae one)" in page.text
    )  # what a line is about stands in both
    assert read(folded_html(wide(6, 2))).tags.count("table") == 1

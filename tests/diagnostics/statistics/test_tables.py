"""Lines of a table by value and group."""

import pandas as pd

from diagnostics.statistics.tables import each, lines_of, totals, where

FRAME = pd.DataFrame({"kind": ["b", "a", "b", "a"], "n": [1, 1, 2, 2], "x": [1.0, 2.0, 3.0, 4.0]})


def test_lines_are_selected_by_values_and_by_mask():
    assert lines_of(FRAME, kind="b", n=2)["x"].tolist() == [3.0]
    assert lines_of(FRAME, kind="c").empty
    assert where(FRAME, FRAME["x"] > 2)["x"].tolist() == [3.0, 4.0]


def test_groups_keep_order_or_sort_and_totals_add_up():
    assert [(key, some["x"].tolist()) for key, some in each(FRAME, ["kind"])] == [
        (("b",), [1.0, 3.0]),
        (("a",), [2.0, 4.0]),
    ]
    assert [key for key, _ in each(FRAME, ["kind", "n"], sort=True)] == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    assert totals(FRAME, "kind", ["x"])["x"].to_dict() == {"a": 6.0, "b": 4.0}

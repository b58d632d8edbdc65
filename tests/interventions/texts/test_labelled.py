"""Labelled texts from files: what is read, what is left out and counted, and a draw that hangs on nothing but seed and text."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interventions.errors import TextError
from interventions.texts import labelled
from interventions.texts.labelled import Labelled, load_labelled

ROWS = [(f"text {i} of {'abc'[i % 3]}", "abc"[i % 3]) for i in range(30)] + [("more of a", "a"), ("still more", "a")]


def table(path, rows=ROWS, head="text,label"):
    path.write_text("\n".join([head, *(f"{text},{label}" for text, label in rows)]) + "\n", encoding="utf-8")
    return str(path)


def test_all_formats_and_field_names_read_the_same(tmp_path):
    objects = "\n\n".join(json.dumps({"label": label, "text": text, "id": 1}) for text, label in ROWS)
    (tmp_path / "a.jsonl").write_text(objects)
    renamed = objects.replace('"label"', '"kind"').replace('"text"', '"said"')
    (tmp_path / "b.jsonl").write_text(renamed)
    table(tmp_path / "b.csv", head="said,kind")
    names = (
        table(tmp_path / "a.csv"),
        *(f"{tmp_path}/{n}" for n in ("a.jsonl", "b.jsonl:said:kind", "b.csv:said:kind")),
    )
    read = [load_labelled(name) for name in names]
    for found in read:
        assert (found.texts, found.labels, found.sha256) == (read[0].texts, read[0].labels, read[0].sha256)
        assert found.counts == {"a": 10, "b": 10, "c": 10} and found.classes == ("a", "b", "c")
        assert found.dropped == {"beyond 10 of a class": 2}
        assert all(label == text[-1] for text, label in zip(found.texts, found.labels, strict=True) if text[-2] == " ")
    assert [found.name for found in read] == ["a.csv", "a.jsonl", "b.jsonl", "b.csv"]
    json.dumps(read[0].provenance())


def test_numbers_are_accepted_as_labels(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"t{i}", "label": i % 2}) for i in range(4)))
    assert load_labelled(str(tmp_path / "a.jsonl")).counts == {"0": 2, "1": 2}


def test_dropped_texts_are_counted(tmp_path):
    rows = [("one", "a"), (" one ", "a"), ("two", "b"), ("both", "a"), ("both", "b"), ("  ", "a"), ("three", "b")]
    found = load_labelled(table(tmp_path / "a.csv", rows))
    assert Counter(found.labels) == {"a": 1, "b": 1} and found.texts[0] == "one"
    assert found.dropped == {"duplicate": 1, "in two classes": 2, "empty": 1, "beyond 1 of a class": 1}


def test_larger_draws_extend_smaller_ones(tmp_path):
    where = table(tmp_path / "a.csv")
    small, large = (set(load_labelled(where, per_class=n).texts) for n in (3, 8))
    assert len(small) == 9 and len(large) == 24 and small < large
    assert set(load_labelled(where, per_class=3, seed=1).texts) != small
    of_c = {text for text in small if text.endswith("of c")}
    fewer = table(tmp_path / "b.csv", [row for row in ROWS if row[1] != "b"])
    assert of_c < set(load_labelled(fewer, per_class=3).texts)
    assert load_labelled(where, per_class=500).counts == {"a": 10, "b": 10, "c": 10}
    order = [text for text, _ in ROWS]
    assert sorted(load_labelled(where).texts, key=order.index) == load_labelled(where).texts


@given(st.lists(st.tuples(st.sampled_from("pqrstuv"), st.sampled_from("ab")), max_size=25))
def test_texts_are_distinct_and_drops_are_counted(rows):
    dropped = Counter()
    found = labelled._distinct([(text, label, None) for text, label in rows], dropped)
    kinds = {text: {label for other, label in rows if other == text} for text, _ in rows}
    assert found == {text: (next(iter(labels)), text) for text, labels in kinds.items() if len(labels) == 1}
    twice = sum(len(labels) for labels in kinds.values() if len(labels) > 1)
    assert dropped["in two classes"] == twice
    assert len(found) + sum(dropped.values()) == len(rows)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,kind\nx,1\n", "line 2: no text 'text' with a label 'label'; seen: 'text', 'kind'"),
        ("a.csv", "text,label\nx,\n", "no text 'text' with a label"),
        ("a.csv", 'text,label\n"x,1\n', "not CSV"),
        ("a.jsonl", '{"text": "x", "label": 1}\n[', "line 2: not JSON"),
        ("a.jsonl", '["x"]', "seen: a list"),
        ("a.jsonl", '{"text": "x", "label": null}', "no text 'text' with a label"),
        ("a.csv", "text,label\nx,1\ny,1\n", "1 class in 2 texts"),
        ("a.csv", "text,label\n", "0 classes in 0 texts"),
        ("a.csv", b"text,label\n\xff,1\n", "not UTF-8 at byte 11"),
        ("a.txt", "x", "no labelled texts"),
        ("a.csv", "text,label,group\nx,1,g\ny,1,\n", "line 3: no text 'text' with a label 'label' and a group 'group'"),
    ],
)
def test_invalid_files_raise_with_the_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TextError) as error:
        load_labelled(str(tmp_path / name))
    assert message in str(error.value)


def test_unknown_names_and_empty_draws_raise(tmp_path):
    where = table(tmp_path / "a.csv")
    for name in ("topic", f"{where}:text", f"{where}:a:b:c:d", f"{tmp_path}/none.csv", f"{tmp_path}/none.csv:a:b"):
        with pytest.raises(TextError, match="known: topics, toxicity, sentiment, language, questions, code"):
            load_labelled(name)
    with pytest.raises(TextError, match="0 texts of each class"):
        load_labelled(where, per_class=0)


def test_labelled_texts_may_be_given_directly():
    given_texts = Labelled(["x", "y", "z"], ["b", "a", "b"], "mine", "0", "mine", "by hand")
    assert given_texts.classes == ("a", "b") and given_texts.counts == {"a": 1, "b": 2}
    assert given_texts.groups == ["x", "y", "z"] and given_texts.group_counts == given_texts.counts
    with pytest.raises(TextError, match="3 texts, 3 labels, 2 groups"):
        Labelled(["x", "y", "z"], ["b", "a", "b"], "mine", "0", "mine", "by hand", groups=["u", "v"])


def test_draws_balance_groups_and_drop_classes_with_few_groups(tmp_path):
    """Class a has 5 groups of 1 to 5 texts, b has 4 of 3, c has 3 of 9."""
    sizes = {"a": (1, 2, 3, 4, 5), "b": (3,) * 4, "c": (9,) * 3}
    rows = [(f"{label} {g} {i}", label, f"{label}{g}") for label, some in sizes.items() for g, n in enumerate(some) for i in range(n)]  # fmt: skip
    lines = "".join(f"{text},{label},{group}\n" for text, label, group in rows)
    (tmp_path / "a.csv").write_text("text,label,group\n" + lines)
    found = load_labelled(str(tmp_path / "a.csv"), per_class=9)
    assert found.counts == {"a": 9, "b": 9} and found.group_counts == {"a": 5, "b": 4}
    assert found.dropped == {"c: 3 groups, fewer than 4": 27, "beyond 9 of a class": 9}
    assert found.provenance()["groups"] == found.group_counts
    by = Counter(found.groups)
    assert sorted(by[f"a{g}"] for g in range(5)) == [1, 2, 2, 2, 2] and {by[f"b{g}"] for g in range(4)} == {2, 3}
    assert all(group == text[0] + text[2] for text, group in zip(found.texts, found.groups, strict=True))
    smaller = load_labelled(str(tmp_path / "a.csv"), per_class=6)
    assert set(smaller.texts) < set(found.texts)
    (tmp_path / "b.csv").write_text("said,kind,who\n" + lines)
    named = load_labelled(f"{tmp_path}/b.csv:said:kind:who", per_class=9)
    assert (named.texts, named.groups, named.sha256) == (found.texts, found.groups, found.sha256)
    alone = load_labelled(f"{tmp_path}/b.csv:said:kind", per_class=9)
    assert alone.classes == ("a", "b", "c") and alone.groups == alone.texts and alone.sha256 != found.sha256

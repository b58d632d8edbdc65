"""Rows of files against `csv.writer` and `json.dumps`, and every file that would lose something."""

import csv
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interventions.errors import TextError
from interventions.texts.labelled import load_labelled
from interventions.texts.prompts import load_texts
from interventions.texts.tables import csv_rows, json_rows, read_text

FIELDS = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0\r"), min_size=1)


def written(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@given(st.lists(st.tuples(FIELDS, FIELDS, FIELDS), max_size=8))
def test_written_tables_are_read_back(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "rows.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label", "id"), *rows])
    found = [tuple(row.values()) for _, row in csv_rows(path, read_text(path))]
    assert found == rows
    path.write_text("\n".join(json.dumps({"text": a, "label": b}) for a, b, _ in rows), encoding="utf-8")
    assert [(row["text"], row["label"]) for _, row in json_rows(path, read_text(path))] == [(a, b) for a, b, _ in rows]


def test_fields_of_any_length_are_read(tmp_path):
    limit = csv.field_size_limit()
    long = "word, " * 50_000
    path = written(tmp_path, "a.csv", f'text,label\n"{long}",a\nshort,b\n')
    assert load_texts(str(path)).texts == [long.strip(), "short"]
    assert load_labelled(str(path)).texts == [long.strip(), "short"]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\nHello, world,pos\n", r"line 2: 3 fields for 2 columns \('text', 'label'\).*double quotes"),
        ("text,label\nfine,a\n\nno label\n", "line 4: 1 fields for 2 columns"),
        ('text,label\n"two\nlines",a\nx,y,\n', "line 4: 3 fields for 2 columns"),
        ("label,text\npos,Hello, world\n", "line 2: 3 fields"),
        ("text,label,text\nx,a,y\n", "line 1: 3 columns, of which 'text' stands twice"),
        ("text,label,label\nx,a,b\n", "'label' stands twice"),
        ("text,label\nx\0y,a\n", "line 2: a NUL"),
        ("text,label\nx,a\n".encode("utf-16-le"), "line 1: a NUL, as in UTF-16"),
        ('text,label\n"x"y,a\n', "line 2: not CSV"),
        ("text\nfine\nHello, world\n", "line 3: 2 fields for 1 columns"),
    ],
)
def test_an_ambiguous_csv_raises(tmp_path, content, message):
    path = str(written(tmp_path, "a.csv", content))
    for read in (load_texts, load_labelled) if "label" in str(content) else (load_texts,):
        with pytest.raises(TextError, match=message):
            read(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x", "label": "a", "text": "y"}', "line 2: 'text' stands twice"),
        ("[" * 100_000, "line 2: not JSON"),
        ('{"text": "x", "label": ' + "9" * 5000 + "}", "line 2: not JSON"),
        ('{"text": "x", "label": "a"} extra', "line 2: not JSON"),
    ],
    ids=["twice", "deep", "digits", "extra"],
)
def test_an_ambiguous_jsonl_raises(tmp_path, line, message):
    path = str(written(tmp_path, "a.jsonl", '{"text": "x", "label": "b"}\n' + line))
    for read in (load_texts, load_labelled):
        with pytest.raises(TextError, match=message):
            read(path)


def test_missing_label_raises(tmp_path):
    with pytest.raises(TextError, match="line 1: no text 'text' with a label 'label'"):
        load_labelled(str(written(tmp_path, "a.jsonl", '{"text": "x", "label": NaN}')))


def test_unreadable_file_raises(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    path = written(tmp_path, "a.txt", "x")
    monkeypatch.setattr(type(path), "read_text", refused)
    with pytest.raises(TextError, match=r"cannot read .*: Permission denied"):
        load_texts(str(path))

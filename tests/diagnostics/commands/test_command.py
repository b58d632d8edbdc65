import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest

from diagnostics.commands import command
from diagnostics.running.units import Interrupted, Units
from interventions.errors import ResultError, SiteError
from sae_models.errors import BelongingError


@dataclass(frozen=True)
class Options:
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

    def with_words(main, *words, options=Options):
        monkeypatch.setattr(sys, "argv", ["some_command.py", *words])
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # put back after the test
        status = 0
        try:
            command.run(options, main)
        except SystemExit as ended:
            status = ended.code
        said = capsys.readouterr()
        return status, said.out, said.err

    return with_words


def raises(error):
    def main(options):
        raise error

    return main


def test_options_reach_main(run):
    seen = []
    assert run(seen.append, "--out", "here", "--pairs", "7") == (0, "", "")
    assert seen == [Options("here", 7)]


@pytest.mark.parametrize(
    "error",
    [
        ResultError("folder holds\n  another run;\tgo"),
        SiteError("folder holds another run; go"),
        BelongingError("folder holds another\nrun; go"),
    ],
)
def test_invalid_input_exits_2_with_one_line(run, error):
    assert run(raises(error), "--out", "x") == (2, "", "error: folder holds another run; go\n")


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("no model \x1b[2J\x1b]0;owned\x07", "no model \\x1b[2J\\x1b]0;owned\\x07"),
        ("file a\x9b31mb\x7f", "file a\\x9b31mb\\x7f"),
        ("class \u202eevil\u2066", "class \\u202eevil\\u2066"),
        ("\udcff is \u2016x\u2016 \u2248 1, 面", "\\udcff is \u2016x\u2016 \u2248 1, 面"),
    ],
)
def test_control_characters_are_written_out(run, said, shown):
    assert run(raises(ResultError(said)), "--out", "x") == (2, "", f"error: {shown}\n")

    def main(options):
        command.CommonOptions().say(f"one\t{said}\ntwo")
        warnings.showwarning(UserWarning(said), UserWarning, "a file", 1)

    assert run(main, "--out", "x") == (0, f"one     {shown}\ntwo\n", f"warning: {shown}\n")


def test_no_lock_option_leaves_the_folder_unlocked(run, tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    def main(options):
        with Units(options.out, {}):
            pass

    monkeypatch.setattr(fcntl, "flock", refused)
    status, _, err = run(main, "--out", str(tmp_path), options=command.ResumableOptions)
    assert status == 2 and "No locks available" in err and "--no-lock" in err and err.count("\n") == 1
    assert run(main, "--out", str(tmp_path), "--no-lock", options=command.ResumableOptions) == (0, "", "")


def test_other_errors_keep_their_traceback(run):
    with pytest.raises(ZeroDivisionError):
        run(raises(ZeroDivisionError()), "--out", "x")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (
            Interrupted(12, 36, Path("results/x")),
            "interrupted: 12 of 36 units are kept in results/x; the same command goes on from there",
        ),
        (Interrupted(12, 36, None), "interrupted"),
    ],
)
def test_interruption_exits_130_with_one_line(run, error, said):
    assert run(raises(error), "--out", "x") == (130, "", f"{said}\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_a_command_once_and_handlers_are_restored(run, number, code):
    reached = []

    def main(options):
        try:
            signal.raise_signal(number)
            reached.append("past the first")
        finally:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            reached.append("cleaned up")

    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert run(main, "--out", "x") == (code, "", "interrupted\n")
    assert reached == ["cleaned up"]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_second_signal_stops_a_command_that_ignored_the_first(run, monkeypatch):
    def main(options):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        now[0] += 1.5
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it went on")

    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    assert run(main, "--out", "x") == (130, "", "interrupted\n")


def test_a_signal_already_ignored_stays_ignored(run):
    def main(options):
        signal.raise_signal(signal.SIGINT)
        print("went on")

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert run(main, "--out", "x") == (0, "went on\n", "")
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--out", "x", "--pears", "3"], "--pears"),
        ([], "--out"),
        (["--out", "x", "--pairs", "many"], "--pairs"),
        (["--out", "x", "stray"], "stray"),
    ],
)
def test_invalid_command_lines_exit_2_with_one_line(run, words, named):
    def main(options):
        pytest.fail("main ran")

    status, out, err = run(main, *words)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert named in err
    assert err.endswith("; see some_command.py --help\n")
    assert not set(err) & set("─│╭╮╰╯") and "---" not in err and "full helptext" not in err
    assert "Traceback" not in err


def test_repeated_warnings_are_shown_once_with_a_count(run):
    def main(options):
        for n in ("12.5", "3e-05", "17"):
            warnings.showwarning(UserWarning(f"from\n   {n} prompts"), UserWarning, "a file", 1)
            warnings.showwarning(UserWarning("another kind"), UserWarning, "a file", 1)

    before = warnings.showwarning
    said = "warning: from 12.5 prompts\nwarning: another kind\nwarning: 2 more like “from 12.5 prompts”\n"
    assert run(main, "--out", "x") == (0, "", said + "warning: 2 more like “another kind”\n")
    assert warnings.showwarning is before


def found(n, *, how, progress):
    """A diagnostic with a result."""
    assert (n, how) == (7, True)
    if progress:
        progress(3, 3)
    return Found()


class Found:
    """What a diagnostic found."""

    def table(self):
        return "the table"

    def as_dict(self):
        return {"summary": [1.5, float("nan")], "provenance": {"where": Path("x")}}

    def write(self, folder, *, overwrite=True):
        print("somebody prints")
        (folder / "found.json").write_text("{}")
        return ["found.json"]


@pytest.fixture
def finishes(run, monkeypatch, tmp_path):
    """A command that writes what it found into --out."""

    def main(options):
        return options.measure("looking", "row", found, 7, how=True)

    return lambda *words: run(main, "--out", str(tmp_path), *words, options=command.OutputOptions)


def test_the_table_and_the_files_are_printed(finishes, tmp_path):
    status, out, err = finishes()
    assert (status, out) == (0, f"somebody prints\nthe table\nwrote found.json\ninto {tmp_path}\n")
    assert "looking" in err


def test_json_prints_one_document_and_nothing_else(finishes, tmp_path):
    status, out, err = finishes("--json")
    said = {"summary": [1.5, None], "provenance": {"where": "x"}, "out": str(tmp_path), "files": ["found.json"]}
    assert (status, json.loads(out)) == (0, said)
    assert "somebody prints" in err
    assert "the table" not in err


@pytest.mark.parametrize("words", [["--quiet"], ["--quiet", "--json"]])
def test_quiet_prints_no_table_and_no_bar(finishes, words):
    status, out, err = finishes(*words)
    assert status == 0
    if "--json" in words:
        assert (json.loads(out)["files"], err) == (["found.json"], "somebody prints\n")
    else:
        assert (out, err) == ("somebody prints\n", "")


COMMAND = """
import sys, time
from dataclasses import dataclass
from diagnostics.commands.command import CommonOptions, run

@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    "What it does."
    out: str = ""
    "a file"

def main(options):
    sys.stdin.read()  # until the reader of stdout has gone
    for line in range(3):
        options.say(f"table {line}")
    open(options.out, "w").write("finished")
    return {}

run(Options, main)
"""


@pytest.mark.parametrize(
    ("words", "code", "made"), [((), 0, True), (("--json",), 141, True), (("--help",), 141, False)]
)
def test_closed_pipe_loses_no_work_and_shows_no_traceback(tmp_path, words, code, made):
    file, (reads, writes) = tmp_path / "file", os.pipe()
    line = [sys.executable, "-c", COMMAND, *words, "--out", str(file)]
    process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=writes, stderr=subprocess.PIPE, text=True)
    os.close(reads)
    os.close(writes)
    said = process.communicate("")[1]
    assert (process.returncode, said, file.exists()) == (code, "", made)

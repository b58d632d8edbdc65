"""One kill of a run that overwrites another and one of SAE training; `make kills` is the long run."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
def test_resumed_commands_leave_the_same_files_after_sigkill():
    words = ["-m", "tests.kills", "--kills", "2", "--seed", "1", "--cases", "overwrite", "train"]
    ended = subprocess.run([sys.executable, *words], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("1 kills") == 2 and ended.stdout.count(" 0 wrong") == 2

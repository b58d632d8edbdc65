"""A few kills of each command; `python -m tests.kills` is the long run."""

import subprocess
import sys
from pathlib import Path


def test_killed_and_resumed_commands_leave_the_same_files():
    words = ["-m", "tests.kills", "--kills", "4", "--seed", "1"]
    ended = subprocess.run([sys.executable, *words], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("1 kills") == 4 and ended.stdout.count(" 0 wrong") == 4

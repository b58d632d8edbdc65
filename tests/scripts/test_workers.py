"""Options for workers and parts: the same files as without them, and each failure on one line with code 2."""

import sys

import pytest

NAME = "patch_direction_norm"


def test_parts_are_joined_by_the_same_command(script):
    part = script(NAME, "--part", "2/2")
    assert (part.status, part.err) == (0, "") or "%|" in part.err
    assert part.said.startswith("part 2/2: ") and part.said.count("\n") == 1 and "part 1/2 lacks" in part.said
    assert "part 1/2 lacks 2 units; run --part 1/2, then join" in script(NAME).error
    assert "cannot" not in script(NAME, "--part", "1/2").err
    joined = script(NAME)
    assert joined.status == 0 and joined.files == script.finished(NAME).files


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--part", "3/2"), "part 3/2; expected i/n with i from 1 to n"),
        (("--part", "1 of 2"), "--part 1 of 2; expected i/n, such as 1/4"),
        (("--part", "1/2", "--workers", "2"), "a part is computed by one process; give a part, or workers"),
        (("--workers", "0"), "--workers 0; expected 1 or more"),
        (("--ray", "127.0.0.1:1"), "no Ray at 127.0.0.1:1 (Connection refused); start one: ray start --head"),
    ],
)
def test_failures_are_one_line(script, words, said):
    assert script(NAME, *words).error == said


def test_ray_is_not_installed(script, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert script(NAME, "--workers", 2).error == "workers need Ray, which is not installed: pip install 'mechdiag[ray]'"

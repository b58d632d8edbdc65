"""Options for workers and parts: the same files as without them, and each failure on one line with code 2."""

import contextlib
import json
import os
import sys

import pytest

from diagnostics.commands import command
from diagnostics.running.place import Place, placed_at

pytestmark = pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")  # Ray's own
NAME = "patch_direction_norm"
COMMANDS = (
    *("activation_patching", "atlas", "compare_saes", "patch_direction_norm", "ablate_features", "ablate_projections"),
    *("dose_response", "edge_patching", "interactions", "probe_saes", "shapley", "specification_curve"),
    *("unit_norm", "win_rate"),
)
"""all that run units; `make kills` tries every one, the daily tests the first two"""


def test_parts_are_joined_by_the_same_command(script):
    part = script(NAME, "--part", "2/2")
    assert part.status == 0 and "error" not in part.err
    assert part.said.startswith("part 2/2: ") and part.said.count("\n") == 1 and "part 1/2 lacks" in part.said
    assert "part 1/2 lacks 2 units; run --part 1/2, then join" in script(NAME).error
    assert script(NAME, "--part", "1/2").status == 0  # nothing is missing any more, so that it joins too
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
def test_invalid_options_give_one_line(script, words, said):
    assert script(NAME, *words).error == said


def test_missing_ray_is_an_error(script, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert script(NAME, "--workers", 2).error == "workers need Ray, which is not installed: pip install 'mechdiag[ray]'"


@pytest.mark.long  # one command; `make kills` runs every one
@pytest.mark.parametrize("name", COMMANDS if os.environ.get("MECHDIAG_ALL_COMMANDS") else COMMANDS[:1])
def test_every_command_leaves_the_same_files_on_workers(name, pool, script, monkeypatch):
    alone, given = script.finished(name), []
    monkeypatch.setattr(command.ResumableOptions, "elsewhere", lambda self: placed_at(Place(pool=pool)))
    monkeypatch.setattr(pool, "compute", lambda *how, compute=pool.compute: (given.append(how), compute(*how)))
    run = script(name)
    assert run.status == 0, run.err
    assert given and run.files == alone.files


@pytest.mark.long
def test_bench_compares_one_worker_with_several(pool, script, monkeypatch):
    @contextlib.contextmanager
    def started(n):
        asked.append(n)
        with placed_at(Place(pool)):
            yield pool

    asked = []
    script.patch(monkeypatch, "bench_workers", workers=started)
    run = script("bench_workers")
    assert run.status == 0, run.err
    rows = json.loads((run.folder / "bench_workers.json").read_text())["rows"]
    assert asked == [row["workers"] for row in rows] == [1, 2, 1, 2]
    for one, two in zip(rows[::2], rows[1::2], strict=True):
        assert one["run"] == two["run"] and 0 < one["work"] < one["all"]
        assert two["work ratio"] == one["work"] / two["work"] and two["all ratio"] == one["all"] / two["all"]

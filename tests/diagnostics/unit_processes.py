"""Processes that run units and are killed or stopped by a test."""

import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from diagnostics.commands import command
from diagnostics.running.units import Unit, run_units

IDENTITY = {"code": "of the tests", "settings": {"pairs": 200, "layers": [7, 22]}, "texts_sha256": "ab"}
SHARDS = [Unit.of(rows=10 * (shard + 1), context="in_place", shard=shard) for shard in range(4)]

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload([__name__])


def numbers(unit: Unit) -> pd.DataFrame:
    rng = np.random.default_rng(unit["shard"])
    kl = rng.random(unit.rows).astype(np.float32)
    return pd.DataFrame({"shard": unit["shard"], "kl": kl, "edit": rng.choice(["norm", "full"], unit.rows)})


def die_at(n: int) -> None:
    """Kill this process at the nth moment at which the disk is about to change, or has just changed."""
    count = 0

    def moment() -> None:
        nonlocal count
        count += 1
        if count == n:
            os.kill(os.getpid(), signal.SIGKILL)

    fsync, replace = os.fsync, os.replace

    def half_written_first(handle: int) -> None:
        size = os.fstat(handle).st_size
        whole = os.pread(os.open(f"/proc/self/fd/{handle}", os.O_RDONLY), size, 0)
        os.ftruncate(handle, size // 2)
        moment()
        os.pwrite(handle, whole, 0)
        moment()
        fsync(handle)

    def replaced(*paths) -> None:
        moment()
        replace(*paths)
        moment()

    os.fsync, os.replace = half_written_first, replaced


def work(folder: Path, reported: Path, dies_at: int) -> None:
    """Run all units. `reported` gets a line for each that progress has counted."""
    die_at(dies_at)
    with reported.open("w", buffering=1) as file:
        run_units(
            SHARDS,
            folder,
            lambda unit, tick: (numbers(unit), {}),
            identity=IDENTITY,
            progress=lambda *_: file.write(".\n"),
        )


@dataclass(frozen=True)
class Settings:
    """A sweep."""

    out: str


def command_that_hangs(folder: Path, reached: Path) -> None:
    """A command that computes two units and hangs in the third. Its standard error goes to `reached`.said."""
    os.dup2(os.open(reached.with_suffix(".said"), os.O_WRONLY | os.O_CREAT), 2)

    def compute(unit, tick):
        if unit["shard"] == 2:
            reached.touch()
            time.sleep(600)
        return numbers(unit), {}

    sys.argv = ["sweep.py", "--out", str(folder)]
    command.run(Settings, lambda settings: run_units(SHARDS, settings.out, compute, identity=IDENTITY))

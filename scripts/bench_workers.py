#!/usr/bin/env python
"""What a second worker is worth: CPU seconds of the longest worker, of one worker and of several, in one sitting."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from diagnostics.commands import command
from diagnostics.commands.ranges import PositiveInt
from diagnostics.direction_vs_norm.run import direction_norm
from diagnostics.patching.run import activation_patching
from diagnostics.running.workers import workers
from interventions.errors import ResultError
from interventions.files import claim_folder, write_json
from interventions.models.loading import load_model
from interventions.models.names import DEFAULT_MODEL
from interventions.provenance import model_provenance
from interventions.texts.prompts import load_texts, tokenize


@dataclass(frozen=True, kw_only=True)
class BenchOptions(command.OutputOptions):
    """CPU seconds of the longest worker: one worker beside several, one thread each, and whether their tables are the same.

    Counted are CPU seconds and not the clock, so that other work on the machine does not decide. `work` is clean passes, checks and
    units; `all` counts the start of the worker (libraries, the model and its hash) too, which long runs do not notice.

    Example:
      scripts/bench_workers.py --out results/bench_workers
    """

    model: str = DEFAULT_MODEL
    """smollm2-135m (packaged), a folder, or a Hugging Face hub id"""
    n: PositiveInt = 2
    """workers beside one"""
    prompts: str = "boolq"
    """text of direction against norm: boolq (packaged), or a file"""
    n_prompts: PositiveInt = 128
    """prompts of direction against norm"""
    pairs: PositiveInt = 100
    """pairs of tokens of direction against norm"""
    task: str = "ioi"
    """pairs of activation patching, at z in two blocks: a task, or a CSV"""
    tasks: PositiveInt = 16
    """how many of them"""
    device: str | None = None
    """cpu, cuda, cuda:1 (default: cuda if available)"""
    out: Path
    """folder for bench_workers.json"""


def main(options: BenchOptions) -> command.Document:
    """Run the command: one table, with ratios of numbers from this run."""
    out = claim_folder(options.out, ["bench_workers.json"], options.overwrite)
    texts = load_texts(options.prompts)
    model = load_model(options.model, device=options.device)
    prompts = tokenize(texts, model.tokenizer, max_length=128, n_prompts=options.n_prompts, seed=0)
    last = model.n_layers - 1
    runs: dict[str, Callable[[], Any]] = {
        "direction_norm": lambda: direction_norm(
            model, prompts, layers=[last // 4, last // 2, 3 * last // 4], pairs=options.pairs
        ),
        "activation_patching": lambda: activation_patching(
            model, options.task, n=options.tasks, layers=[last // 3, 2 * last // 3]
        ),
    }
    found = []
    for name, call in runs.items():
        tables = []
        for n in (1, options.n):
            begun = time.perf_counter()
            with workers(n) as pool:
                tables.append(call().to_frame())
                assert pool is not None
                spent = pool.cpu()
            longest = {what: max(each[what] for each in spent) for what in ("work", "all")}
            found.append({"run": name, "workers": n, **longest, "wall": time.perf_counter() - begun})
        if not tables[0].equals(tables[1]):
            raise ResultError(f"the table of {name} depends on the number of workers")
        one, several = found[-2], found[-1]
        several |= {f"{what} ratio": one[what] / several[what] for what in ("work", "all")}
    options.say(pd.DataFrame(found).to_string(index=False, float_format=lambda x: f"{x:.3g}"))
    options.say("work, all: CPU seconds of the longest worker; ratio: one worker's by theirs; the tables are the same")
    document = {"rows": found, "provenance": model_provenance(model)}
    write_json(out / "bench_workers.json", document)
    return document


if __name__ == "__main__":
    command.run(BenchOptions, main)

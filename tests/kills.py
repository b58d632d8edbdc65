"""Commands killed at random moments and run again until they finish: every file must be as an undisturbed run leaves it.

`python -m tests.kills --kills 40 --seed 0` says how many kills there were and exits 1 with the names of files that differ.
"""

import argparse
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from diagnostics.atlas.result import CausalAtlas
from diagnostics.direction_vs_norm.result import DirectionNorm
from diagnostics.patching.result import ActivationPatching
from diagnostics.results.result import BaseResult
from interventions.errors import ResultError
from tests.tiny import prompts, tiny_model, tokenizer

SCRIPTS = Path(__file__).parents[1] / "scripts"


@dataclass(frozen=True)
class Case:
    """A command in a folder."""

    script: str
    words: tuple[object, ...]
    before: tuple[object, ...] | None = None
    """words of a run that is finished in the folder first"""
    kind: type[BaseResult] | None = None
    """what it writes"""
    beside: tuple[object, ...] = ()
    """words of the runs that are killed, which must leave what a run without them does"""
    workers: bool = False
    """kill its workers, which it must outlive"""


def cases(folder: Path) -> dict[str, Case]:
    """Patching, an atlas, SAE training, patching with --overwrite, and three diagnostics on workers, of which workers or the process
    that started them are killed; on a tiny model and texts written to `folder`."""
    tiny_model("llama").save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    texts = [" ".join(f"w{i}" for i in ids) for ids in prompts(tuple(14 + (7 * i) % 11 for i in range(140)))]
    (folder / "text.txt").write_text("\n\n".join(texts) + "\n")
    given = ("--model", folder / "model", "--prompts", folder / "text.txt", "--device", "cpu", "--quiet")
    patch = (*given, "--n-prompts", 140, "--layers", 1, 4, "--context", "both", "--pairs", 60)
    train = (
        *given, "--layers", 1, 4, "--d-sae", 64, "--k", 4, "--tokens", 4096, "--batch-tokens", 128, "--buffer-tokens", 512,
        "--held-out", 0,
    )  # fmt: skip
    saes = (folder / "saes" / "1" / "standard", folder / "saes" / "4" / "standard")
    atlas = (*given, "--saes", *saes, "--n-prompts", 40, "--held-out", 0)
    activations = ("--model", folder / "model", "--device", "cpu", "--quiet", "--pairs", folder / "pairs.csv")
    (folder / "pairs.csv").write_text(_pairs())
    shared = {
        "patch": Case("patch_direction_norm", patch, kind=DirectionNorm),
        "atlas": Case("atlas", atlas, kind=CausalAtlas),
        "activations": Case("activation_patching", (*activations, "--layers", 1, 4), kind=ActivationPatching),
    }
    on_workers = {
        f"{name}, {whom} killed": replace(case, beside=("--workers", 2), workers=whom == "workers")
        for name, case in shared.items()
        for whom in ("workers", "driver")
    }
    return {
        "patch": Case("patch_direction_norm", patch, kind=DirectionNorm),
        "train": Case("train_sae", train),
        "atlas": Case("atlas", atlas, kind=CausalAtlas),
        "overwrite": Case(
            "patch_direction_norm", (*patch, "--seed", 1, "--overwrite"), before=patch, kind=DirectionNorm
        ),
        **on_workers,
    }


def _pairs() -> str:
    """A CSV of pairs of prompts of equal length, whose clean prompt favours the right answer more."""
    lines, model = ["clean,corrupt,right,wrong"], tiny_model("llama")
    for i, ids in enumerate(prompts((9,) * 48)):
        ids = [30 + j % 60 for j in ids]
        both = [ids, [*ids[:3], 30 + (ids[3] - 23) % 60, *ids[4:]]]
        answers = [30 + i % 20, 60 + i % 20]
        m = model(torch.tensor(both)).logits[:, -1, answers] @ torch.tensor([1.0, -1.0])
        said = (" ".join(f"w{j}" for j in x) for x in both)
        lines.append(",".join([*said, *(f" w{j}" for j in (answers if m[0] > m[1] else answers[::-1]))]))
    return "\n".join(lines) + "\n"


def start(case: Case, out: Path) -> int:
    """The process of a command, forked from this one, which has imported what it needs."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        said = os.open(out.with_suffix(".said"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1), os.dup2(said, 2)
        sys.argv = [f"{case.script}.py", *map(str, case.words), "--out", str(out)]
        runpy.run_path(str(SCRIPTS / f"{case.script}.py"), run_name="__main__")
        status = 0
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def ended(pid: int) -> int:
    """The status of a process, minus the signal's number where one ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run(case: Case, out: Path) -> float:
    """Run a command to its end; the seconds it took."""
    begun = time.monotonic()
    status = ended(start(case, out))
    if status:
        raise AssertionError(f"exit {status}: {out.with_suffix('.said').read_text()}")
    return time.monotonic() - begun


def files(out: Path) -> dict[str, bytes]:
    """Every file below a folder, but those that are only locked."""
    every = {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in sorted(every.items()) if name not in (".lock", "lock")}


def sound(case: Case, out: Path, known: list[BaseResult]) -> bool:
    """Whether what lies in a folder is a whole result of one of the runs, or refused."""
    if case.kind is None:
        return True
    try:
        found = case.kind.load(out)
    except ResultError:
        return True
    return any(found.to_frame().equals(whole.to_frame()) and found.provenance == whole.provenance for whole in known)


def workers_of(pid: int) -> list[int]:
    """The Ray workers that descend from a process."""
    parents, names = {}, {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            names[int(status.parent.name)] = (status.parent / "cmdline").read_text()
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it ended meanwhile
            continue
    found = []
    for one, name in names.items():
        above = one
        while above in parents and above != pid:
            above = parents[above]
        if above == pid and name.startswith("ray::Worker"):
            found.append(one)
    return found


def kill_workers(pid: int, out: Path, moments: list[int]) -> int:
    """Kill a worker of a command when so many units are there; how many were killed before it ended."""
    killed = 0
    for moment in sorted(moments):
        while len(list((out / "units").glob("*.parquet"))) < moment or not (some := workers_of(pid)):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return killed
            time.sleep(0.002)
        os.kill(some[-1], signal.SIGKILL)
        killed += 1
    return killed


def disturbed(case: Case, folder: Path, kills: int, rng: random.Random, say: Callable[[str], object]) -> list[str]:
    """Kill a command so many times, in one folder after another, resuming each until it is finished; what went wrong."""
    folder.mkdir()
    whole, known = folder / "whole", []
    if case.before is not None:
        run(Case(case.script, case.before), folder / "before")
        shutil.copytree(folder / "before", whole)
        known += [case.kind.load(whole)] if case.kind else []
    seconds = run(case, whole)
    known += [case.kind.load(whole)] if case.kind else []
    expected, wrong, killed, round = files(whole), [], 0, 0
    n_units = len(list((whole / "units").glob("*.parquet")))
    case = replace(case, words=(*case.words, *case.beside))
    if case.beside:
        seconds = run(case, folder / "undisturbed")
        wrong += [
            f"{n} depends on workers" for n, data in files(folder / "undisturbed").items() if expected.get(n) != data
        ]
    while killed < kills:
        out = folder / f"out-{round}"
        if case.before is not None:
            shutil.copytree(folder / "before", out)
        status = -1
        while status:
            pid = start(case, out)
            if case.workers and killed < kills:
                killed += kill_workers(pid, out, [rng.randrange(n_units) for _ in range(kills - killed)])
            elif killed < kills:
                time.sleep(rng.uniform(0, seconds))
                os.kill(pid, signal.SIGKILL)
            status = ended(pid)
            if status not in (0, -signal.SIGKILL):
                return [*wrong, f"exit {status}: {out.with_suffix('.said').read_text()}"]
            killed += status == -signal.SIGKILL
            if status and not sound(case, out, known):
                wrong.append(f"after kill {killed}: a result that no run wrote is loaded")
        found = files(out)
        differ = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
        wrong += [f"{name} is not as an undisturbed run leaves it" for name in differ]
        round += 1
    say(f"{killed} kills, {round} runs finished, {len(expected)} files compared in each, {len(wrong)} wrong")
    return wrong


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=40, help="in all, shared by the cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", nargs="*", help="default: all")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rng, wrong = random.Random(given.seed), []
    with tempfile.TemporaryDirectory() as place:
        every = cases(Path(place))
        chosen = given.cases or list(every)
        if any(name.startswith("atlas") for name in chosen):
            run(every["train"], Path(place) / "saes")
        for name in chosen:
            each = -(-given.kills // len(chosen))
            found = disturbed(
                every[name], Path(place) / name, each, rng, lambda said, name=name: print(f"{name}: {said}", flush=True)
            )
            wrong += [f"{name}: {one}" for one in found]
    for one in dict.fromkeys(wrong):
        print(one, file=sys.stderr)
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()

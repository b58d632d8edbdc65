"""Small runs of every question on the packaged model, and a hash of each table: two commits that agree give the same file.

`python -m tests.tables OUT` runs this checkout and writes OUT/hashes.txt; `--checkout FOLDER` runs another one, and
`--against OTHER/hashes.txt` prints what differs and exits 1. One thread, on the CPU.

A table's hash is of its columns (names, types and values in order), not of the file, whose metadata holds versions. Beside tables:
token ids; the summary in each JSON, and its numbers alone, which stay when a key is renamed; what the command printed, but for lines
that name the folder. Runs that OUT holds already are not run again.
"""

import argparse
import difflib
import hashlib
import json
import os
import random
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

# Ten prompts is the least that gives an interval.
SHORT = ("--n-prompts", 12, "--max-length", 32)
NULL = ("--null-model", "random", "--null-seeds", 1)
PAIRS = ("--n-prompts", 40, "--max-length", 32, "--pairs", 14)
LABELLED = ("--layers", 15, "--max-length", 24)
WORDS = "the river town old king went north saw two ships near a stone bridge and sang"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
}


def runs(out: Path) -> dict[str, tuple[object, ...]]:
    """The words of each command but --out, by the run's name; the inputs that they read are written into `out`."""
    text, direction = out / "inputs/text.txt", out / "inputs/direction.npy"
    text.parent.mkdir(exist_ok=True)
    text.write_text("\n\n".join(_paragraphs()) + "\n")
    np.save(direction, np.sin(np.arange(576, dtype=np.float32)))
    return {
        "direction_norm": (
            "patch_direction_norm.py", *PAIRS, *NULL, "--layers", 7, 22, "--sites", "resid_post", "attn_out",
        ),
        "direction_norm_ahead": (
            "patch_direction_norm.py", *PAIRS, "--layers", 15, "--context", "in_place", "--horizon", 3,
        ),
        "dose_response": (
            "dose_response.py", *SHORT, *NULL, "--layers", 7, 22, "--tokens", 12, "--doses", 0.1, 0.5, "--directions", direction,
            "--context", "both",
        ),
        "unit_norm": ("unit_norm.py", *SHORT, *NULL, "--layers", 7, 22, "--tokens", 24),
        "specification": (
            "specification_curve.py", *PAIRS, "--prompts", f"boolq,{text}", "--layers", 3, 15, 22, 29,
        ),
        "projections": (
            "ablate_projections.py", *SHORT, "--layers", 7, "--saes", "cosine", "--latents", 6, "--tokens-per-latent", 6,
            "--sampling", "active", "--reference", "mean", "--detail", 0.5,
        ),
        "win_rate": (
            "win_rate.py", *SHORT, "--layers", 15, "--latents", 12, "--tokens-per-latent", 24, "--draws", 10, "--min-tokens", 4,
            "--single-token-share", 0.5,
        ),
        "atlas": (
            "atlas.py", "--layers", 15, "--n-prompts", 3, "--max-length", 12, "--path-share", 0.3, "--placebo-share", 0.2,
        ),
        "feature_ablation": (
            "ablate_features.py", *LABELLED, "--saes", "standard", "--data", "code", "--per-class", 24, "--counts", 1, 5,
            "--reads", 3, "--arms", "selected", "random", "placebo", "keep", "--rankings", "mean_difference", "probe", "attribution",
        ),
        "probing": ("probe_saes.py", *LABELLED, "--data", "code", "sentiment", "--per-class", 24, "--ks", 1, 5, "--seeds", 2),
        "dictionary_comparison": (
            "compare_saes.py", *LABELLED, "--n-prompts", 40, "--min-active", 3, "--min-quartile", 2, "--causal-latents", 6,
            "--causal-tokens", 3, "--duplicate-cosine", 0.5, "--data", "code", "--per-class", 24,
        ),
        "interactions": (
            "interactions.py", *SHORT, "--layers", 15, "--saes", "standard", "--n-tokens", 8, "--per-token", 4, "--matrix-latents", 8,
            "--min-tokens", 2, "--latents", 6, "--tokens-per-latent", 2, "--coefficients", 1, 8, "--ahead", 4,
        ),
        "evaluation": (
            "evaluate_saes.py", "--saes", "smollm2-135m/15/standard", "smollm2-135m/15/cosine", *SHORT, "--prompts-second", text,
            "--splice-prompts", 12,
        ),
        "cards": (
            "latent_card.py", *SHORT, "--saes", "smollm2-135m/15/cosine", "--latents", "frequent:2", "--effects", 12,
            "--compare", "smollm2-135m/15/standard",
        ),
        "depth": ("plot_depth.py", *(out / name for name in ("direction_norm", "dose_response", "unit_norm", "win_rate", "atlas"))),
    }  # fmt: skip


def _paragraphs() -> Iterator[str]:
    """A text of fixed words, the same at every call."""
    words, draw = WORDS.split(), random.Random(0)
    for _ in range(200):
        yield " ".join(draw.choices(words, k=40)).capitalize() + "."


def ran(name: str, words: tuple[object, ...], checkout: Path, out: Path) -> str:
    """Run a command of the checkout into out/name; what it printed. Exits where the command fails."""
    script, *options = map(str, words)
    command = [sys.executable, str(checkout / "scripts" / script), *options, "--out", str(out / name)]
    if "plot_depth" not in script:
        command += ["--device", "cpu"]
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(checkout)}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    (out / f"{name}.stderr").write_text(done.stderr)
    if done.returncode:
        raise SystemExit(f"{name}: exit {done.returncode}\n{done.stderr[-2000:]}")
    return "".join(line for line in done.stdout.splitlines(keepends=True) if str(out) not in line)


def hashes(folder: Path, printed: str) -> Iterator[tuple[str, str]]:
    """What is compared of a finished run, by file, and its hash."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if "units" in path.relative_to(folder).parts:
            continue
        if path.suffix == ".parquet":
            yield name, _hash(table_content(path))
        elif path.suffix == ".npy":
            array = np.load(path)
            yield name, _hash(f"{array.dtype} {array.shape}", array.tobytes())
        elif path.suffix == ".csv":
            yield name, _hash(path.read_bytes())
        elif path.suffix == ".json" and "summary" in (document := json.loads(path.read_text())):
            yield f"{name}:summary", _hash(json.dumps(document["summary"]))
            yield f"{name}:numbers", _hash(json.dumps(sorted(numbers(document["summary"]), key=repr)))
    yield "printed", _hash(printed)


def table_content(path: Path) -> str:
    """Names, types and values of a table's columns, in order; floating-point values as digits that tell any two apart."""
    table = pq.read_table(path)
    return repr([(n, str(c.type), c.to_pylist()) for n, c in zip(table.column_names, table.columns, strict=True)])


def numbers(document: Any) -> Iterator[float]:
    """All numbers in a JSON document."""
    if isinstance(document, dict | list):
        for part in document.values() if isinstance(document, dict) else document:
            yield from numbers(part)
    elif isinstance(document, int | float) and not isinstance(document, bool):
        yield document


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _hash(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()


def main() -> None:
    """Run what is asked for, print a line a table, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="runs, in place of all")
    parser.add_argument("--checkout", type=Path, default=Path(__file__).parents[1], help="whose commands are run")
    parser.add_argument("--against", type=Path, help="hashes.txt of another run")
    given = parser.parse_args()
    out, checkout = given.out.resolve(), given.checkout.resolve()
    out.mkdir(parents=True, exist_ok=True)
    every = runs(out)
    if unknown := set(given.only or ()) - every.keys():
        parser.error(f"unknown run {', '.join(sorted(unknown))}; known: {', '.join(every)}")
    lines = []
    for name in given.only or every:
        if not (said := out / f"{name}.printed").exists():
            before = _children_seconds()
            printed = ran(name, every[name], checkout, out)
            print(f"{name}: {_children_seconds() - before:.0f} s of CPU", file=sys.stderr, flush=True)
            said.write_text(printed)
        found = [f"{name} {what} {digest}" for what, digest in hashes(out / name, said.read_text())]
        print(*found, sep="\n", flush=True)
        lines += found
    (out / "hashes.txt").write_text("\n".join(lines) + "\n")
    if given.against:
        known = [x for x in given.against.read_text().splitlines() if not given.only or x.split()[0] in given.only]
        differ = [line for line in difflib.ndiff(known, lines) if line[0] in "-+"]
        print(f"{len(differ)} lines differ from {given.against}", *differ, sep="\n")
        raise SystemExit(bool(differ))


if __name__ == "__main__":
    main()

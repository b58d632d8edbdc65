"""Damaged results of every kind: each is refused with an error of ours, or loaded as it was written.

`python -m tests.fuzz_results --n 2000 --seed 0` damages as many, says what came of them, and exits 1 where one was loaded with other
values, or ended otherwise than in an error of ours.
"""

import argparse
import contextlib
import functools
import io
import json
import pickle
import random
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.projections.result import ProjectionEffects
from diagnostics.results.result import BaseResult
from diagnostics.results.stored import DIGESTS
from diagnostics.saved import KINDS, sound_and_damaged
from diagnostics.whole_dictionary.columns import ROWS
from diagnostics.whole_dictionary.result import whole_table
from diagnostics.win_rate.result import WinRateReport
from diagnostics.win_rate.run import win_rate_report
from interventions.errors import MechdiagError
from interventions.files import jsonable
from tests.diagnostics.made_results import provenance

OTHER = "-other"


def results(run: str) -> dict[str, BaseResult]:
    """A result of each kind, small, with values that depend on `run`."""
    seed, found = len(run), {}
    tokens = [[3, 4, 5 + seed], [6, 7]]
    table = pd.DataFrame({"kl": np.sin(np.arange(8) + seed), "edit": ["norm", "full"] * 4, "layer": np.arange(8) % 3})
    for name, kind in KINDS.items():
        p = provenance(seed=seed, rows=len(table), saes={"a": {}, "b": {}})
        of = _still(kind)
        if name == "win_rate":
            found[name] = of(_contests(seed).contests, _contests(seed).runs)
        elif name == "specification":
            found[name] = of(table, {"text": p})
        elif name == "atlas":
            sae = pd.Categorical(["a", "b"] * 4, categories=["a", "b"])
            point = pd.Categorical(["resid_post"] * 8)
            found[name] = of(table.assign(sae=sae, point=point, prompt=np.arange(8) * 3), tokens, p)
        elif name == "dictionary_effects":
            known = table.assign(sae=["a"] * 4 + ["b"] * 4, point="resid_post", latent=np.arange(8), prompt=0)
            rows = whole_table([known.reindex(columns=list(ROWS), fill_value=0)], "ab")
            found[name] = of(rows, tokens, p, table.iloc[:5])
        elif name == "dictionary_comparison":
            found[name] = of(
                table, tokens, p, table.iloc[:3], table.iloc[:2], table, {"pairs": [{"sae": "a", "mcs": 0.5 + seed}]}
            )
        elif name == "polarity":
            found[name] = of(table, p, table.iloc[:5])
        elif name == "scaling_laws":
            found[name] = of(table, tokens, p, table.iloc[:5], table.iloc[:3], table.iloc[:2], table.iloc[:6])
        elif name in ("sparse_probing", "causal_dimension", "token_patterns", "autointerp"):
            found[name] = of(table, tokens, p, table.iloc[:5], table.iloc[:3])
        elif name in ("sae_evaluation", "bipolar_census", "probe_perturbation"):
            found[name] = of(table, tokens, p, table.iloc[:5])
        else:
            found[name] = of(table, tokens, p)
    return found


def _still(kind: type[BaseResult]) -> Any:
    """The kind without figures; its statistics, of a table made up here, are none."""
    own: dict[str, Any] = {"figures": lambda self: {}}
    if kind.NAME not in ("win_rate", "dictionary_comparison"):
        own |= {"groups": [], "as_dict": lambda self: {"summary": [1, 2], "provenance": self.provenance}}
    return type(kind.__name__, (kind,), own)


@functools.cache
def _contests(seed: int) -> WinRateReport:
    """A report of win rates on a tiny model."""
    from tests.diagnostics.win_rate.test_run import run

    whole = run()
    p, frame = whole.provenance | {"seed": seed}, whole.frame.assign(kl=whole.frame["kl"] ** (1 + 0.1 * seed))
    return win_rate_report({"one": ProjectionEffects(frame, whole.tokens, p)}, draws=1)


class _Obey:
    """Loaded from a pickle, it makes a file."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


# Damage: each changes one file or more of a folder


def _some(folder: Path, rng: random.Random, end: str = "") -> Path:
    return rng.choice(sorted(path for path in folder.rglob(f"*{end}") if path.is_file()))


def _bytes(folder: Path, rng: random.Random) -> None:
    path = _some(folder, rng)
    data = bytearray(path.read_bytes())
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    how = rng.randrange(7)
    if how == 0:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == 1:
        data = data[:a]
    elif how == 2:
        data[a:b] = bytes(b - a)
    elif how == 3:
        del data[a:b]
    elif how == 4:
        data[a:a] = rng.randbytes(rng.randrange(1, 40))
    elif how == 5:
        data[a:b] = rng.randbytes(b - a)
    else:
        data += rng.randbytes(5)
    path.write_bytes(data)


def _gone(folder: Path, rng: random.Random) -> None:
    path = _some(folder, rng)
    path.unlink()
    if rng.random() < 0.5:
        path.mkdir()


def _swapped(folder: Path, rng: random.Random) -> None:
    one, other = _some(folder, rng), _some(folder, rng)
    a, b = one.read_bytes(), other.read_bytes()
    one.write_bytes(b), other.write_bytes(a)


def _of_another_run(folder: Path, rng: random.Random) -> None:
    """One file, or all but one, as another run of the same command left them; of those that are not the same in both."""
    other = Path(f"{folder}{OTHER}")
    names = sorted(path.relative_to(other).as_posix() for path in other.rglob("*") if path.is_file())
    names = [name for name in names if (folder / name).read_bytes() != (other / name).read_bytes()]
    if len(names) < 2:
        raise ValueError("one file of another run would be the whole of it")
    taken = [rng.choice(names)]
    taken = [name for name in names if name not in taken] if rng.random() < 0.5 else taken
    for name in taken:
        shutil.copy(other / name, folder / name)


def _tokens(folder: Path, rng: random.Random) -> None:
    path = folder / "tokens.npy"
    out = io.BytesIO()
    how = rng.randrange(7)
    if how == 0:
        np.save(out, np.array([_Obey(str(folder / "obeyed"))], dtype=object), allow_pickle=True)
    elif how == 1:
        out.write(pickle.dumps(_Obey(str(folder / "obeyed"))))
    elif how == 2:
        np.savez(out, np.zeros(3))
    elif how == 3:
        np.lib.format.write_array_header_1_0(out, {"descr": "<i4", "fortran_order": False, "shape": (2**40, 2**20)})
    else:
        array = (np.zeros((2, 3)), np.full((2, 3), -7), np.arange(6), np.array([["a", "b"]]))[how % 4]
        np.save(out, array)
    path.write_bytes(out.getvalue())


def _table(folder: Path, rng: random.Random) -> None:
    """A table that can be read, of other columns, types, rows or values."""
    path = _some(folder, rng, ".parquet")
    frame = pd.read_parquet(path)
    column = rng.choice(list(frame.columns))
    how = rng.randrange(6)
    if how == 0:
        frame = frame.drop(columns=column)
    elif how == 1:
        frame = frame.rename(columns={column: "other"})
    elif how == 2:
        frame = frame.iloc[: rng.randrange(len(frame) + 1)]
    elif how == 3:
        frame[column] = [str(x) for x in frame[column]][::-1]
    elif how == 4:
        frame = frame.iloc[::-1].reset_index(drop=True)
    else:
        frame = pd.DataFrame()
    frame.to_parquet(path)


def _document(folder: Path, rng: random.Random) -> None:
    """JSON that can be read, of other content."""
    path = _some(folder, rng, ".json")
    document = json.loads(path.read_text(encoding="utf-8"))
    if rng.random() < 0.3:
        document.pop(DIGESTS, None)
    at, key = document, rng.choice(list(document))
    while isinstance(at[key], (dict, list)) and at[key] and rng.random() < 0.75:
        at = at[key]
        key = rng.choice(list(at)) if isinstance(at, dict) else rng.randrange(len(at))
    values = [None, "x", -1, 1e308, [], {}, True, [[1]], {"a": {"b": 1}}, "../../../etc/passwd"]
    if isinstance(at, dict) and rng.random() < 0.3:
        del at[key]
    else:
        at[key] = rng.choice(values)
    path.write_text(json.dumps(document), encoding="utf-8")


def _text(folder: Path, rng: random.Random) -> None:
    """JSON that cannot be read, or that Python reads and JSON does not allow."""
    path = _some(folder, rng, ".json")
    text = path.read_text(encoding="utf-8")
    path.write_bytes(
        rng.choice(
            [
                b"[" * 100_000, b'{"provenance":' * 50_000, b"", b"null", b"[]", b'"x"', b"7" * 9000, b"\xff\xfe" + text.encode("utf-16-le"),
                text.replace(":", ": NaN,", 1).encode(), text.encode() + b"{}", text.encode("utf-8-sig"), b'{"provenance": {}}',
                b'{"provenance": [], "summary": 3}', b'{"provenance": {"rows": 1e400}, "sha256": []}',
            ]
        )
    )  # fmt: skip


def _without_digests(folder: Path, rng: random.Random) -> None:
    """As results were before there were digests, and damaged."""
    [path] = folder.glob("*.json")
    document = json.loads(path.read_text(encoding="utf-8"))
    document.pop(DIGESTS, None)
    path.write_text(json.dumps(document), encoding="utf-8")
    rng.choice([_bytes, _gone, _swapped, _tokens, _table, _document, _text])(folder, rng)


DAMAGE: tuple[Callable[[Path, random.Random], None], ...] = (
    _bytes, _gone, _swapped, _of_another_run, _tokens, _table, _document, _text, _without_digests,
)  # fmt: skip


def content(result: BaseResult) -> dict[str, Any]:
    """All that a result was loaded with, as it can be compared."""
    parts = {
        name: part.to_dict("split") if isinstance(part, pd.DataFrame) else part for name, part in result.parts().items()
    }
    return {
        "parts": repr(parts),
        "provenance": jsonable(result.provenance),
        "lines": jsonable(getattr(result, "lines", None)),
    }


def has_digests(folder: Path, name: str) -> bool:
    """Whether the JSON, where it can be read, says what the other files must be."""
    try:
        return DIGESTS in json.loads((folder / f"{name}.json").read_bytes())
    except (ValueError, OSError, RecursionError, TypeError):
        return True


def outcome(folder: Path, name: str, whole: dict[str, Any]) -> str:
    """What becomes of a damaged result: `refused`, `as written`, `without digests` (loaded), or what is wrong."""
    try:
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            sound, damaged = sound_and_damaged(folder)
            found = KINDS[name].load(folder)
        assert damaged or sound
    except MechdiagError as error:
        return "refused" if "\n" not in str(error) else f"several lines: {error}"
    except Exception as error:
        return f"wrong: {type(error).__name__}: {error}"
    if not has_digests(folder, name):
        return "without digests"
    with contextlib.suppress(
        ValueError, KeyError, TypeError, AttributeError
    ):  # what a result of other values may not even say
        if content(found) == whole:
            return "as written"
    return "wrong: loaded with other values"


def fuzz(place: Path, n: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Damage results n times; how many ended in which way, and what was wrong."""
    for name, result in results("").items():
        result.write(place / name)
    for name, result in results("other").items():
        result.write(place / f"{name}{OTHER}")
    whole = {name: content(kind.load(place / name)) for name, kind in KINDS.items()}
    ends: Counter[str] = Counter()
    wrong = []
    for i in range(n):
        rng = random.Random(f"{seed} {i}")
        name, damage = list(KINDS)[i % len(KINDS)], DAMAGE[(i // len(KINDS)) % len(DAMAGE)]
        folder = place / name
        kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        try:
            damage(folder, rng)
        except (IndexError, ValueError):  # no such file in this kind, or what is damaged twice cannot be read
            ends["not damaged"] += 1
        end = outcome(folder, name, whole[name])
        if (folder / "obeyed").exists():
            end = "wrong: a pickle was obeyed"
        ends[end.split(":")[0]] += 1
        if end.startswith(("wrong", "several")):
            wrong.append(f"{i} ({name}, {damage.__name__.strip('_')}): {end}")
        shutil.rmtree(folder)
        for path, data in kept.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return ends, wrong


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        ends, wrong = fuzz(Path(place), given.n, given.seed)
    print(f"{given.n} damaged results: " + ", ".join(f"{n} {end}" for end, n in ends.most_common()))
    for one in wrong:
        print(one, file=sys.stderr)
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()

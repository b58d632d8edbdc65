"""What a reader must know before believing a number: gathered from a result's provenance, its statistics and its table."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from diagnostics.frames import each, where
from diagnostics.results import Result, Shown
from diagnostics.settings_words import listed, provenances
from diagnostics.statistics import FEW_PROMPTS, MIN_PROMPTS, noise_floor

_COUNTS = {
    "rows_dropped": "rows dropped",
    "pairs_dropped": "pairs dropped",
    "dropped": "dropped",
    "tokens_left_out": "tokens left out",
    "left_out": "tokens left out",
    "rows_not_finite": "rows not finite",
    "placebos_not_finite": "placebos not finite",
    "selves_not_finite": "tokens put back as they were: not finite",
    "effects_not_finite": "effects not finite",
    "chunks_halved": "chunks halved because memory ran out (last bits may differ from another run's)",
}
"""Keys of provenance that count what is missing; each a number, or numbers by reason."""
_PREPARED = ("text", "texts", "labelled")
"""Parts of provenance that say how texts were prepared, before anything was measured."""
_NULLS = ("direction_norm", "dose_response", "unit_norm", "specification", "projections", "win_rate")
"""Kinds that can stand beside untrained networks."""


def caveats(result: Shown) -> list[str]:
    """A line for each thing that a reader must know; none where there is none.

    Full forward passes in place of replay and why, what was dropped with reasons, effects within the noise floor, intervals from
    few prompts, no placebo, no untrained network, half precision, and what the statistics warned of.
    """
    found: list[str] = []
    for name, p in provenances(result).items():
        found += [f"{name}: {line}" if name else line for line in _of_provenance(p, result.NAME)]
    with warnings.catch_warnings(record=True) as said:  # while the statistics are formed
        warnings.simplefilter("always")
        found += [*_within_noise(result), *_few_prompts(result)]
    return [*found, *dict.fromkeys(text for w in said if not (text := str(w.message)).startswith("an interval from"))]


def differences(named: Mapping[str, Shown]) -> list[str]:
    """What results of one report do not share, though a reader might take it for granted: weights, versions, precision."""
    every = {f"{name} ({run})" if run else name: p for name, r in named.items() for run, p in provenances(r).items()}
    looked_at = {
        "weights of the model": lambda p: (p.get("model"), str(p.get("weights_sha256"))[:12]),
        "dtype": lambda p: p.get("dtype"),
        "sink filter": lambda p: p.get("sink_filter"),
    }
    packages = sorted({package for p in every.values() for package in p.get("versions", {})})
    found = []
    for what, value in looked_at.items():
        found += _unlike(what, {name: value(p) for name, p in every.items()})
    for package in packages:
        found += _unlike(
            f"version of {package}", {name: p.get("versions", {}).get(package) for name, p in every.items()}
        )
    return found


def _unlike(what: str, values: Mapping[str, Any]) -> list[str]:
    by: dict[str, list[str]] = {}
    for name, value in values.items():
        said = " ".join(map(str, value)) if isinstance(value, tuple) else "none" if value is None else str(value)
        by.setdefault(said, []).append(name)
    if len(by) < 2:
        return []
    return [
        f"{what} differ{'' if what.startswith('weights') else 's'}: "
        + "; ".join(f"{said} in {listed(names, 4)}" for said, names in by.items())
    ]


def _of_provenance(p: Mapping[str, Any], kind: str) -> Iterator[str]:
    why = list(dict.fromkeys(_values(p, "why_hooks")))
    yield from (f"full forward passes in place of the fast path: {reason}" for reason in why)
    if not why and "hooks" in _paths(p):
        yield "full forward passes served, as asked"
    lost: dict[tuple[str, str], list[str]] = {}
    for place, key, counts in _lost(p):
        lost.setdefault((_COUNTS[key], counts), []).append(place)
    for (what, counts), places in lost.items():
        at = listed([place for place in places if place], 4, "; ")
        yield f"{what}{f' ({at})' if at else ''}: {counts}"
    if p.get("dtype") in ("bfloat16", "float16"):
        yield f"{p['dtype']}: noise floors lie near 1e-3 nats, and ablations of tiny dose are lost in rounding"
    if p.get("placebo_share") == 0:
        yield "no placebo: nothing says what a random edit of the same norm and angle does"
    if kind == "feature_ablation" and "placebo" not in p.get("arms", ()):
        yield "no placebo arm: nothing says what a random edit of the same norm and angle does"
    if kind in _NULLS and not p.get("null_models"):
        yield "no untrained network beside it: what architecture alone gives is not known"


def _values(p: Any, key: str) -> Iterator[str]:
    """What stands under a key, anywhere in nested dictionaries, as strings."""
    if isinstance(p, Mapping):
        for name, value in p.items():
            if name == key:
                yield from [value] if isinstance(value, str) else value or ()
            else:
                yield from _values(value, key)


def _paths(p: Mapping[str, Any]) -> set[str]:
    given = p.get("path")
    named = given.values() if isinstance(given, Mapping) else [given]
    return {part for path in named if isinstance(path, str) for part in path.split("+")}


def _lost(p: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, str, str]]:
    """Where, under which key, and how many by reason."""
    for name, value in p.items():
        if name in _PREPARED or name == "joined":
            continue
        if name in _COUNTS:
            yield from ((f"{place}{where_}".strip(", "), name, said) for where_, said in _said(value))
        elif isinstance(value, Mapping):
            yield from _lost(value, place if name in ("drawn", "atlas", "ablations", "saes") else f"{place}, {name}")


def _said(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, (int, float)):
        if value:
            yield place, f"{value:,}"
    elif isinstance(value, Mapping):
        counts = {reason: n for reason, n in value.items() if isinstance(n, (int, float))}
        if any(n for reason, n in counts.items() if reason != "of"):
            of = counts.pop("of", None)
            said = ", ".join(f"{n:,} {reason}" for reason, n in counts.items() if n)
            yield place, said + (f", of {of:,}" if of else "")
        for name, inner in value.items():
            if isinstance(inner, Mapping):
                yield from _said(inner, f"{place}, {name}")


def _within_noise(result: Shown) -> Iterator[str]:
    """How many effects are no larger than what putting activations back as they were gives."""
    frame = result.to_frame()
    if isinstance(result, Result) and "share_below_floor" in (result.groups or [{}])[0]:
        for g in result.groups:
            yield _floor_said(g["noise_floor"], round(g["share_below_floor"] * g["rows"]), g["rows"], f"{g['sae']}: ")
        return
    if "kl" in frame and (floor := result.provenance.get("self_kl")) is not None:
        effects = frame["kl"].to_numpy(float)
        yield _floor_said(floor, int((effects <= floor).sum()), int(np.isfinite(effects).sum()))
    if not {"edit", "kl", "layer"} <= set(frame) or not (frame["edit"] == "self").any():
        return
    keys = [key for key in ("model", "layer", "point", "context") if key in frame]
    below, rows, floors = 0, 0, []
    for _, some in each(frame, keys):
        own = where(some, some["edit"] == "self")["kl"].to_numpy(float)
        effects = where(some, some["edit"] != "self")["kl"].to_numpy(float)
        if len(own) and len(effects := effects[np.isfinite(effects)]):
            floors.append(noise_floor(own[np.isfinite(own)]))
            below, rows = below + int((effects <= floors[-1]).sum()), rows + len(effects)
    if rows:
        yield _floor_said(max(floors), below, rows)


def _floor_said(floor: float, below: int, rows: int, whose: str = "") -> str:
    share = f"{below:,} ({below / rows:.1%})" if below else "none"
    return f"{whose}noise floor {floor:.1g} nats; {share} of {rows:,} effects lie at or below it"


def _few_prompts(result: Shown) -> Iterator[str]:
    """How many intervals stand on few prompts."""
    counts = list(_prompts(_statistics(result)))
    few = [n for n in counts if n < FEW_PROMPTS]
    if few:
        none = sum(n < MIN_PROMPTS for n in few)
        yield (
            f"{len(few):,} of {len(counts):,} estimates stand on fewer than {FEW_PROMPTS} prompts (the least: {min(few)}): their "
            f"intervals are too narrow{f', and {none:,} on fewer than {MIN_PROMPTS} have none' if none else ''}"
        )


def _statistics(result: Shown) -> Any:
    if isinstance(result, Result):
        return result.groups
    frame = result.to_frame()
    return (
        frame[["n_prompts"]].assign(se=0.0).to_dict("records") if "n_prompts" in frame else result.as_dict()["summary"]
    )


def _prompts(value: Any) -> Iterator[int]:
    """Prompts behind each estimate, anywhere in a summary."""
    if hasattr(value, "n_prompts"):
        yield int(value.n_prompts)
    elif hasattr(value, "estimate"):
        yield from _prompts(value.estimate)
    elif isinstance(value, Mapping):
        if "n_prompts" in value and "se" in value:
            yield int(value["n_prompts"])
        else:
            for inner in value.values():
                yield from _prompts(inner)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for inner in value:
            yield from _prompts(inner)

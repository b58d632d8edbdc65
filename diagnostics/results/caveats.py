"""Caveats of a result, collected from its provenance, statistics and table."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import pandas as pd

from diagnostics.results.words import HasProvenance, left_out_of, listed, provenances
from diagnostics.statistics.estimate import FEW_PROMPTS, MIN_PROMPTS
from diagnostics.statistics.measures import noise_floor
from diagnostics.statistics.tables import each, where

ONE_ROW = 1 / 3
"""the share of a sum from which a row is said to carry it"""


class HasCaveats(HasProvenance, Protocol):
    """What caveats are collected from."""

    NULL_MODELS: ClassVar[bool]

    @property
    def groups(self) -> Any: ...
    def to_frame(self) -> pd.DataFrame: ...
    def counted_in(self) -> Any: ...
    def own_caveats(self) -> list[str]: ...


def caveats(result: HasCaveats) -> list[str]:
    """A line for each caveat.

    Fallbacks to full forward passes and dropped rows, with reasons; effects within the noise floor; intervals from few prompts;
    missing placebos and randomly initialised models; half precision; warnings of the statistics.
    """
    found: list[str] = []
    for name, p in provenances(result).items():
        said = [*left_out_of(p), *_of_provenance(p)]
        if result.NULL_MODELS and not p.get("null_models"):
            said.append("no randomly initialised models to compare with: what the architecture alone gives is unknown")
        found += [f"{name}: {line}" if name else line for line in said]
    found += result.own_caveats()
    with warnings.catch_warnings(record=True) as told:  # the statistics are computed now
        warnings.simplefilter("always")
        found += [*_within_noise(result), *_few_prompts(result), *_carried_by_one(result)]
    return [*found, *dict.fromkeys(text for w in told if not (text := str(w.message)).startswith("an interval from"))]


def differences(named: Mapping[str, HasProvenance]) -> list[str]:
    """Settings in which results of one report differ: weights, dtype, sink filter, versions of packages."""
    every = {f"{name} ({run})" if run else name: p for name, r in named.items() for run, p in provenances(r).items()}
    looked_at = {
        "weights of the model": lambda p: (p.get("model"), str(p.get("weights_sha256"))[:12]),
        "dtype": lambda p: p.get("dtype"),
        "sink filter": lambda p: p.get("sink_filter"),
    }
    packages = sorted({package for p in every.values() for package in p.get("versions", {})})
    found = []
    for what, value in looked_at.items():  # results on planted data have none of these
        found += _unlike(what, {name: value(p) for name, p in every.items() if "planted" not in p})
    for package in packages:
        versions = {name: p.get("versions", {}).get(package) for name, p in every.items()}
        found += _unlike(f"version of {package}", versions)
    return found


def _unlike(what: str, values: Mapping[str, Any]) -> list[str]:
    by: dict[str, list[str]] = {}
    for name, value in values.items():
        said = " ".join(map(str, value)) if isinstance(value, tuple) else "none" if value is None else str(value)
        by.setdefault(said, []).append(name)
    if len(by) < 2:
        return []
    said = "; ".join(f"{value} in {listed(names, 4)}" for value, names in by.items())
    return [f"{what} differ{'' if what.startswith('weights') else 's'}: {said}"]


def _of_provenance(p: Mapping[str, Any]) -> Iterator[str]:
    if p.get("dtype") in ("bfloat16", "float16"):
        yield f"{p['dtype']}: noise floors lie near 1e-3 nats, and ablations of tiny dose are lost in rounding"
    if p.get("placebo_share") == 0:
        yield "no placebo: the effect of a random edit of the same norm and angle is unknown"


def _within_noise(result: HasCaveats) -> Iterator[str]:
    """How many effects are no larger than the noise floor, the effect of an identity edit."""
    frame = result.to_frame()
    if "share_below_floor" in next(iter(result.groups), {}):
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


def _few_prompts(result: HasCaveats) -> Iterator[str]:
    """How many estimates are from few prompts."""
    counts = [n for e in _estimates(result.counted_in()) if (n := _effective(e)) > 0]  # 0: no row; nan: not known
    few = [n for n in counts if n < FEW_PROMPTS]
    if few:
        none = sum(n < MIN_PROMPTS for n in few)
        yield (
            f"{len(few):,} of {len(counts):,} estimates are from fewer than {FEW_PROMPTS} effective prompts (the least: {min(few):.3g}): "
            f"read their intervals with care{f'; {none:,} from fewer than {MIN_PROMPTS} have none' if none else ''}"
        )


def _carried_by_one(result: HasCaveats) -> Iterator[str]:
    """How many means depend on a single row."""
    known = [float(e["influence"]) for e in _estimates(result.counted_in()) if e.get("influence") is not None]
    known = [share for share in known if np.isfinite(share)]
    if known and max(known) > ONE_ROW:
        many = sum(share > ONE_ROW for share in known)
        yield f"in {many:,} of {len(known):,} means of KL one row holds more than a third of the sum (up to {max(known):.0%})"


def _effective(estimate: Mapping[str, Any]) -> float:
    effective = estimate.get("n_effective")
    return float(estimate["n_prompts"] if effective is None or not np.isfinite(effective) else effective)


def _estimates(value: Any) -> Iterator[Mapping[str, Any]]:
    """The fields of each estimate, anywhere in a summary."""
    if hasattr(value, "n_prompts"):
        yield vars(value)
    elif hasattr(value, "estimate"):
        yield from _estimates(value.estimate)
    elif isinstance(value, Mapping):
        if "n_prompts" in value and "se" in value:
            yield value
        else:
            for inner in value.values():
                yield from _estimates(inner)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for inner in value:
            yield from _estimates(inner)

"""How units were measured and what they dropped: a unit's notes, and those of all units as one."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from diagnostics.running.units import UnitResult
from diagnostics.statistics.measures import noise_floor
from interventions.effects import Effects
from interventions.spliced import Spliced


def noted(notes: dict[str, Any], found: Effects | Spliced) -> None:
    """Add to a unit's notes how some of its rows were measured: `path`, `why_hooks`, `replay_delta`, `chunks_halved`,
    and `recorded_again`, prompts beyond the memory budget, where there were any.

    path: where rows took several, with + between them. replay_delta: the largest difference of logits from full forward passes (nan:
    not compared).
    """
    notes["path"] = "+".join(sorted({found.path, *(notes["path"].split("+") if notes.get("path") else ())}))
    notes["why_hooks"] = notes.get("why_hooks") or found.why_hooks
    known = notes.get("replay_delta")
    notes["replay_delta"] = found.delta if known is None else float(np.fmax(known, found.delta))
    halvings = found.halvings if isinstance(found, Effects) else 0
    notes["chunks_halved"] = notes.get("chunks_halved", 0) + halvings
    if again := getattr(found, "recorded_again", 0):
        notes["recorded_again"] = notes.get("recorded_again", 0) + again


def how_measured(notes: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """How all rows were measured, of the notes of units and where each was: paths by place, every reason for full forward passes,
    the largest difference between paths (None: not compared), chunks halved. Units without a path measured nothing."""
    ran = [(place, unit) for place, unit in notes if unit.get("path")]
    paths: dict[str, set[str]] = {}
    for place, unit in ran:
        paths.setdefault(place, set()).update(unit["path"].split("+"))
    deltas = [unit["replay_delta"] for _, unit in ran if unit["replay_delta"] is not None]
    again = sum(unit.get("recorded_again", 0) for _, unit in ran)
    return {
        "path": {place: "+".join(sorted(found)) for place, found in paths.items()},
        "why_hooks": sorted({unit["why_hooks"] for _, unit in ran} - {None}) or None,
        "replay_delta": max((delta for delta in deltas if np.isfinite(delta)), default=None),
        "chunks_halved": sum(unit["chunks_halved"] for _, unit in ran),
        **({"recorded_again": again} if again else {}),
    }


def what_dropped(notes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Noise floor (None without a finite identity edit) and numbers of rows and placebos that are not finite, of the notes of units."""
    selves = np.array([value for note in notes for value in note["self_kl"]], dtype=float)  # None where not finite
    known = selves[np.isfinite(selves)]
    return {
        "noise_floor": noise_floor(known) if len(known) else None,
        "selves_not_finite": len(selves) - len(known),
        "rows_not_finite": sum(note["not_finite"] for note in notes),
        "placebos_not_finite": sum(note["placebos_not_finite"] for note in notes),
    }


def summed(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Counts by reason, added up."""
    total: Counter[str] = Counter()
    for some in counts:
        total.update(some)
    return dict(total)


def merged(done: Sequence[UnitResult], label: str) -> dict[str, Any]:
    """Notes of all units as one: `drawn`, by the units' `label`; `rows_dropped`, by reason; `how_measured`, by the units' site."""
    drawn: dict[str, Any] = {}
    for one in done:
        drawn.setdefault(one.unit[label], one.notes["drawn"])
    return {
        "drawn": drawn,
        "rows_dropped": summed(one.notes["rows_dropped"] for one in done),
        **how_measured((one.unit["site"], one.notes) for one in done),
    }

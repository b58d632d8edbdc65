"""A report of win rates read back from its files: its numbers are loaded, and nothing is fitted again."""

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np
import pandas as pd

from diagnostics.projections.norm_exponent import Exponent, Interventional, Observational
from diagnostics.projections.summary import PLACE
from diagnostics.results.stored import Stored
from diagnostics.statistics.estimate import FiellerInterval
from diagnostics.statistics.tables import lines_of
from diagnostics.win_rate.adversarial import AdversarialGroups
from diagnostics.win_rate.rates import WinRates
from diagnostics.win_rate.simpson import Simpson
from diagnostics.win_rate.summary import Contest


def read_contests(stored: Stored) -> tuple[list[Contest], dict[str, Any]]:
    """Contests, and the provenance of each run by its name."""
    latents = stored.table(f"{stored.name}_latents.parquet")
    report = [_contest(line, latents) for line in stored.summary]
    stored.table()  # of what the summary says again: read for its digest
    return report, stored.provenance


def _contest(line: Mapping[str, Any], latents: pd.DataFrame) -> Contest:
    key = {name: line[name] for name in ("run", *PLACE)}
    own = lines_of(latents, **key).drop(columns=list(key)).reset_index(drop=True)
    ways = {name: value for name, value in line["exponents"].items() if name != "learned"}
    kinds: dict[str, type[Exponent]] = {
        name: Observational if "beta_cosine" in way else Interventional for name, way in ways.items()
    }
    return Contest(
        run=line["run"],
        place={name: line[name] for name in PLACE},
        rates=from_json(WinRates, {**line["win_rates"], "latents": own}),
        groups=from_json(AdversarialGroups, line["adversarial_groups"]),
        exponents={name: from_json(kinds[name], way) for name, way in ways.items()},
        learned_a=line["exponents"]["learned"],
        simpson=None if line["simpson"] is None else from_json(Simpson, line["simpson"]),
        why_no_labels=line["why_no_labels"],
    )


def from_json(kind: Any, value: Any) -> Any:
    """A value of a type from what JSON holds of it: dataclasses by their fields, null as nan where a number is meant.

    Where JSON has null for the open end of a set of ratios (`FiellerInterval`), that end is infinite again.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else from_json(next(k for k in inner if k is not type(None)), value)
    if origin is tuple:
        each = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
        return tuple(from_json(k, v) for k, v in zip(each, value, strict=True))
    if origin is dict:
        return {name: from_json(inner[1], v) for name, v in value.items()}
    if is_dataclass(kind) and isinstance(kind, type):
        hints = get_type_hints(kind)
        given = [f.name for f in fields(kind) if f.name in value or MISSING is f.default is f.default_factory]
        found = kind(**{name: from_json(hints[name], value[name]) for name in given})
        return _with_open_ends(found) if isinstance(found, FiellerInterval) else found
    return np.nan if kind is float and value is None else value


def _with_open_ends(found: FiellerInterval) -> FiellerInterval:
    if found.kind not in ("exclusive", "everything"):
        return found
    low, high = (end if np.isfinite(end) else sign * np.inf for end, sign in ((found.low, -1), (found.high, 1)))
    return FiellerInterval(found.value, low, high, found.kind, found.n_rows, found.n_prompts)

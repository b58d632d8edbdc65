"""A unit of work: the coalitions of a few pairs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy import ndarray

from diagnostics.coalitions.design import Orders, interaction_indices, members, shapley_values
from diagnostics.pairs.measured import metric_of, metric_of_run
from diagnostics.pairs.pair import Pairs
from diagnostics.running.joint_edits import measure_members
from diagnostics.running.notes import how_measured, summed
from diagnostics.running.units import Tick, Unit, UnitResult, narrowed
from interventions.models.causal_model import CausalModel
from interventions.recording import record
from interventions.sites import Site

_PAIRS = 4
"""pairs in a unit of work"""
COLUMNS = ("pair", "component", "partner", "value", "low", "high", "all", "total")
"""Of the table. partner: empty on the line of a component's Shapley value, else `value` is the interaction index of the two. low,
high: 95 % interval over sampled orders (the value itself where every coalition was run). all: v of all components together. total:
m_clean − m_corrupt. Logits (or probabilities)."""


@dataclass
class CoalitionRunner:
    """Computes units, a few pairs each."""

    model: CausalModel
    pairs: Pairs
    components: Sequence[Site]
    positions: str
    direction: str
    metric: str
    orders: int | None
    """sampled orders; None: every coalition"""
    seed: int
    how: dict[str, Any]

    def units(self) -> list[Unit]:
        n, total = len(self.components), len(self.pairs)
        each = 2**n - 1 if self.orders is None else n * self.orders
        return [Unit.of(rows=each * min(_PAIRS, total - at), pairs=at // _PAIRS) for at in range(0, total, _PAIRS)]

    def __call__(self, unit: Unit, tick: Tick) -> tuple[pd.DataFrame, dict[str, Any]]:
        first = unit["pairs"] * _PAIRS
        which = list(range(first, min(first + _PAIRS, len(self.pairs))))
        sites = list(dict.fromkeys(site.whole for site in self.components))
        runs = {
            name: record(self.model, [getattr(self.pairs, name)[i] for i in which], sites)
            for name in ("clean", "corrupt")
        }
        m = {name: metric_of_run(run, self.pairs, which, self.metric) for name, run in runs.items()}
        base, source = ("corrupt", "clean") if self.direction == "denoise" else ("clean", "corrupt")
        sign = 1.0 if self.direction == "denoise" else -1.0
        notes: dict[str, Any] = {"rows_dropped": {}}
        frames = []
        for row, i in enumerate(which):
            length = len(self.pairs[i])
            start = length - 1 if self.positions == "last" else int(self.pairs.first_difference[i])
            vectors = [runs[source].of(site)[row, start:length] for site in self.components]

            def worth(
                coalition: ndarray, row: int = row, i: int = i, start: int = start, vectors: list = vectors
            ) -> ndarray:
                metric, at = metric_of(self.pairs, i, self.metric), np.arange(start, len(self.pairs[i]))
                empty = float(m[base][row])
                found = measure_members(
                    runs[base],
                    row,
                    self.components,
                    vectors,
                    at,
                    coalition,
                    metric,
                    empty,
                    notes,
                    progress=tick,
                    **self.how,
                )
                return sign * (found - empty)

            lines = self._lines(worth, i)
            lines["pair"], lines["total"] = i, m["clean"][row] - m["corrupt"][row]
            frames.append(lines)
        frame = pd.concat(frames, ignore_index=True)[list(COLUMNS)]
        finite = np.isfinite(frame["value"].to_numpy())
        if not finite.all():
            notes["rows_dropped"] = {"metric not finite": int((~finite).sum())}
        return narrowed(frame[finite].reset_index(drop=True)), notes

    def _lines(self, worth: Any, i: int) -> pd.DataFrame:
        names, n = np.array([str(site) for site in self.components]), len(self.components)
        if self.orders is None:
            v = worth(members(n))
            phi, pairwise = shapley_values(v), interaction_indices(v)
            a, b = np.triu_indices(n, 1)
            value = np.concatenate([phi, pairwise[a, b]])
            return pd.DataFrame({
                "component": np.concatenate([names, names[a]]), "partner": np.concatenate([np.full(n, ""), names[b]]),
                "value": value, "low": value, "high": value, "all": v[-1],
            })  # fmt: skip
        orders = Orders.drawn(n, self.orders, self.seed, "shapley", i)
        v = worth(orders.coalition)
        phi, se = orders.estimates(v)
        whole = float(v[orders.coalition.all(axis=1)][0])
        return pd.DataFrame({
            "component": names, "partner": "", "value": phi, "low": phi - orders.t * se, "high": phi + orders.t * se, "all": whole,
        })  # fmt: skip


def merged(done: Sequence[UnitResult]) -> dict[str, Any]:
    """The units' notes as one."""
    return {
        "rows_dropped": summed(one.notes["rows_dropped"] for one in done),
        **how_measured(("pairs", one.notes) for one in done),
    }

"""A unit of work: some pairs, every edge in each direction."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy import ndarray

from diagnostics.edges.design import Settings, batches, name_of, reaches
from diagnostics.edges.sweep import Received, Sweep, Tokens, runs_of
from diagnostics.pairs.measured import metric_of, metric_of_run
from diagnostics.pairs.pair import Pairs, labels
from diagnostics.running.notes import how_measured, noted, summed
from diagnostics.running.units import Tick, Unit, UnitResult, narrowed
from interventions.effects import measure_joint
from interventions.models.causal_model import CausalModel
from interventions.recording import Recording
from interventions.replaying.joint import Put
from interventions.sites import Site

_HELD = 2**25
"""numbers in the vectors of rows that wait to be measured"""
COLUMNS = (
    "pair", "pool", "direction", "sender", "sender_layer", "sender_head", "receiver", "receiver_layer", "receiver_head", "through",
    "position", "label", "run", "m", "m_clean", "m_corrupt", "effect", "total",
)  # fmt: skip
"""Of the table. sender, receiver: as text (`embedding`, `3.z.1`, `12.q.3`, `5.mlp_out`, `logits`), and their layers and heads (−1: none);
through: the receiver's point. pool: number of the pair's pool in provenance. position, label: of a receiver's single position; −1
and `all` or `last` otherwise. run: False where the sender writes the same in both runs: 0 exactly, not run. m: the metric, as
`activation_patching` has it, effect its distance from the base run, total = m_clean − m_corrupt."""


@dataclass
class _Waiting:
    """Rows that wait to be measured."""

    puts: list[Put] = field(default_factory=list)
    pair: list[ndarray] = field(default_factory=list)
    n_rows: int = 0
    held: int = 0


class EdgeRunner:
    """Computes units, a few pairs each."""

    def __init__(self, model: CausalModel, pairs: Pairs, settings: Settings):
        self.model, self.pairs, self.settings = model, pairs, settings
        self.reach = {r: np.array([reaches(model, s, r) for s in settings.senders]) for r in settings.receivers}

    def units(self) -> list[Unit]:
        """In the order of the pairs; rows as many as edges."""
        found, tokens = [], (self.pairs.length - self.pairs.first_difference).numpy()
        for n, which in enumerate(batches(len(self.pairs))):
            each = {True: int(tokens[which].sum()), False: len(which)}
            rows = sum(each[self._mode(r) == "each"] * int(reach.sum()) for r, reach in self.reach.items())
            found.append(Unit.of(rows=rows * len(self.settings.directions), pairs=n))
        return found

    def __call__(self, unit: Unit, tick: Tick) -> tuple[pd.DataFrame, dict[str, Any]]:
        which = batches(len(self.pairs))[unit["pairs"]]
        runs = runs_of(self.model, self.pairs, which, self.settings)
        m = {run: metric_of_run(runs[run], self.pairs, which, self.settings.metric) for run in runs}
        notes: dict[str, Any] = {"rows_dropped": {}}
        frames = [self._direction(which, runs, m, direction, notes, tick) for direction in self.settings.directions]
        frame = pd.concat(frames, ignore_index=True)
        finite = np.isfinite(frame["m"].to_numpy())
        if not finite.all():
            notes["rows_dropped"] = {"metric not finite": int((~finite).sum())}
        kept = frame[finite].sort_values(["pair", "direction"], kind="stable", ignore_index=True)
        return narrowed(kept), notes

    def _direction(
        self,
        which: list[int],
        runs: dict[str, Recording],
        m: dict[str, ndarray],
        direction: str,
        notes: dict,
        tick: Tick,
    ) -> pd.DataFrame:
        names = ("corrupt", "clean") if direction == "denoise" else ("clean", "corrupt")
        base, source = (runs[name] for name in names)
        tokens = Tokens.of(self.pairs, which)
        n_pos = base.tokens.shape[1]
        ran: dict[Site, ndarray] = {}
        found: list[ndarray] = []
        waiting = _Waiting()
        with base.held():
            for received in Sweep(base, source, tokens, self.settings).received():
                ran[received.site] = self._put(received, tokens, n_pos, len(which), waiting)
                if waiting.held > _HELD:
                    found.append(self._measured(base, which, waiting, notes, tick))
                    waiting = _Waiting()
            found.append(self._measured(base, which, waiting, notes, tick))
        measured = np.concatenate(found)
        parts, at = [], 0
        for receiver in [*ran, *(r for r in self.settings.receivers if r not in ran)]:
            cells = ran.get(receiver, np.zeros(0, dtype=int))
            parts.append(self._cells(receiver, which, n_pos, cells, measured[at : at + len(cells)], m[names[0]]))
            at += len(cells)
        frame = pd.concat(parts, ignore_index=True)
        local = frame["pair"].to_numpy()
        frame["m_clean"], frame["m_corrupt"] = m["clean"][local], m["corrupt"][local]
        frame["total"] = frame["m_clean"] - frame["m_corrupt"]
        frame["effect"] = frame["m"] - frame["m_corrupt"] if direction == "denoise" else frame["m_clean"] - frame["m"]
        pools = list(dict.fromkeys(self.pairs.pools))
        frame["pool"] = np.array([pools.index(self.pairs[i].pool) for i in which])[local]
        frame["pair"], frame["direction"] = np.array(which)[local], direction
        return frame[list(COLUMNS)]

    def _mode(self, receiver: Site) -> str:
        return "last" if receiver.point == "resid_post" else self.settings.positions[receiver.point]

    def _put(self, received: Received, tokens: Tokens, n_pos: int, n_pairs: int, waiting: _Waiting) -> ndarray:
        """Rows of one receiver; the cells that they measure, ascending."""
        each = self._mode(received.site) == "each"
        pair, position = tokens.pair[received.token], tokens.position[received.token]
        where, width = (pair * n_pos + position, n_pairs * n_pos) if each else (pair, n_pairs)
        cells, row = np.unique(received.sender * width + where, return_inverse=True)
        if len(cells):
            waiting.puts.append(
                Put(received.site, torch.from_numpy(row + waiting.n_rows), torch.from_numpy(position), received.vectors)
            )
            waiting.pair.append(cells % width // n_pos if each else cells % width)
            waiting.n_rows += len(cells)
            waiting.held += received.vectors.numel()
        return cells

    def _measured(self, base: Recording, which: list[int], waiting: _Waiting, notes: dict, tick: Tick) -> ndarray:
        if not waiting.n_rows:
            return np.zeros(0)
        pair = np.concatenate(waiting.pair)
        metric = metric_of(self.pairs, np.array(which)[pair], self.settings.metric)
        effects = measure_joint(
            *(base, torch.from_numpy(pair), waiting.puts),
            metrics=(metric,), path=self.settings.path, batch_rows=self.settings.batch_rows, progress=tick,
        )  # fmt: skip
        noted(notes, effects)
        return effects[metric.name].double().numpy()

    def _cells(
        self, receiver: Site, which: list[int], n_pos: int, ran: ndarray, measured: ndarray, base: ndarray
    ) -> pd.DataFrame:
        """Every edge into a receiver, those that carry no change with the base run's metric."""
        each, n_pairs = self._mode(receiver) == "each", len(which)
        where = np.arange(n_pairs)
        if each:
            inside = np.arange(n_pos) < self.pairs.length[which].numpy()[:, None]
            where = np.flatnonzero(inside)
        width = n_pairs * n_pos if each else n_pairs
        sender = np.flatnonzero(self.reach[receiver])
        cells = (sender[:, None] * width + where).reshape(-1)
        pair = cells % width // n_pos if each else cells % width
        position = cells % width % n_pos if each else np.full(len(cells), -1)
        m, run = base[pair].copy(), np.isin(cells, ran)
        m[run] = measured
        shown = np.array([[*labels(self.pairs[i]), *[""] * n_pos][:n_pos] for i in which])
        senders = self.settings.senders
        of = cells // width
        text = np.array([name_of(site) for site in senders])
        numbers = [
            np.array(values)[of]
            for values in (
                [-1 if s.point == "resid_pre" else s.layer for s in senders],
                [-1 if s.head is None else s.head for s in senders],
            )
        ]
        return pd.DataFrame({
            "pair": pair, "sender": text[of], "sender_layer": numbers[0], "sender_head": numbers[1],
            "receiver": name_of(receiver, receives=True), "receiver_layer": receiver.layer,
            "receiver_head": -1 if receiver.head is None else receiver.head,
            "through": "logits" if receiver.point == "resid_post" else receiver.point,
            "position": position, "label": shown[pair, position] if each else self._mode(receiver), "run": run, "m": m,
        })  # fmt: skip


def merged(done: Sequence[UnitResult]) -> dict[str, Any]:
    """The units' notes as one."""
    return {
        "rows_dropped": summed(one.notes["rows_dropped"] for one in done),
        **how_measured(("pairs", one.notes) for one in done),
    }

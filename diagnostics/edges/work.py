"""A unit of work: some pairs, every edge in each direction."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy import ndarray

from diagnostics.edges.design import Settings, batches, name_of, reaches
from diagnostics.edges.sweep import Received, Sweep, Tokens, runs_of
from diagnostics.pairs.controls import NO_CONTROL, Partners
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
    "position", "label", "control", "run", "m", "m_clean", "m_corrupt", "effect", "total", "dose",
)  # fmt: skip
"""Of the table. sender, receiver: as text (`embedding`, `3.z.1`, `12.q.3`, `5.mlp_out`, `logits`), and their layers and heads (−1: none);
through: the receiver's point. pool: number of the pair's pool in provenance. position, label: of a receiver's single position; −1
and `all` or `last` otherwise. control: 0, the edge itself; 1, …: its controls, of edges that were run. run: False where the sender writes the same in both runs: 0 exactly, not run. m: the metric, as
`activation_patching` has it, effect its distance from the base run, total = m_clean − m_corrupt. dose: ‖Δ‖/‖x‖ of the stream that the receiver reads, root mean square over its changed tokens."""


@dataclass
class _Waiting:
    """Rows that wait to be measured."""

    puts: list[Put] = field(default_factory=list)
    pair: list[ndarray] = field(default_factory=list)
    above: list[ndarray] = field(default_factory=list)
    """of each row, the number of its receiver's write among those of all blocks: attn_out 0, mlp_out 0, attn_out 1, …"""
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
            times = len(self.settings.directions) * (1 + self.settings.controls)
            found.append(Unit.of(rows=rows * times, pairs=n))
        return found

    def __call__(self, unit: Unit, tick: Tick) -> tuple[pd.DataFrame, dict[str, Any]]:
        which = batches(len(self.pairs))[unit["pairs"]]
        runs = runs_of(self.model, self.pairs, which, self.settings)
        m = {run: metric_of_run(runs[run], self.pairs, which, self.settings.metric) for run in runs}
        senders = list(dict.fromkeys(site.whole for site in self.settings.senders))
        others = Partners.of(self.model, self.pairs, which, senders, self.settings.controls, self.settings.seed)
        notes: dict[str, Any] = {}
        frames = [
            self._direction(which, runs, others, m, direction, notes, tick) for direction in self.settings.directions
        ]
        frame: Any = pd.concat(frames, ignore_index=True)
        finite, own = np.isfinite(frame["m"].to_numpy()), frame["control"].to_numpy() == 0
        without = self.settings.controls * int(frame["run"][own].sum()) - int((~own).sum())
        lost = {NO_CONTROL: without, "metric not finite": int((~finite).sum())}
        notes["rows_dropped"] = {why: n for why, n in lost.items() if n}
        kept = frame[finite].sort_values(["pair", "direction"], kind="stable", ignore_index=True)
        return narrowed(kept), notes

    def _direction(
        self,
        which: list[int],
        runs: dict[str, Recording],
        others: Partners,
        m: dict[str, ndarray],
        direction: str,
        notes: dict,
        tick: Tick,
    ) -> pd.DataFrame:
        names = ("corrupt", "clean") if direction == "denoise" else ("clean", "corrupt")
        base, source = (runs[name] for name in names)
        tokens = Tokens.of(self.pairs, which)
        n_pos = base.tokens.shape[1]
        ran: dict[tuple[Site, int], tuple[ndarray, ndarray]] = {}
        found: list[ndarray] = []
        waiting = _Waiting()
        with base.held():
            for control in range(1 + (self.settings.controls if others.run is not None else 0)):
                along = partial(others.difference, k=control - 1, pair=tokens.pair, position=tokens.position)
                for received in Sweep(base, source, tokens, self.settings, along if control else None).received():
                    ran[received.site, control] = self._put(received, tokens, n_pos, len(which), waiting)
                    if waiting.held > _HELD:
                        found.append(self._measured(base, which, waiting, notes, tick))
                        waiting = _Waiting()
            found.append(self._measured(base, which, waiting, notes, tick))
        measured = np.concatenate(found)
        parts, at = [], 0
        for receiver, control in [*ran, *((r, 0) for r in self.settings.receivers if (r, 0) not in ran)]:
            cells, dose = ran.get((receiver, control), (np.zeros(0, dtype=int), np.zeros(0)))
            own = measured[at : at + len(cells)]
            at += len(cells)
            if control == 0:
                cells, own, dose, run = self._filled(receiver, which, n_pos, m[names[0]], cells, own, dose)
            else:
                run = np.ones(len(cells), dtype=bool)
            lines = self._named(receiver, which, n_pos, cells)
            parts.append(lines.assign(control=control, run=run, m=own, dose=dose))
        frame: Any = pd.concat(parts, ignore_index=True)
        local = frame["pair"].to_numpy()
        frame["m_clean"], frame["m_corrupt"] = m["clean"][local], m["corrupt"][local]
        frame["total"] = frame["m_clean"] - frame["m_corrupt"]
        frame["effect"] = frame["m"] - frame["m_corrupt"] if direction == "denoise" else frame["m_clean"] - frame["m"]
        pools = list(dict.fromkeys(self.pairs.pools))
        frame["pool"] = np.array([pools.index(self.pairs[i].pool) for i in which])[local]
        frame["pair"], frame["direction"] = np.array(which)[local], direction
        return frame[list(COLUMNS)]

    def _write_number(self, receiver: Site) -> int:
        if receiver.point == "resid_post":
            return 2 * self.model.n_layers
        return 2 * receiver.layer + (receiver.point == "mlp_out")

    def _mode(self, receiver: Site) -> str:
        return "last" if receiver.point == "resid_post" else self.settings.positions[receiver.point]

    def _put(
        self, received: Received, tokens: Tokens, n_pos: int, n_pairs: int, waiting: _Waiting
    ) -> tuple[ndarray, ndarray]:
        """Rows of one receiver; the cells that they measure, ascending, and their doses. Rows without a dose are left out."""
        each = self._mode(received.site) == "each"
        pair, position = tokens.pair[received.token], tokens.position[received.token]
        where, width = (pair * n_pos + position, n_pairs * n_pos) if each else (pair, n_pairs)
        cells, row = np.unique(received.sender * width + where, return_inverse=True)
        dose = np.sqrt(np.bincount(row, received.dose**2) / np.bincount(row))
        vectors, known = received.vectors, np.isfinite(dose)
        if not known.all():
            kept = np.flatnonzero(known[row])
            vectors, position = vectors[torch.from_numpy(kept).to(vectors.device)], position[kept]
            cells, dose, row = cells[known], dose[known], (known.cumsum() - 1)[row[kept]]
        if len(cells):
            rows, at = torch.from_numpy(row + waiting.n_rows), torch.from_numpy(position)
            waiting.puts.append(Put(received.site, rows, at, vectors))
            waiting.pair.append(cells % width // n_pos if each else cells % width)
            waiting.above.append(np.full(len(cells), self._write_number(received.site)))
            waiting.n_rows += len(cells)
            waiting.held += vectors.numel()
        return cells, dose

    def _measured(self, base: Recording, which: list[int], waiting: _Waiting, notes: dict, tick: Tick) -> ndarray:
        if not waiting.n_rows:
            return np.zeros(0)
        pair, above = np.concatenate(waiting.pair), np.concatenate(waiting.above)
        writes = 2 * self.model.n_layers * self.model.d_model
        size = waiting.n_rows if self.settings.later == "run" else max(1, _HELD // writes)
        found = []
        for start in range(0, waiting.n_rows, size):
            own, puts = pair[start : start + size], _of_rows(waiting.puts, start, size)
            if self.settings.later == "frozen":
                puts += self._later(base, which, own, above[start : start + size])
            metric = metric_of(self.pairs, np.array(which)[own], self.settings.metric)
            effects = measure_joint(
                *(base, torch.from_numpy(own), puts),
                metrics=metric, path=self.settings.path, nonfinite="count", batch_rows=self.settings.batch_rows, progress=tick,
            )  # fmt: skip
            noted(notes, effects)
            found.append(effects[metric.name].double().numpy())
        return np.concatenate(found)

    def _later(self, base: Recording, which: list[int], pair: ndarray, above: ndarray) -> list[Put]:
        """What blocks write above each row's receiver at the last position, as in the base run."""
        last, found = self.pairs.length[which][pair] - 1, []
        for n in range(int(above.min()) + 1, 2 * self.model.n_layers):
            row = torch.from_numpy(np.flatnonzero(above < n))
            site = Site(n // 2, "mlp_out" if n % 2 else "attn_out")
            found.append(Put(site, row, last[row], base.at(site, torch.from_numpy(pair)[row], last[row])))
        return found

    def _filled(
        self, receiver: Site, which: list[int], n_pos: int, base: ndarray, cells: ndarray, m: ndarray, dose: ndarray
    ) -> tuple[ndarray, ndarray, ndarray, ndarray]:
        """Every edge into a receiver, those that carry no change with the base run's metric: cells, m, dose, whether it was run."""
        each, n_pairs = self._mode(receiver) == "each", len(which)
        inside = np.arange(n_pos) < self.pairs.length[which].numpy()[:, None]
        where = np.flatnonzero(inside) if each else np.arange(n_pairs)
        width = n_pairs * n_pos if each else n_pairs
        every = (np.flatnonzero(self.reach[receiver])[:, None] * width + where).reshape(-1)
        found, doses, run = (
            base[every % width // (n_pos if each else 1)].copy(),
            np.zeros(len(every)),
            np.isin(every, cells),
        )
        found[run], doses[run] = m, dose
        return every, found, doses, run

    def _named(self, receiver: Site, which: list[int], n_pos: int, cells: ndarray) -> pd.DataFrame:
        """Who sends, who receives, where: of cells of one receiver."""
        each, n_pairs = self._mode(receiver) == "each", len(which)
        width = n_pairs * n_pos if each else n_pairs
        pair = cells % width // n_pos if each else cells % width
        position = cells % width % n_pos if each else np.full(len(cells), -1)
        shown = np.array([[*labels(self.pairs[i]), *[""] * n_pos][:n_pos] for i in which])
        senders, of = self.settings.senders, cells // width
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
            "position": position, "label": shown[pair, position] if each else self._mode(receiver),
        })  # fmt: skip


def _of_rows(puts: Sequence[Put], start: int, size: int) -> list[Put]:
    """The edits of some rows, which count from 0."""
    found = []
    for put in puts:
        row, position, vectors = (torch.as_tensor(given) for given in (put.row, put.position, put.vectors))
        here = torch.nonzero((row >= start) & (row < start + size))[:, 0]
        if len(here):
            found.append(Put(put.site, row[here] - start, position[here], vectors[here.to(vectors.device)]))
    return found


def merged(done: Sequence[UnitResult]) -> dict[str, Any]:
    """The units' notes as one."""
    return {
        "rows_dropped": summed(one.notes["rows_dropped"] for one in done),
        **how_measured(("pairs", one.notes) for one in done),
    }

"""A unit of work: some pairs, every cell and control in both directions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy import ndarray

from diagnostics.pairs.controls import NO_CONTROL
from diagnostics.pairs.measured import metric_of, metric_of_run
from diagnostics.pairs.pair import Pairs, labels
from diagnostics.patching.design import PairBatch, Settings, batches, rows_of
from diagnostics.patching.scores import estimates
from diagnostics.running.notes import how_measured, noted, summed
from diagnostics.running.units import Tick, Unit, UnitResult, narrowed
from interventions.effects import measure_joint
from interventions.models.anatomy import n_heads
from interventions.models.causal_model import CausalModel
from interventions.sites import HEADS, Site


class PatchingRunner:
    """Computes units, a few pairs each."""

    def __init__(self, model: CausalModel, pairs: Pairs, settings: Settings):
        self.model, self.pairs, self.settings = model, pairs, settings
        names = list(dict.fromkeys(pairs.pools))
        self.pools = np.array([names.index(pool) for pool in pairs.pools])

    def units(self) -> list[Unit]:
        """In the order of the pairs; rows as many as cells from the first differing token on, and controls."""
        per_token = sum(self._heads(site.layer, site.point) for site in self.settings.sites)
        times = per_token * (1 + self.settings.controls) * len(self.settings.directions)
        tokens = (self.pairs.length - self.pairs.first_difference).numpy()
        found = []
        for n, which in enumerate(batches(len(self.pairs))):
            cells = len(which) if self.settings.positions == "all" else int(tokens[which].sum())
            found.append(Unit.of(rows=cells * times, pairs=n))
        return found

    def _heads(self, layer: int, point: str) -> int:
        return n_heads(self.model, Site(layer, point)) if point in HEADS else 1

    def __call__(self, unit: Unit, tick: Tick) -> tuple[pd.DataFrame, dict[str, Any]]:
        batch = PairBatch(self.model, self.pairs, batches(len(self.pairs))[unit["pairs"]], self.settings)
        notes: dict[str, Any] = {}
        frames = [self._direction(batch, direction, notes, tick) for direction in self.settings.directions]
        return narrowed(pd.concat(frames, ignore_index=True)), notes

    def _direction(self, batch: PairBatch, direction: str, notes: dict[str, Any], tick: Tick) -> pd.DataFrame:
        rows = rows_of(batch, direction)
        base = batch.runs["corrupt" if direction == "denoise" else "clean"]
        whole = np.array(batch.which)
        metric = metric_of(self.pairs, whole[rows.pair], self.settings.metric)
        found = measure_joint(
            *(base, torch.from_numpy(rows.pair), rows.puts),
            metrics=metric, path=self.settings.path, nonfinite="count", batch_rows=self.settings.batch_rows, progress=tick,
        )  # fmt: skip
        noted(notes, found)
        m = found[metric.name].double().numpy()
        without = int((~np.isfinite(m) & (rows.columns["control"] > 0)).sum())
        dropped = {NO_CONTROL: without} if without else {}
        notes["rows_dropped"] = summed([notes.get("rows_dropped", {}), dropped])
        clean, corrupt = (
            metric_of_run(batch.runs[run], self.pairs, batch.which, self.settings.metric)
            for run in ("clean", "corrupt")
        )
        frame: Any = pd.DataFrame({**rows.columns, "m": m, "run": True})
        for name, values in self._scores(batch, direction, rows.columns).items():
            frame[name] = values
        frame = pd.concat([frame, self._zeros(batch, direction, clean, corrupt)], ignore_index=True)
        local = frame["pair"].to_numpy()
        frame["m_clean"], frame["m_corrupt"] = clean[local], corrupt[local]
        frame["total"] = frame["m_clean"] - frame["m_corrupt"]
        frame["effect"] = frame["m"] - frame["m_corrupt"] if direction == "denoise" else frame["m_clean"] - frame["m"]
        sites = self.settings.sites
        number = frame["site"].to_numpy()
        frame["site"] = np.array([site.point for site in sites])[number]
        frame["layer"] = np.array([site.layer for site in sites])[number]
        names = [[*labels(self.pairs[i]), *[""] * batch.n_pos][: batch.n_pos] for i in batch.which]
        shown = np.array([[*own, "all"] for own in names])
        frame["label"] = shown[local, frame["position"].to_numpy()]
        frame["pair"], frame["direction"], frame["pool"] = whole[local], direction, self.pools[whole[local]]
        order = [
            "pool",
            "pair",
            "direction",
            "site",
            "layer",
            "head",
            "position",
            "label",
            "control",
            "run",
            "m",
            "m_clean",
            "m_corrupt",
        ]
        frame = frame[[*order, "effect", "total", "dose", *self.settings.scores]]
        kept = frame[np.isfinite(frame["m"])]
        return kept.sort_values([*order[1:7], "control"], kind="stable", ignore_index=True)

    def _scores(self, batch: PairBatch, direction: str, columns: dict[str, ndarray]) -> dict[str, ndarray]:
        """Each score of each row; nan for controls."""
        if not self.settings.scores:
            return {}
        sites, metric = self.settings.sites, metric_of(self.pairs, batch.which, self.settings.metric)
        found = {}
        for name, by_site in estimates(batch, direction, metric).items():
            values = np.full(len(columns["pair"]), np.nan)
            for number, site in enumerate(sites):
                rows = np.flatnonzero((columns["site"] == number) & (columns["control"] == 0))
                score = by_site[site].cpu().numpy()
                if self.settings.positions == "all":
                    whole = np.where(batch.runs_at(site)[:, :, None], score, 0.0).sum(axis=1)
                    values[rows] = whole[columns["pair"][rows], columns["head"][rows].clip(0)]
                else:
                    at = columns["pair"][rows], columns["position"][rows], columns["head"][rows].clip(0)
                    values[rows] = score[at]
            found[name] = values
        return found

    def _zeros(self, batch: PairBatch, direction: str, clean: ndarray, corrupt: ndarray) -> pd.DataFrame:
        """Cells that cannot differ: 0 exactly, not run."""
        parts = []
        for number, site in enumerate(self.settings.sites if self.settings.positions == "each" else ()):
            pair, position = np.nonzero(batch.inside & ~batch.runs_at(site))
            heads = np.arange(batch.heads[site]) if site.point in HEADS else np.array([-1])
            n = len(pair)
            parts.append(pd.DataFrame({
                "pair": np.tile(pair, len(heads)), "position": np.tile(position, len(heads)), "site": number,
                "head": np.repeat(heads, n), "control": 0, "dose": 0.0, "run": False,
            }))  # fmt: skip
        if not parts:
            return pd.DataFrame()
        frame = pd.concat(parts, ignore_index=True)
        frame["m"] = (corrupt if direction == "denoise" else clean)[frame["pair"].to_numpy()]
        for name in self.settings.scores:
            frame[name] = 0.0
        return frame


def merged(done: Sequence[UnitResult]) -> dict[str, Any]:
    """The units' notes as one."""
    return {
        "rows_dropped": summed(one.notes["rows_dropped"] for one in done),
        **how_measured(("pairs", one.notes) for one in done),
    }

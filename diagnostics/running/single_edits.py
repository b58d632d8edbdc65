"""What every diagnostic of single edits shares: clean activations, contexts, work units, untrained networks, provenance.

A diagnostic says which rows it wants (a `Design`); a study runs them, for the model and for untrained networks of its
shape, unit by unit, and keeps what a reader must know.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from diagnostics.running.clean import SHARD, CleanActivations, RunSettings
from diagnostics.running.units import Unit, UnitResult, Units, narrowed
from diagnostics.statistics.tables import TRAINED
from interventions.edits import angle_between
from interventions.effects import Effects, measure
from interventions.errors import ResultError
from interventions.models.causal_model import CausalModel
from interventions.models.loading import untrained
from interventions.models.wrapping import wrap
from interventions.progress import Progressing
from interventions.provenance import model_identity, model_provenance
from interventions.recording import record
from interventions.replaying.rows import Horizon, Reference
from interventions.sites import Site
from interventions.texts.prompts import Prompts, prompts_for


def among_prompts(prompt: np.ndarray, among: np.ndarray | None) -> np.ndarray:
    """Indices of the entries of `prompt` that are in `among` (None: all)."""
    return np.arange(len(prompt)) if among is None else np.flatnonzero(np.isin(prompt, among))


def column(values: Tensor, repeats: int = 1) -> np.ndarray:
    """A table's column of a tensor, each value `repeats` times."""
    return values.float().reshape(-1).cpu().numpy().repeat(repeats)


def dose_columns(x: Float[Tensor, "target d_model"], edited: Float[Tensor, "target edit d_model"]) -> dict[str, Any]:
    """`delta_norm` = ‖Δx‖ and `delta_angle` in radians of each edit, edits of a target side by side."""
    return {
        "delta_norm": column((edited.float() - x.float()[:, None]).norm(dim=-1)),
        "delta_angle": column(angle_between(x[:, None].expand_as(edited), edited)),
    }


@dataclass(frozen=True)
class EditedRows:
    """Some rows of a design at one site."""

    table: pd.DataFrame
    """one line a row; `target_prompt` and `target_position` say which token is edited"""
    vectors: Tensor
    """edited vectors, `[row, d_model]`"""
    clean: Tensor
    """what stands there, `[row, d_model]`"""
    whole: "EditedPrompts | None" = None
    against: "EditedRows | None" = None
    """further rows, in place only: each is compared with the run in which its `clean` stands in the token's place (rows of one
    token and equal `scale` have the same), not with the prompt as it stands"""


@dataclass(frozen=True)
class EditedPrompts:
    """Edits of all tokens of a prompt at once, in place, read at single tokens."""

    table: pd.DataFrame
    """one line a read, at token (`target_prompt`, `target_position`)"""
    run: np.ndarray
    """which run each line is read from, `[read]`"""
    prompt: np.ndarray
    """`[run]`"""
    vectors: Tensor
    """`[run, pos, d_model]`, right-padded as activations are"""


class Design(Protocol):
    """Which rows a diagnostic wants of one model, drawn once."""

    found: dict[str, Any]
    """for the provenance: what was drawn and what was dropped"""

    def rows(self, site: Site, among: np.ndarray | None) -> EditedRows:
        """The rows whose targets are in the prompts `among` (None: those put into a one-token context): the same rows in
        whatever order they are asked for."""
        ...

    def count(self, site: Site, among: np.ndarray | None, null: bool = False) -> int:
        """How many `rows` there are, or, about, for an untrained network."""
        ...


@dataclass(frozen=True)
class SingleEdits:
    """What came of it."""

    frame: pd.DataFrame
    tokens: list[list[int]]
    provenance: dict[str, Any]


def run_single_edits(
    name: str,
    model: Any,
    prompts: Prompts | Sequence[Sequence[int]] | Sequence[str],
    make: Callable[[CleanActivations], Design],
    settings: RunSettings,
    own: dict[str, Any],
    order: dict[str, Sequence[Any]],
    *,
    folder: str | Path | None = None,
    overwrite: bool = False,
    progress: Progressing = None,
) -> SingleEdits:
    """Run a design on a model and on `settings.null_seeds` untrained networks of its configuration.

    make: the design for one model's clean activations. own: the diagnostic's own settings, part of the run's identity.
    order: columns of its own by which the table is sorted, each with its values in order (none: ascending).
    folder: where finished units are kept (see `units.Units`); None: in memory. progress: called with (rows done, all).
    """
    model = wrap(model)
    prompts = prompts_for(model, prompts)
    settings.check(model)
    identity = {
        "diagnostic": name,
        "settings": own | {k: v for k, v in vars(settings).items() if k != "cache_bytes"},
        "tokens": _hash(prompts.tokens),
        **model_identity(model),
    }
    runner = _Runner(model, prompts, make, settings)
    with Units(folder, identity, overwrite) as units:
        planned = runner.units()
        if units.missing(planned):
            planned = runner.units(counted=True)
        done = units.run(planned, runner, progress)
    frame = pd.concat([d.frame for d in done if len(d.frame)] or [done[0].frame], ignore_index=True)
    notes = _merged(done)
    if frame.empty:
        raise ResultError(f"no row is left; dropped: {notes['rows_dropped']}, {notes['drawn'][TRAINED]}")
    provenance = {
        "diagnostic": name,
        **model_provenance(model),
        "text": prompts.provenance,
        "sites": [str(site) for site in settings.sites],
        "context": list(settings.contexts),
        "horizon": settings.horizon,
        "prompts": len(prompts.tokens),
        "tokens": sum(map(len, prompts.tokens)),
        "sink_filter": settings.sink_filter,
        "seed": settings.seed,
        "null_models": [label for label in runner.labels if label != TRAINED],
        **own,
        "rows": len(frame),
        **notes,
    }
    return SingleEdits(_sorted(frame, runner.labels, settings, order), prompts.tokens, provenance)


def _hash(tokens: list[list[int]]) -> str:
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


class _Runner:
    """Computes units, one model at a time in memory."""

    def __init__(
        self, model: CausalModel, prompts: Prompts, make: Callable[[CleanActivations], Design], settings: RunSettings
    ):
        self.model, self.prompts, self.make, self.settings = model, prompts, make, settings
        self.labels = [TRAINED, *(f"random {seed}" for seed in range(settings.null_seeds))]
        self._current: tuple[str, CleanActivations, Design] | None = None

    def units(self, counted: bool = False) -> list[Unit]:
        """Model by model, shard by shard, so that a recording serves all of its sites. counted: with their numbers of rows."""
        design = self.of(TRAINED)[1] if counted else None
        found = []
        n_shards = -(-len(self.prompts.tokens) // SHARD)
        for label in self.labels:
            for context in self.settings.contexts:
                for shard in range(n_shards) if context == "in_place" else [-1]:
                    for site in self.settings.sites:
                        among = np.arange(shard * SHARD, (shard + 1) * SHARD) if shard >= 0 else None
                        n = design.count(site, among, label != TRAINED) if design else 1
                        found.append(Unit.of(rows=n, model=label, context=context, shard=shard, site=str(site)))
        return found

    def of(self, label: str) -> tuple[CleanActivations, Design]:
        """The clean activations and the design of a model of the study; an untrained network is made when it is asked for."""
        if self._current is None or self._current[0] != label:
            self._current = None  # before another model's activations are recorded
            model = self.model if label == TRAINED else untrained(self.model, int(label.split()[1]))
            clean = CleanActivations(model, self.prompts, self.settings)
            self._current = (label, clean, self.make(clean))
        return self._current[1:]

    def __call__(self, unit: Unit, tick: Callable[[int], None]) -> tuple[pd.DataFrame, dict[str, Any]]:
        """One unit's rows measured."""
        clean, design = self.of(unit["model"])
        site = Site.parse(unit["site"])
        among = clean.shard(unit["shard"]) if unit["context"] == "in_place" else None
        rows, dropped = _usable(design.rows(site, among), clean, self.settings.horizon)
        notes: dict[str, Any] = {"drawn": design.found, "rows_dropped": dropped, "path": None}
        if len(rows.table) == 0:
            return self._table(rows.table, None, unit), notes
        effects = self._measure(clean, unit, site, rows, tick)
        notes |= {"path": effects.path, "why_hooks": effects.why_hooks, "chunks_halved": effects.halvings}
        notes["replay_delta"] = effects.delta
        table = self._table(rows.table, effects, unit)
        if rows.whole is not None:
            table = pd.concat([table, self._whole(clean, unit, site, rows.whole, notes)], ignore_index=True)
        if rows.against is not None and unit["context"] == "in_place":
            table = pd.concat([table, self._against(clean, unit, site, rows.against, notes, tick)], ignore_index=True)
        values = table[[m for m in self.settings.metrics if m != "top1_changed"]].to_numpy(float)
        good = np.isfinite(values).all(axis=1)
        if not good.all():
            _count(dropped, "effect not finite", int((~good).sum()))
        return table.loc[good].reset_index(drop=True), notes

    def _measure(
        self, clean: CleanActivations, unit: Unit, site: Site, rows: EditedRows, tick: Callable[[int], None]
    ) -> Effects:
        how = {"metrics": self.settings.metrics, "batch_rows": self.settings.batch_rows, "path": self.settings.path}
        prompt = torch.tensor(rows.table.target_prompt.to_numpy(), dtype=torch.long)
        position = torch.tensor(rows.table.target_position.to_numpy(), dtype=torch.long)
        if unit["context"] == "in_place":
            first = int(clean.shard(unit["shard"])[0])
            recording = clean.recording(unit["shard"])
            how["horizon"] = self.settings.horizon
            return measure(recording, site, prompt - first, position, rows.vectors, progress=tick, **how)
        alone, zero = record(clean.model, [[0]], [site]), torch.zeros_like(prompt)
        reference = _reference(rows, ["target_prompt", "target_position"])
        return measure(alone, site, zero, zero, rows.vectors, reference=reference, progress=tick, **how)

    def _against(
        self,
        clean: CleanActivations,
        unit: Unit,
        site: Site,
        given: EditedRows,
        notes: dict[str, Any],
        tick: Callable[[int], None],
    ) -> pd.DataFrame:
        rows, dropped = _usable(given, clean, self.settings.horizon)
        for reason, n in dropped.items():
            _count(notes["rows_dropped"], reason, n)
        if not len(rows.table):
            return self._table(rows.table, None, unit)
        effects = measure(
            clean.recording(unit["shard"]),
            site,
            torch.tensor(rows.table.target_prompt.to_numpy() - clean.shard(unit["shard"])[0], dtype=torch.long),
            torch.tensor(rows.table.target_position.to_numpy(), dtype=torch.long),
            rows.vectors,
            reference=_reference(rows, ["target_prompt", "target_position", "scale"]),
            metrics=self.settings.metrics,
            horizon=self.settings.horizon,
            batch_rows=self.settings.batch_rows,
            path=self.settings.path,
            progress=tick,
        )
        _noted(notes, effects)
        return self._table(rows.table, effects, unit)

    def _whole(
        self, clean: CleanActivations, unit: Unit, site: Site, whole: EditedPrompts, notes: dict[str, Any]
    ) -> pd.DataFrame:
        first = int(clean.shard(unit["shard"])[0])
        read = torch.full((len(whole.prompt), len(whole.run)), -1)
        read[whole.run, torch.arange(len(whole.run))] = torch.tensor(
            whole.table.target_position.to_numpy(), dtype=torch.long
        )
        furthest = read.amax(1)
        position = torch.arange(int(furthest.max()) + 1).expand(len(read), -1)
        inside, vectors = position <= furthest[:, None], whole.vectors[:, : position.shape[1]]
        good = (vectors.isfinite().all(dim=-1).cpu() | ~inside).all(dim=1)
        lines = np.flatnonzero(good[whole.run].numpy())
        if lost := len(whole.run) - len(lines):
            _count(notes["rows_dropped"], "some token of the prompt has no such vector", lost)
        table, run = whole.table.iloc[lines].reset_index(drop=True), (good.cumsum(0) - 1)[whole.run[lines]]
        if not len(lines):
            return self._table(table, None, unit)
        effects = measure(
            clean.recording(unit["shard"]),
            site,
            torch.from_numpy(whole.prompt - first)[good],
            torch.where(inside, position, -1)[good],
            vectors[good.to(vectors.device)],
            metrics=self.settings.metrics,
            horizon=read[good],
            batch_rows=self.settings.batch_rows,
            path=self.settings.path,
        )
        _noted(notes, effects)
        at = run, torch.from_numpy(lines)
        return self._table(table, replace(effects, values={k: v[at] for k, v in effects.values.items()}), unit)

    def _table(self, table: pd.DataFrame, effects: Effects | None, unit: Unit) -> pd.DataFrame:
        site = Site.parse(unit["site"])
        table = table.assign(model=unit["model"], context=unit["context"], layer=site.layer, point=site.point)
        h = self.settings.horizon
        for name in self.settings.metrics:
            value = None if effects is None else effects[name]
            if h in (1, "last"):
                table[name] = np.zeros(0, dtype=np.float32) if value is None else value.numpy()
                continue
            assert isinstance(h, int)
            if name == "kl":
                for j in range(h):
                    table[f"kl_at_{j}"] = np.zeros(0, dtype=np.float32) if value is None else value[:, j].numpy()
            total = None if value is None else (value.any(1) if value.dtype == torch.bool else value.sum(1))
            table[name] = np.zeros(0, dtype=np.float32) if total is None else total.numpy()
        return narrowed(table)


def _noted(notes: dict[str, Any], effects: Effects) -> None:
    """How further rows of a unit were measured, added to what is noted of the first."""
    notes["replay_delta"] = float(np.fmax(notes["replay_delta"], effects.delta))
    if effects.path != notes["path"]:
        notes["path"] = f"{notes['path']}+{effects.path}"
    notes["why_hooks"] = notes["why_hooks"] or effects.why_hooks
    notes["chunks_halved"] += effects.halvings


def _reference(rows: EditedRows, columns: list[str]) -> Reference:
    """What each row is compared with, one for all that agree in these columns."""
    index = torch.tensor(rows.table.groupby(columns, sort=False).ngroup().to_numpy())
    first_of = np.unique(index.numpy(), return_index=True)[1]
    return Reference(rows.clean[torch.from_numpy(first_of).to(rows.clean.device)], index)


def _usable(rows: EditedRows, clean: CleanActivations, horizon: Horizon) -> tuple[EditedRows, dict[str, int]]:
    """Without the rows whose vector does not exist, and those whose prompt ends before the horizon."""
    dropped: dict[str, int] = {}
    good = rows.vectors.isfinite().all(dim=-1).cpu().numpy()
    for edit, n in rows.table.edit[~good].value_counts().items():
        _count(dropped, f"{edit}: no such vector (a rotation moves x by at most 2‖x‖)", int(n))
    if isinstance(horizon, int) and horizon > 1:
        left = clean.length[rows.table.target_prompt] - rows.table.target_position.to_numpy()
        _count(dropped, f"prompt ends within the horizon of {horizon}", int((good & (left < horizon)).sum()))
        good &= left >= horizon
    which = torch.from_numpy(np.flatnonzero(good)).to(rows.vectors.device)
    kept = replace(
        rows, table=rows.table.loc[good].reset_index(drop=True), vectors=rows.vectors[which], clean=rows.clean[which]
    )
    return kept, {reason: n for reason, n in dropped.items() if n}


def _count(counts: dict[str, int], reason: str, n: int) -> None:
    counts[reason] = counts.get(reason, 0) + n


def _merged(done: Iterable[UnitResult]) -> dict[str, Any]:
    """Notes of all units as one: what was drawn, dropped, which path ran, how exact it was."""
    drawn: dict[str, Any] = {}
    dropped: dict[str, int] = {}
    paths: dict[str, set[str]] = {}
    delta, halved, reasons = [], 0, set()
    for unit in done:
        notes = unit.notes
        drawn.setdefault(unit.unit["model"], notes["drawn"])
        for reason, n in notes["rows_dropped"].items():
            _count(dropped, reason if unit.unit["model"] == TRAINED else f"{unit.unit['model']}: {reason}", n)
        if notes["path"] is None:
            continue
        paths.setdefault(unit.unit["site"], set()).update(notes["path"].split("+"))
        reasons |= {notes["why_hooks"]} - {None}
        halved += notes["chunks_halved"]
        delta += [] if notes["replay_delta"] is None else [notes["replay_delta"]]
    return {
        "drawn": drawn,
        "rows_dropped": dropped,
        "path": {site: "+".join(sorted(found)) for site, found in paths.items()},
        "why_hooks": sorted(reasons) or None,
        "replay_delta": max(delta, default=None),
        "chunks_halved": halved,
    }


def _sorted(
    frame: pd.DataFrame, labels: list[str], settings: RunSettings, order: dict[str, Sequence[Any]]
) -> pd.DataFrame:
    every: dict[str, Sequence[Any]] = {
        "model": labels,
        "layer": list(dict.fromkeys(site.layer for site in settings.sites)),
        "point": list(dict.fromkeys(site.point for site in settings.sites)),
        "context": settings.contexts,
        **order,
    }
    keys = pd.DataFrame(
        {
            name: pd.Categorical(frame[name], categories=list(values), ordered=True).codes
            if len(values)
            else frame[name]
            for name, values in every.items()
        }
    )
    index = keys.sort_values(list(keys.columns), kind="stable").index
    return frame.loc[index, [*every, *(c for c in frame if c not in every)]].reset_index(drop=True)

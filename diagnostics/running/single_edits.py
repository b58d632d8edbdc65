"""Runs of single edits: the rows of a `Design` measured unit by unit, for a model and randomly initialised models of its shape."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from diagnostics.results.result import Result
from diagnostics.running.clean import CleanActivations, RunSettings
from diagnostics.running.notes import merged, noted
from diagnostics.running.provenance import run_identity, run_provenance
from diagnostics.running.recordings import shards
from diagnostics.running.units import Tick, Unit, narrowed, run_table
from diagnostics.statistics.tables import TRAINED
from interventions.edits import angle_between
from interventions.effects import Effects, measure
from interventions.models.causal_model import CausalModel
from interventions.models.loading import untrained
from interventions.models.wrapping import wrap
from interventions.progress import Progressing
from interventions.recording import Recording, record
from interventions.replaying.rows import Horizon, Reference
from interventions.sites import Site
from interventions.texts.prompts import Prompts, prompts_for

R = TypeVar("R", bound=Result)
_TARGET = ("target_prompt", "target_position")


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
        """How many `rows` there are, or, about, for a randomly initialised model."""
        ...


def run_single_edits(
    kind: type[R],
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
) -> R:
    """Run a design on a model and on `settings.null_seeds` randomly initialised models of its configuration; a result of this kind.

    make: the design for one model's clean activations. own: the diagnostic's own settings, part of the run's identity.
    order: columns of its own by which the table is sorted, each with its values in order (none: ascending).
    folder: where finished units are kept (see `units.Units`); None: in memory. progress: called with (rows done, all).
    Raises `SiteError` for a site that does not exist, `ResultError` for invalid settings and where no row is left.
    """
    model = wrap(model)
    prompts = prompts_for(model, prompts)
    settings.check(model)
    runner = _Runner(model, prompts, make, settings)
    frame, notes = run_table(
        runner.units(),
        folder,
        runner,
        lambda done: merged(done, "model"),
        identity=run_identity(kind.NAME, model, prompts, {"settings": own | settings.identity()}),
        counted=lambda: runner.units(counted=True),
        overwrite=overwrite,
        progress=progress,
    )
    said = {
        "context": list(settings.contexts),
        "horizon": settings.horizon,
        "sink_filter": settings.sink_filter,
        "seed": settings.seed,
        **own,
        "rows": len(frame),
        **notes,
    }
    provenance = run_provenance(kind.NAME, model, prompts, settings.sites, said, runner.labels[1:])
    return kind(_sorted(frame, runner.labels, settings, order), prompts.tokens, provenance)


class _Runner:
    """Computes units, one model at a time in memory."""

    def __init__(
        self, model: CausalModel, prompts: Prompts, make: Callable[[CleanActivations], Design], settings: RunSettings
    ):
        self.model, self.prompts, self.make, self.settings = model, prompts, make, settings
        self.labels = [TRAINED, *(f"random {seed}" for seed in range(settings.null_seeds))]
        self._current: tuple[str, CleanActivations, Design] | None = None

    def units(self, counted: bool = False) -> list[Unit]:
        """Model by model, shard by shard, so that a recording is used for all of its sites. counted: with their numbers of rows."""
        design = self.of(TRAINED)[1] if counted else None
        found = []
        in_place = list(enumerate(shards(len(self.prompts.tokens))))
        for label in self.labels:
            for context in self.settings.contexts:
                for shard, among in in_place if context == "in_place" else [(-1, None)]:
                    for site in self.settings.sites:
                        n = design.count(site, among, label != TRAINED) if design else 1
                        labels = {"model": label, "context": context, "shard": shard, "site": str(site)}
                        found.append(Unit.of(rows=n, group=(label, shard), **labels))
        return found

    def prepare(self, label: str) -> None:
        """Form what units of a model share."""
        self.of(label)

    def of(self, label: str) -> tuple[CleanActivations, Design]:
        """The clean activations and the design of a model of the run; a randomly initialised one is made when it is asked for."""
        if self._current is None or self._current[0] != label:
            self._current = None  # before another model's activations are recorded
            model = self.model if label == TRAINED else untrained(self.model, int(label.split()[1]))
            clean = CleanActivations(model, self.prompts, self.settings)
            self._current = (label, clean, self.make(clean))
        return self._current[1:]

    def __call__(self, unit: Unit, tick: Tick) -> tuple[pd.DataFrame, dict[str, Any]]:
        """One unit's rows measured."""
        work = _Work(*self.of(unit["model"]), unit, self.settings, tick)
        table = work.table()
        dropped = {reason: n for reason, n in work.dropped.items() if n}
        if unit["model"] != TRAINED:
            dropped = {f"{unit['model']}: {reason}": n for reason, n in dropped.items()}
        return table, work.notes | {"rows_dropped": dropped}


class _Work:
    """The rows of one unit."""

    def __init__(self, clean: CleanActivations, design: Design, unit: Unit, settings: RunSettings, tick: Tick):
        self.clean, self.design, self.unit, self.settings, self.tick = clean, design, unit, settings, tick
        self.site, self.in_place = Site.parse(unit["site"]), unit["context"] == "in_place"
        self.dropped: Counter[str] = Counter()
        self.notes: dict[str, Any] = {"drawn": design.found, "path": None}

    def table(self) -> pd.DataFrame:
        """The rows of every kind, less those whose effect is not finite."""
        among = self.clean.shards[self.unit["shard"]] if self.in_place else None
        rows = self.design.rows(self.site, among)
        table = self._rows(rows, () if self.in_place else _TARGET)
        if self.notes["path"] is None:
            return table
        if rows.whole is not None:
            table = pd.concat([table, self._whole(rows.whole)], ignore_index=True)
        if rows.against is not None and self.in_place:
            table = pd.concat([table, self._rows(rows.against, (*_TARGET, "scale"))], ignore_index=True)
        values = table[[m for m in self.settings.metrics if m != "top1_changed"]].to_numpy(float)
        good = np.isfinite(values).all(axis=1)
        self.dropped["effect not finite"] += int((~good).sum())
        return table.loc[good].reset_index(drop=True)

    def _rows(self, given: EditedRows, same: Sequence[str]) -> pd.DataFrame:
        """same: columns in which rows agree that are compared with one run of what stands there; none: with the prompt as it is."""
        rows = self._usable(given)
        if not len(rows.table):
            return self._columns(rows.table, None)
        prompt, position = (torch.tensor(rows.table[name].to_numpy(), dtype=torch.long) for name in _TARGET)
        if self.in_place:
            recording = self.clean.recording(self.unit["shard"])
            prompt = prompt - int(self.clean.shards[self.unit["shard"]][0])
        else:
            recording = record(self.clean.model, [[0]], [self.site])
            prompt = position = torch.zeros_like(prompt)
        reference = _reference(rows, list(same)) if same else None
        return self._columns(
            rows.table,
            self._measured(
                recording,
                prompt,
                position,
                rows.vectors,
                self.settings.horizon,
                reference=reference,
                progress=self.tick,
            ),
        )

    def _whole(self, whole: EditedPrompts) -> pd.DataFrame:
        first = int(self.clean.shards[self.unit["shard"]][0])
        read = torch.full((len(whole.prompt), len(whole.run)), -1)
        read[whole.run, torch.arange(len(whole.run))] = torch.tensor(
            whole.table.target_position.to_numpy(), dtype=torch.long
        )
        furthest = read.amax(1)
        position = torch.arange(int(furthest.max()) + 1).expand(len(read), -1)
        inside, vectors = position <= furthest[:, None], whole.vectors[:, : position.shape[1]]
        good = (vectors.isfinite().all(dim=-1).cpu() | ~inside).all(dim=1)
        lines = np.flatnonzero(good[whole.run].numpy())
        self.dropped["some token of the prompt has no such vector"] += len(whole.run) - len(lines)
        table, run = whole.table.iloc[lines].reset_index(drop=True), (good.cumsum(0) - 1)[whole.run[lines]]
        if not len(lines):
            return self._columns(table, None)
        effects = self._measured(
            self.clean.recording(self.unit["shard"]),
            torch.from_numpy(whole.prompt - first)[good],
            torch.where(inside, position, -1)[good],
            vectors[good.to(vectors.device)],
            read[good],
        )
        at = run, torch.from_numpy(lines)
        return self._columns(table, replace(effects, values={k: v[at] for k, v in effects.values.items()}))

    def _measured(
        self, recording: Recording, prompt: Tensor, position: Tensor, vectors: Tensor, horizon: Horizon, **how: Any
    ) -> Effects:
        s = self.settings
        how |= {"metrics": s.metrics, "batch_rows": s.batch_rows, "path": s.path, "nonfinite": "count"}
        effects = measure(recording, self.site, prompt, position, vectors, horizon=horizon, **how)
        noted(self.notes, effects)
        return effects

    def _usable(self, rows: EditedRows) -> EditedRows:
        """Without the rows whose vector does not exist, and those whose prompt ends before the horizon."""
        good, horizon = rows.vectors.isfinite().all(dim=-1).cpu().numpy(), self.settings.horizon
        for edit, n in rows.table.edit[~good].value_counts().items():
            self.dropped[f"{edit}: no such vector (a rotation moves x by at most 2‖x‖)"] += int(n)
        if isinstance(horizon, int) and horizon > 1:
            left = self.clean.length[rows.table.target_prompt] - rows.table.target_position.to_numpy()
            self.dropped[f"prompt ends within the horizon of {horizon}"] += int((good & (left < horizon)).sum())
            good &= left >= horizon
        which = torch.from_numpy(np.flatnonzero(good)).to(rows.vectors.device)
        table = rows.table.loc[good].reset_index(drop=True)
        return replace(rows, table=table, vectors=rows.vectors[which], clean=rows.clean[which])

    def _columns(self, table: pd.DataFrame, effects: Effects | None) -> pd.DataFrame:
        """The rows' table with where they are and their effects (None: of no row), in the types of units."""
        unit, site, h = self.unit, self.site, self.settings.horizon
        table = table.assign(model=unit["model"], context=unit["context"], layer=site.layer, point=site.point)
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


def _reference(rows: EditedRows, columns: list[str]) -> Reference:
    """What each row is compared with, one for all that agree in these columns."""
    index = torch.tensor(rows.table.groupby(columns, sort=False).ngroup().to_numpy())
    first_of = np.unique(index.numpy(), return_index=True)[1]
    return Reference(rows.clean[torch.from_numpy(first_of).to(rows.clean.device)], index)


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

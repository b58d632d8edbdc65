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

from diagnostics.frames import TRAINED as TRAINED
from diagnostics.progress import Progressing
from diagnostics.results import model_identity, model_provenance
from diagnostics.sampling import Pairs, TokenFilter, token_filter
from diagnostics.units import Done, Unit, Units, narrowed
from interventions.anatomy import check_site
from interventions.edits import angle_between, norm
from interventions.effects import Effects, measure
from interventions.errors import ResultError
from interventions.loading import untrained
from interventions.models import CausalModel, wrap
from interventions.recording import Recording, record
from interventions.rows import Horizon, Reference
from interventions.sites import Site
from interventions.texts import Prompts, prompts_for

CONTEXTS = ("in_place", "single_token")
"""`in_place`: the token's own prompt and position. `single_token`: the vector as the only token, id 0, as in the paper."""
METRICS = ("kl", "js", "clean_entropy", "top1_changed", "kl_direct")
SHARD = 64
"""prompts in a work unit"""


def default_layers(n: int) -> list[int]:
    """Six blocks from the first to the last."""
    return sorted({0, n // 4, n // 2, 3 * n // 4, max(n - 2, 0), n - 1})


def chosen_sites(model: CausalModel, layers: Sequence[int] | None, sites: Sequence[Site] | None) -> tuple[Site, ...]:
    """The sites given, or `resid_post` of the layers given, or of six blocks; each once. Raises `ResultError` for both."""
    if layers is not None and sites is not None:
        raise ResultError("layers and sites both given; give one of them")
    if sites is None:
        sites = [Site(layer) for layer in (default_layers(model.n_layers) if layers is None else layers)]
    return tuple(dict.fromkeys(sites))


def chosen_contexts(context: str) -> tuple[str, ...]:
    """One of `CONTEXTS`, or both."""
    return CONTEXTS if context == "both" else (context,)


def among_prompts(prompt: np.ndarray, among: np.ndarray | None) -> np.ndarray:
    """Indices of the entries of `prompt` that are in `among` (None: all)."""
    return np.arange(len(prompt)) if among is None else np.flatnonzero(np.isin(prompt, among))


@dataclass(frozen=True)
class Settings:
    """What studies have in common; part of their identity."""

    sites: tuple[Site, ...]
    contexts: tuple[str, ...] = ("in_place",)
    horizon: Horizon = 1
    sink_filter: float | None = 10.0
    seed: int = 0
    null_seeds: int = 0
    """untrained networks of the same configuration"""
    batch_rows: int | None = None
    path: str = "auto"
    cache_bytes: int = 4 * 2**30
    """keys and values kept at once; beyond that prompts are recorded again"""
    metrics: tuple[str, ...] = METRICS

    def check(self, model: CausalModel) -> None:
        """Raise `SiteError` or `ResultError` for settings that do not serve."""
        if not self.sites:
            raise ResultError("no site; give at least one layer")
        for site in self.sites:
            check_site(model, site)
        if wrong := [context for context in self.contexts if context not in CONTEXTS]:
            raise ResultError(f"no context {wrong[0]!r}; known: {', '.join(CONTEXTS)}, both")
        if not (self.horizon == "last" or (isinstance(self.horizon, int) and self.horizon >= 1)):
            raise ResultError(f"horizon {self.horizon!r}; expected a number of positions, 1 or more, or 'last'")
        if self.horizon != 1 and "single_token" in self.contexts:
            raise ResultError(
                "a single token has no later positions; use context in_place with a horizon above 1, or horizon 1"
            )
        if self.null_seeds < 0:
            raise ResultError(f"{self.null_seeds} untrained networks; expected 0 or more")


class Clean:
    """One model's clean activations at the sites of a study, and which tokens can serve."""

    def __init__(self, model: CausalModel, prompts: Prompts, settings: Settings):
        self.model, self.prompts, self.settings = model, prompts, settings
        self.length = np.array([len(tokens) for tokens in prompts.tokens])
        parts: dict[Site, list[Tensor]] = {site: [] for site in settings.sites}
        self._kept: dict[int, Recording] = {}
        for number in range(self.n_shards):
            recording = self._record(number)
            for site in settings.sites:
                parts[site].append(recording.activations[site])
            self._keep(number, recording)
        self.activations = {site: _joined(some) for site, some in parts.items()}
        self.special = np.zeros((len(self.length), self.length.max()), dtype=bool)
        for row, flags in zip(self.special, prompts.special, strict=True):
            row[: len(flags)] = flags
        self.filter: TokenFilter = token_filter(
            list(self.activations.values()), self.length, self.special, settings.sink_filter
        )
        self.usable = self.filter.usable
        self.tokens = np.nonzero(self.usable)
        self.norm_of_median = self._norm_of_median()

    def filter_at(self, site: Site) -> TokenFilter:
        """Which tokens cannot serve at one site, whatever other sites the study has."""
        return token_filter([self.activations[site]], self.length, self.special, self.settings.sink_filter)

    @property
    def n_shards(self) -> int:
        return -(-len(self.length) // SHARD)

    def shard(self, number: int) -> np.ndarray:
        """The prompts of a shard."""
        return np.arange(number * SHARD, min((number + 1) * SHARD, len(self.length)))

    def recording(self, number: int) -> Recording:
        """The recording of a shard, with keys and values: kept where there is room for them, else recorded again."""
        if number not in self._kept:
            self._keep(number, self._record(number))
        return self._kept[number]

    def _keep(self, number: int, recording: Recording) -> None:
        """The first shards stay as long as there is room, and one more."""
        size = sum(t.nbytes for r in (*self._kept.values(), recording) for t in (r.keys or []) + (r.values or []))
        if size > self.settings.cache_bytes and self._kept:
            self._kept.pop(max(self._kept))
        self._kept[number] = recording

    def _record(self, number: int) -> Recording:
        return record(self.model, [self.prompts.tokens[i] for i in self.shard(number)], self.settings.sites)

    def at(self, site: Site, prompt: np.ndarray, position: np.ndarray) -> Tensor:
        """Clean activations of single tokens, `[row, d_model]`."""
        x = self.activations[site]
        return x[torch.from_numpy(prompt).to(x.device), torch.from_numpy(position).to(x.device)]

    def pair_norm_of_median(self, pairs: Pairs) -> np.ndarray:
        """The larger `norm_of_median` of each pair's two tokens, `[pair]`."""
        largest = self.norm_of_median
        target = largest[pairs.target_prompt, pairs.target_position]
        return np.maximum(target, largest[pairs.source_prompt, pairs.source_position])

    def between(self, site: Site, n: int, stream: torch.Generator, chosen: np.ndarray) -> Tensor:
        """Differences of two random usable tokens' activations: of `n` drawn from the stream those `chosen`, `[chosen, d_model]`."""
        prompt, position = self.tokens
        two = torch.randint(len(prompt), (2, n), generator=stream).numpy()
        two[1] = np.where(two[0] == two[1], (two[1] + 1) % len(prompt), two[1])  # another token
        one, other = (self.at(site, prompt[i], position[i]).float() for i in two[:, chosen])
        return one - other

    def _norm_of_median(self) -> np.ndarray:
        """‖x‖ over the site's median, the largest over sites, `[prompt, pos]`: what the sink filter looks at."""
        largest = np.zeros(self.usable.shape)
        inside = np.arange(self.usable.shape[1]) < self.length[:, None]
        for x in self.activations.values():
            size = norm(x).squeeze(-1).cpu().numpy()
            known = inside & np.isfinite(size)
            largest = np.fmax(largest, np.where(known, size / np.median(size[known]), np.nan))
        return largest


def _joined(parts: list[Tensor]) -> Tensor:
    width = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, 0, 0, width - part.shape[1])) for part in parts])


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
class Rows:
    """Some rows of a design at one site."""

    table: pd.DataFrame
    """one line a row; `target_prompt` and `target_position` say which token is edited"""
    vectors: Tensor
    """edited vectors, `[row, d_model]`"""
    clean: Tensor
    """what stands there, `[row, d_model]`"""
    whole: "Whole | None" = None
    against: "Rows | None" = None
    """further rows, in place only: each is compared with the run in which its `clean` stands in the token's place (rows of one
    token and equal `scale` have the same), not with the prompt as it stands"""


@dataclass(frozen=True)
class Whole:
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

    def rows(self, site: Site, among: np.ndarray | None) -> Rows:
        """The rows whose targets are in the prompts `among` (None: those put into a one-token context): the same rows in
        whatever order they are asked for."""
        ...

    def count(self, site: Site, among: np.ndarray | None, null: bool = False) -> int:
        """How many `rows` there are, or, about, for an untrained network."""
        ...


@dataclass(frozen=True)
class Study:
    """What came of it."""

    frame: pd.DataFrame
    tokens: list[list[int]]
    provenance: dict[str, Any]


def run_study(
    name: str,
    model: Any,
    prompts: Prompts | Sequence[Sequence[int]] | Sequence[str],
    make: Callable[[Clean], Design],
    settings: Settings,
    own: dict[str, Any],
    order: dict[str, Sequence[Any]],
    *,
    folder: str | Path | None = None,
    overwrite: bool = False,
    progress: Progressing = None,
) -> Study:
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
    return Study(_sorted(frame, runner.labels, settings, order), prompts.tokens, provenance)


def _hash(tokens: list[list[int]]) -> str:
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


class _Runner:
    """Computes units, one model at a time in memory."""

    def __init__(self, model: CausalModel, prompts: Prompts, make: Callable[[Clean], Design], settings: Settings):
        self.model, self.prompts, self.make, self.settings = model, prompts, make, settings
        self.labels = [TRAINED, *(f"random {seed}" for seed in range(settings.null_seeds))]
        self._current: tuple[str, Clean, Design] | None = None

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

    def of(self, label: str) -> tuple[Clean, Design]:
        """The clean activations and the design of a model of the study; an untrained network is made when it is asked for."""
        if self._current is None or self._current[0] != label:
            self._current = None  # before another model's activations are recorded
            model = self.model if label == TRAINED else untrained(self.model, int(label.split()[1]))
            clean = Clean(model, self.prompts, self.settings)
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

    def _measure(self, clean: Clean, unit: Unit, site: Site, rows: Rows, tick: Callable[[int], None]) -> Effects:
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
        self, clean: Clean, unit: Unit, site: Site, given: Rows, notes: dict[str, Any], tick: Callable[[int], None]
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

    def _whole(self, clean: Clean, unit: Unit, site: Site, whole: Whole, notes: dict[str, Any]) -> pd.DataFrame:
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


def _reference(rows: Rows, columns: list[str]) -> Reference:
    """What each row is compared with, one for all that agree in these columns."""
    index = torch.tensor(rows.table.groupby(columns, sort=False).ngroup().to_numpy())
    first_of = np.unique(index.numpy(), return_index=True)[1]
    return Reference(rows.clean[torch.from_numpy(first_of).to(rows.clean.device)], index)


def _usable(rows: Rows, clean: Clean, horizon: Horizon) -> tuple[Rows, dict[str, int]]:
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


def _merged(done: Iterable[Done]) -> dict[str, Any]:
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
    frame: pd.DataFrame, labels: list[str], settings: Settings, order: dict[str, Sequence[Any]]
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

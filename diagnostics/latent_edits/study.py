"""What diagnostics of single latents at single tokens share: where latents fire, work units, provenance.

A diagnostic says at which tokens it asks (`Items`) and what it does with some of them at a `Bench`; a study runs this SAE by SAE,
shard by shard, and keeps what a reader must know.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch

from diagnostics.latent_edits.bench import LatentEdits
from diagnostics.latent_edits.firings import Firings
from diagnostics.results.result import Result
from diagnostics.running.clean import SHARD, CleanActivations, RunSettings
from diagnostics.running.units import Tick, Unit, UnitResult, Units, narrowed
from diagnostics.sampling.tokens import ranked_tokens
from diagnostics.statistics.tables import where
from interventions.errors import ResultError
from interventions.models.causal_model import CausalModel
from interventions.models.wrapping import wrap
from interventions.progress import Progressing
from interventions.provenance import model_identity, model_provenance
from interventions.texts.prompts import Prompts, prompts_for
from sae_models.active_latents import active_latents
from sae_models.dictionaries import Dictionary, dictionaries_of

R = TypeVar("R", bound=Result)


@dataclass(frozen=True)
class Items:
    """At which tokens a diagnostic asks."""

    table: pd.DataFrame
    """`target_prompt`, `target_position`, and columns of the diagnostic's own; one line an item"""
    said: dict[str, Any]
    """what was drawn and what was dropped"""


Choose = Callable[[CleanActivations, Dictionary, Firings], Items]
Compute = Callable[[LatentEdits, pd.DataFrame], pd.DataFrame]


def check_numbers(least: int = 1, **numbers: int) -> None:
    """Raise `ResultError` where one of the numbers named is below `least`."""
    if low := {name: n for name, n in numbers.items() if n < least}:
        said = ", ".join(f"{name} {n}" for name, n in low.items())
        raise ResultError(f"{said}; expected {least} or more")


def asked_latents(latents: int | Sequence[int]) -> int | list[int]:
    """How many, or which, as JSON can hold it. Raises `ResultError` for none."""
    if isinstance(latents, int):
        check_numbers(latents=latents)
        return latents
    if not len(latents):
        raise ResultError("no latents; give at least one, or how many")
    return [int(i) for i in latents]


def token_items(clean: CleanActivations, firings: Firings, n_tokens: int, among: np.ndarray | None = None) -> Items:
    """The first usable tokens of an order fixed by the seed; with `among`, of those at which two of these latents are active."""
    prompt, position = ranked_tokens(clean.length, clean.settings.seed, "target")
    good = clean.usable.copy()
    if among is not None:
        entry = np.isin(firings.active.latent, among)
        met = np.bincount(firings.active.token[entry], minlength=firings.active.n_tokens) >= 2
        good[firings.prompt, firings.position] &= met
    some = np.flatnonzero(good[prompt, position])[:n_tokens]
    said: dict[str, Any] = {"tokens": len(some), "asked": n_tokens, "usable": int(clean.usable.sum())}
    said["tokens left out"] = clean.filter.left_out()
    said |= {} if among is None else {"tokens with two of the latents": int(good.sum())}
    return Items(pd.DataFrame({"target_prompt": prompt[some], "target_position": position[some]}), said)


def run_latent_edits(
    kind: type[R],
    model: Any,
    prompts: Prompts | Sequence[Sequence[int]] | Sequence[str],
    saes: Any,
    choose: Choose,
    compute: Compute,
    own: dict[str, Any],
    finite: Sequence[str],
    *,
    sink_filter: float | None,
    seed: int,
    path: str,
    folder: str | Path | None,
    overwrite: bool,
    progress: Progressing,
) -> R:
    """Ask at the items of every SAE, a unit for each SAE and 64 prompts; a result of this kind.

    choose: the items of one SAE. compute: the table of some items of one shard, with `target_prompt`, `target_position`. own: the
    diagnostic's settings, part of the run's identity; `latents`, where they are named there, must exist. Lines that are not finite
    in a column of `finite` are dropped and counted. Raises `ResultError` when no line is left, and what `dictionaries_of` raises.
    """
    model = wrap(model)
    prompts = prompts_for(model, prompts)
    probes = dictionaries_of(saes, model, None)
    _check_exist(own.get("latents"), probes)
    sites = tuple(dict.fromkeys(probe.site for probe in probes))
    settings = RunSettings(sites=sites, sink_filter=sink_filter, seed=seed, path=path)
    settings.check(model)
    identity = {
        "diagnostic": kind.NAME,
        "settings": own | {k: v for k, v in vars(settings).items() if k != "cache_bytes"},
        "saes": {p.name: p.provenance() for p in probes},
        "tokens": hashlib.sha256(json.dumps(prompts.tokens).encode()).hexdigest(),
        **model_identity(model),
    }
    runner = _Runner(model, prompts, probes, choose, compute, settings, finite)
    with Units(folder, identity, overwrite) as units:
        planned = runner.units()
        if units.missing(planned):
            planned = runner.units(counted=True)
        done = units.run(planned, runner, progress)
    tables = [d.frame for d in done if len(d.frame)]
    notes = _merged(done)
    if not tables:
        raise ResultError(f"no row is left; drawn: {notes['drawn']}, dropped: {notes['rows_dropped']}")
    frame = pd.concat(tables, ignore_index=True)
    provenance = {
        "diagnostic": kind.NAME,
        **model_provenance(model),
        "text": prompts.provenance,
        "sites": [str(site) for site in sites],
        "context": ["in_place"],
        "prompts": len(prompts.tokens),
        "tokens": sum(map(len, prompts.tokens)),
        "sink_filter": sink_filter,
        "seed": seed,
        "null_models": [],
        "saes": identity["saes"],
        **own,
        "rows": len(frame),
        **notes,
    }
    return kind(frame, prompts.tokens, provenance)


def _check_exist(latents: Any, probes: Sequence[Dictionary]) -> None:
    named = latents if isinstance(latents, list) else []
    for probe in probes:
        if bad := [i for i in named if not 0 <= i < len(probe)]:
            raise ResultError(f"latents {bad} of {probe.name} do not exist; it has {len(probe)}, from 0 on")


class _Runner:
    """Computes units; activations and firings are formed when first asked for."""

    def __init__(
        self, model: CausalModel, prompts: Prompts, probes: Sequence[Dictionary], choose: Choose, compute: Compute,
        settings: RunSettings, finite: Sequence[str],
    ):  # fmt: skip
        self.model, self.prompts, self.probes, self.finite = model, prompts, {p.name: p for p in probes}, list(finite)
        self.choose, self.compute, self.settings = choose, compute, settings
        self._items: dict[str, tuple[Firings, Items]] = {}

    @cached_property
    def clean(self) -> CleanActivations:
        return CleanActivations(self.model, self.prompts, self.settings)

    def units(self, counted: bool = False) -> list[Unit]:
        found = []
        for name, probe in self.probes.items():
            for shard in range(-(-len(self.prompts.tokens) // SHARD)):
                rows = max(1, len(self._of(self.items(name)[1], shard))) if counted else 1
                found.append(Unit.of(rows=rows, sae=name, site=str(probe.site), shard=shard))
        return found

    def items(self, name: str) -> tuple[Firings, Items]:
        """Where the SAE's latents fire and at which tokens it is asked about."""
        if name not in self._items:
            clean, probe = self.clean, self.probes[name]
            assert probe.sae is not None
            prompt, position = clean.tokens
            firings = Firings(prompt, position, active_latents(probe.sae, clean.at(probe.site, prompt, position)))
            items = self.choose(clean, probe, firings)
            order = ["target_prompt", "target_position", *(c for c in ("latent",) if c in items.table)]
            self._items[name] = (
                firings,
                replace(items, table=items.table.sort_values(order, kind="stable").reset_index(drop=True)),
            )
        return self._items[name]

    def _of(self, items: Items, shard: int) -> pd.DataFrame:
        return where(items.table, items.table["target_prompt"] // SHARD == shard).reset_index(drop=True)

    @torch.no_grad()
    def __call__(self, unit: Unit, tick: Tick) -> tuple[pd.DataFrame, dict[str, Any]]:
        probe = self.probes[unit["sae"]]
        firings, items = self.items(probe.name)
        notes: dict[str, Any] = {"drawn": items.said, "rows_dropped": {}}
        some = self._of(items, unit["shard"])
        if not len(some):
            return pd.DataFrame(), notes
        bench = LatentEdits(self.clean, probe, firings, unit["shard"], notes, tick)
        # Which path serves and how exact it is, from a few tokens put back as they were; their KL is the noise floor.
        few = some.iloc[:16].reset_index(drop=True)
        notes["self_kl"] = float(bench.measured(few, bench.x(few)[:, None])["kl"].max())
        table = self.compute(bench, some)
        good = np.isfinite(table[self.finite].to_numpy(float)).all(axis=1)
        if not good.all():
            notes["rows_dropped"]["effect not finite"] = int((~good).sum())
        table = table.loc[good].reset_index(drop=True)
        table.insert(0, "sae", probe.name)
        table.insert(1, "layer", probe.site.layer)
        table.insert(2, "point", probe.site.point)
        return narrowed(table), notes


def _merged(done: Sequence[UnitResult]) -> dict[str, Any]:
    """Notes of all units as one: what was drawn and dropped, which path ran, how exact it was, the noise floor."""
    drawn: dict[str, Any] = {}
    dropped: dict[str, int] = {}
    for unit in done:
        drawn.setdefault(unit.unit["sae"], unit.notes["drawn"])
        for reason, n in unit.notes["rows_dropped"].items():
            dropped[reason] = dropped.get(reason, 0) + n
    ran = [d for d in done if "path" in d.notes]
    delta = [d.notes["replay_delta"] for d in ran if d.notes["replay_delta"] is not None]
    paths: dict[str, set[str]] = {}
    for d in ran:
        paths.setdefault(str(d.unit["site"]), set()).update(d.notes["path"])
    return {
        "drawn": drawn,
        "rows_dropped": dropped,
        "path": {site: "+".join(sorted(found)) for site, found in paths.items()},
        "why_hooks": sorted({d.notes["why_hooks"] for d in ran} - {None}) or None,
        "replay_delta": max(delta, default=None),
        "self_kl": max((d.notes["self_kl"] for d in ran), default=None),
    }

"""Runs of diagnostics of single latents at single tokens: SAE by SAE, 64 prompts at a time.

A diagnostic chooses the tokens (`Items`), and measures some of them at a time through `LatentEdits`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch

from diagnostics.latent_edits.bench import LatentEdits
from diagnostics.latent_edits.firings import Firings
from diagnostics.latent_edits.items import Items
from diagnostics.results.result import Result
from diagnostics.running.clean import CleanActivations, RunSettings
from diagnostics.running.notes import merged
from diagnostics.running.provenance import run_identity, run_provenance
from diagnostics.running.recordings import SHARD, shards
from diagnostics.running.units import Tick, Unit, UnitResult, narrowed, run_table
from diagnostics.statistics.tables import where
from interventions.errors import ResultError
from interventions.models.causal_model import CausalModel
from interventions.models.wrapping import wrap
from interventions.progress import Progressing
from interventions.texts.prompts import Prompts, prompts_for
from sae_models.active_latents import active_latents
from sae_models.dictionaries import Dictionary, dictionaries_of

R = TypeVar("R", bound=Result)
Choose = Callable[[CleanActivations, Dictionary, Firings], Items]
Compute = Callable[[LatentEdits, pd.DataFrame], pd.DataFrame]


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
    dictionaries = dictionaries_of(saes, model, None)
    _check_exist(own.get("latents"), dictionaries)
    described = {"saes": {d.name: d.provenance() for d in dictionaries}}
    settings = RunSettings(
        sites=tuple(dict.fromkeys(d.site for d in dictionaries)),
        sink_filter=sink_filter,
        seed=seed,
        path=path,
    )
    settings.check(model)
    runner = _Runner(model, prompts, dictionaries, choose, compute, settings, finite)
    frame, notes = run_table(
        runner.units(),
        folder,
        runner,
        _merged,
        identity=run_identity(kind.NAME, model, prompts, {"settings": own | settings.identity()} | described),
        counted=lambda: runner.units(counted=True),
        overwrite=overwrite,
        progress=progress,
    )
    said = {"context": ["in_place"], "sink_filter": sink_filter, "seed": seed}
    said |= described | own | {"rows": len(frame)} | notes
    return kind(frame, prompts.tokens, run_provenance(kind.NAME, model, prompts, settings.sites, said))


def _check_exist(latents: Any, dictionaries: Sequence[Dictionary]) -> None:
    named = latents if isinstance(latents, list) else []
    for dictionary in dictionaries:
        if bad := [i for i in named if not 0 <= i < len(dictionary)]:
            raise ResultError(f"latents {bad} of {dictionary.name} do not exist; it has {len(dictionary)}, from 0 on")


class _Runner:
    """Computes units; activations and firings are formed when first asked for."""

    def __init__(
        self, model: CausalModel, prompts: Prompts, dictionaries: Sequence[Dictionary], choose: Choose, compute: Compute,
        settings: RunSettings, finite: Sequence[str],
    ):  # fmt: skip
        self.model, self.prompts, self.finite = model, prompts, list(finite)
        self.dictionaries = {d.name: d for d in dictionaries}
        self.choose, self.compute, self.settings = choose, compute, settings
        self._items: dict[str, tuple[Firings, Items]] = {}

    @cached_property
    def clean(self) -> CleanActivations:
        return CleanActivations(self.model, self.prompts, self.settings)

    def units(self, counted: bool = False) -> list[Unit]:
        found = []
        for name, dictionary in self.dictionaries.items():
            for shard in range(len(shards(len(self.prompts.tokens)))):
                rows = max(1, len(self._of(self.items(name)[1], shard))) if counted else 1
                found.append(
                    Unit.of(rows=rows, group=("", name, shard), sae=name, site=str(dictionary.site), shard=shard)
                )
        return found

    def prepare(self, stage: str) -> None:
        """Form what all units share."""
        for name in self.dictionaries:
            self.items(name)

    def items(self, name: str) -> tuple[Firings, Items]:
        """Where the SAE's latents fire, and the tokens that are edited."""
        if name not in self._items:
            clean, dictionary = self.clean, self.dictionaries[name]
            assert dictionary.sae is not None
            prompt, position = clean.tokens
            x = clean.at(dictionary.site, prompt, position)
            firings = Firings(prompt, position, active_latents(dictionary.sae, x))
            items = self.choose(clean, dictionary, firings)
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
        dictionary = self.dictionaries[unit["sae"]]
        firings, items = self.items(dictionary.name)
        notes: dict[str, Any] = {"drawn": items.said, "rows_dropped": {}}
        some = self._of(items, unit["shard"])
        if not len(some):
            return pd.DataFrame(), notes
        bench = LatentEdits(self.clean, dictionary, firings, unit["shard"], notes, tick)
        # The path that runs and how exact it is, from a few tokens put back as they were; their KL is the noise floor.
        few = some.iloc[:16].reset_index(drop=True)
        notes["self_kl"] = float(bench.measured(few, bench.x(few)[:, None])["kl"].max())
        table = self.compute(bench, some)
        good = np.isfinite(table[self.finite].to_numpy(float)).all(axis=1)
        if not good.all():
            notes["rows_dropped"]["effect not finite"] = int((~good).sum())
        table = table.loc[good].reset_index(drop=True)
        table.insert(0, "sae", dictionary.name)
        table.insert(1, "layer", dictionary.site.layer)
        table.insert(2, "point", dictionary.site.point)
        return narrowed(table), notes


def _merged(done: Sequence[UnitResult]) -> dict[str, Any]:
    """Notes of all units as one, with the noise floor."""
    floors = [floor for one in done if (floor := one.notes.get("self_kl")) is not None]
    return merged(done, "sae") | {"self_kl": max(floors, default=None)}

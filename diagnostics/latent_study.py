"""What diagnostics of single latents at single tokens share: where latents fire, edited rows measured, work units, provenance.

A diagnostic says at which tokens it asks (`Items`) and what it does with some of them at a `Bench`; a study runs this SAE by SAE,
shard by shard, and keeps what a reader must know.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from diagnostics.active_latents import active_latents
from diagnostics.firings import Firings
from diagnostics.frames import where
from diagnostics.probes import Probe
from diagnostics.results import model_provenance
from diagnostics.sampling import generator
from diagnostics.study import SHARD, Clean, Settings, Study
from diagnostics.units import Done, Tick, Unit, Units
from interventions.edits import random_like
from interventions.effects import Effects, intervened_logits, measure
from interventions.errors import ResultError
from interventions.metrics import TokenMetric
from interventions.models import CausalModel
from interventions.replay import unembed
from interventions.texts import Prompts
from sae_models.sae import SAE

LOGITS, LOGITS_GPU = 2**24, 2**27
"""Logits held at once; what is formed of them takes several times as much."""
PLACEBOS = ("placebo_token", "placebo_isotropic")
"""Random directions of two kinds: along differences of two other tokens' activations, and isotropic."""


@dataclass(frozen=True)
class Items:
    """At which tokens a diagnostic asks."""

    table: pd.DataFrame
    """`target_prompt`, `target_position`, and columns of the diagnostic's own; one line an item"""
    said: dict[str, Any]
    """what was drawn and what was dropped"""


@dataclass(eq=False)
class Bench:
    """Edits at tokens of one shard, of one SAE."""

    clean: Clean
    probe: Probe
    firings: Firings
    shard: int
    notes: dict[str, Any]
    tick: Tick = field(default=lambda n: None)

    @property
    def sae(self) -> SAE:
        assert self.probe.sae is not None
        return self.probe.sae

    @property
    def device(self) -> torch.device:
        return self.clean.model.device

    @property
    def at_once(self) -> int:
        """Rows whose logits are held at once."""
        room = LOGITS if self.device.type == "cpu" else LOGITS_GPU
        return max(1, room // self.clean.model.vocab_size)

    def x(self, items: pd.DataFrame) -> Float[Tensor, "item d_model"]:
        """What stands at the items' tokens, float32 at least."""
        where = (items[name].to_numpy(np.int64, copy=True) for name in ("target_prompt", "target_position"))
        x = self.clean.at(self.probe.site, *where)
        return x if x.dtype == torch.float64 else x.float()

    def measured(
        self,
        items: pd.DataFrame,
        vectors: Float[Tensor, "item row d_model"],
        metrics: Sequence[str | TokenMetric] = ("kl",),
    ) -> Effects:
        """Effects of several vectors at each item's token, `[item · row]`."""
        prompt, position = self._tokens(items, vectors.shape[1])
        settings = self.clean.settings
        effects = measure(
            self.clean.recording(self.shard), self.probe.site, prompt, position, vectors.flatten(0, 1).to(self.clean.model.dtype),
            metrics=metrics, path=settings.path, batch_rows=settings.batch_rows,
        )  # fmt: skip
        self.note(effects)
        return effects

    def logits(
        self, items: pd.DataFrame, vectors: Float[Tensor, "item row d_model"], horizon: int = 1
    ) -> Float[Tensor, "item row *read vocab"]:
        """Logits of several vectors at each item's token, float32 at least; for as many as `batches` gives."""
        prompt, position = self._tokens(items, vectors.shape[1])
        found = intervened_logits(
            self.clean.recording(self.shard), self.probe.site, prompt, position, vectors.flatten(0, 1).to(self.clean.model.dtype),
            horizon=horizon, path=self.clean.settings.path,
        )  # fmt: skip
        found = found if found.dtype == torch.float64 else found.float()
        return found.unflatten(0, vectors.shape[:2])

    def clean_logits(self, items: pd.DataFrame, ahead: int = 0) -> Float[Tensor, "item vocab"]:
        """The clean logits, so many positions after the items' own."""
        prompt, position = (t.to(self.device) for t in self._tokens(items, 1))
        recording = self.clean.recording(self.shard)
        found = unembed(recording, recording.final_hidden[prompt, position + ahead])
        return found if found.dtype == torch.float64 else found.float()

    def batches(self, items: pd.DataFrame, rows: int) -> Iterator[pd.DataFrame]:
        """The items, as many at once as leave room for `rows` logits each."""
        size = max(1, self.at_once // rows)
        for start in range(0, len(items), size):
            yield items.iloc[start : start + size].reset_index(drop=True)

    def towards(self, kind: str, items: pd.DataFrame, n: int, label: str) -> Float[Tensor, "item n d_model"]:
        """n random directions for each item, of one of `PLACEBOS`, a function of seed, label and the item's token alone."""
        drawn = []
        clean, where = self.clean, [int(p) for p in items["target_position"]]
        for prompt, position in zip(items["target_prompt"].tolist(), where, strict=True):
            stream = generator(clean.settings.seed, label, kind, self.probe.label, prompt, position)
            if kind == "placebo_token":
                drawn.append(clean.between(self.probe.site, n, stream, np.arange(n)))
            else:
                drawn.append(random_like(torch.empty(n, clean.model.d_model), stream).to(self.device))
        return torch.stack(drawn)

    def check(self, items: pd.DataFrame) -> None:
        """Which path serves and how exact it is, from a few tokens put back as they were; their KL is the noise floor."""
        some = items.iloc[:16].reset_index(drop=True)
        effects = self.measured(some, self.x(some)[:, None])
        self.notes["self_kl"] = float(effects["kl"].max())

    def note(self, effects: Effects) -> None:
        self.notes["path"] = sorted({*self.notes.get("path", []), effects.path})
        self.notes["why_hooks"] = self.notes.get("why_hooks") or effects.why_hooks
        known = self.notes.get("replay_delta")
        self.notes["replay_delta"] = effects.delta if known is None else float(np.fmax(known, effects.delta))

    def _tokens(self, items: pd.DataFrame, repeats: int) -> tuple[Tensor, Tensor]:
        prompt, position = (
            items[name].to_numpy(np.int64).repeat(repeats) for name in ("target_prompt", "target_position")
        )
        return torch.from_numpy(prompt - self.clean.shard(self.shard)[0]), torch.from_numpy(position)


Choose = Callable[[Clean, Probe, Firings], Items]
Compute = Callable[[Bench, pd.DataFrame], pd.DataFrame]


def run_latent_study(
    name: str,
    model: CausalModel,
    prompts: Prompts,
    probes: Sequence[Probe],
    choose: Choose,
    compute: Compute,
    settings: Settings,
    own: dict[str, Any],
    *,
    folder: Any = None,
    overwrite: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Study:
    """Ask at the items of every SAE, a unit for each SAE and 64 prompts.

    choose: the items of one SAE. compute: the table of some items of one shard, with `target_prompt`, `target_position`. own: the
    diagnostic's settings, part of the run's identity. Lines that are not finite in a column of `finite` in `own` are dropped and
    counted. Raises `ResultError` when no line is left.
    """
    settings = replace(settings, sites=tuple(dict.fromkeys(probe.site for probe in probes)))
    settings.check(model)
    identity = {
        "diagnostic": name,
        "settings": own | {k: v for k, v in vars(settings).items() if k != "cache_bytes"},
        "saes": {p.name: p.provenance() for p in probes},
        "tokens": prompts.tokens,
        **model_provenance(model),
    }
    runner = _Runner(model, prompts, probes, choose, compute, settings, own.get("finite", ()))
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
        "diagnostic": name,
        **model_provenance(model),
        "text": prompts.provenance,
        "sites": [str(site) for site in settings.sites],
        "context": ["in_place"],
        "prompts": len(prompts.tokens),
        "tokens": sum(map(len, prompts.tokens)),
        "sink_filter": settings.sink_filter,
        "seed": settings.seed,
        "null_models": [],
        "saes": {p.name: p.provenance() for p in probes},
        **own,
        "rows": len(frame),
        **notes,
    }
    return Study(frame, prompts.tokens, provenance)


class _Runner:
    """Computes units; activations and firings are formed when first asked for."""

    def __init__(
        self, model: CausalModel, prompts: Prompts, probes: Sequence[Probe], choose: Choose, compute: Compute,
        settings: Settings, finite: Sequence[str],
    ):  # fmt: skip
        self.model, self.prompts, self.probes, self.finite = model, prompts, {p.name: p for p in probes}, list(finite)
        self.choose, self.compute, self.settings = choose, compute, settings
        self._items: dict[str, tuple[Firings, Items]] = {}

    @cached_property
    def clean(self) -> Clean:
        return Clean(self.model, self.prompts, self.settings)

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
        bench = Bench(self.clean, probe, firings, unit["shard"], notes, tick)
        bench.check(some)
        table = self.compute(bench, some)
        good = np.isfinite(table[self.finite].to_numpy(float)).all(axis=1)
        if not good.all():
            notes["rows_dropped"]["effect not finite"] = int((~good).sum())
        table = table.loc[good].reset_index(drop=True)
        table.insert(0, "sae", probe.name)
        table.insert(1, "layer", probe.site.layer)
        table.insert(2, "point", probe.site.point)
        return _narrowed(table), notes


def _narrowed(table: pd.DataFrame) -> pd.DataFrame:
    """Whole numbers as int32, others but truth values as float32 (float64 stays), names as strings."""
    kinds = {"i": "int32", "u": "int32", "O": "str", "U": "str", "T": "str"}
    return table.astype({name: kinds[c.dtype.kind] for name, c in table.items() if c.dtype.kind in kinds})


def _merged(done: Sequence[Done]) -> dict[str, Any]:
    """Notes of all units as one: what was drawn and dropped, which path ran, how exact it was, the noise floor."""
    drawn: dict[str, Any] = {}
    dropped: dict[str, int] = {}
    for unit in done:
        drawn.setdefault(unit.unit["sae"], unit.notes["drawn"])
        for reason, n in unit.notes["rows_dropped"].items():
            dropped[reason] = dropped.get(reason, 0) + n
    ran = [d for d in done if "path" in d.notes]
    delta = [d.notes["replay_delta"] for d in ran if d.notes["replay_delta"] is not None]
    paths = {str(d.unit["site"]): "+".join(d.notes["path"]) for d in ran}
    return {
        "drawn": drawn,
        "rows_dropped": dropped,
        "path": paths,
        "why_hooks": sorted({d.notes["why_hooks"] for d in ran} - {None}) or None,
        "replay_delta": max(delta, default=None),
        "self_kl": max((d.notes["self_kl"] for d in ran), default=None),
    }

"""Units of work: one site, one half of the entities held out, one attribute to be changed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from diagnostics.disentanglement.bases import (
    Basis,
    at_dose,
    attributed,
    exchanged,
    kinds_of,
    ordered,
    principal,
    random_of_differing,
    read_subspace,
)
from diagnostics.disentanglement.facts import Known
from diagnostics.running.notes import how_measured, noted, summed
from diagnostics.running.units import Tick, Unit, UnitResult, narrowed
from diagnostics.sampling.tokens import generator, hash_keys
from interventions.attribution import gradients
from interventions.effects import measure
from interventions.errors import ResultError
from interventions.metrics import LogitDifference, Rank
from interventions.models.causal_model import CausalModel
from interventions.recording import Recording, record
from interventions.replaying.replay import unembed
from interventions.sites import Site
from sae_models.dictionaries import Dictionary

FOLDS = 2


@dataclass(frozen=True)
class Settings:
    """What is asked of each site."""

    ks: tuple[int, ...]
    pairs: int
    seed: int
    path: str
    batch_rows: int | None


def folds_of(known: Known, seed: int) -> Int[ndarray, "unit"]:
    """Half of the entities of each unit: 0 or 1, all contexts of an entity in one half."""
    entities = np.unique(known.entity)
    order = entities[np.argsort(hash_keys(seed, "disentangle halves", entities), kind="stable")]
    half = dict(zip(order.tolist(), (np.arange(len(order)) % FOLDS).tolist(), strict=True))
    return np.array([half[e] for e in known.entity.tolist()])


def pairs_of(known: Known, half: Int[ndarray, "unit"], fold: int, n: int, seed: int) -> Int[ndarray, "pair 2"]:
    """Ordered pairs (base, source) of units of one half and one context all of whose answers differ, the first n by seeded hash.

    Asking for more extends the list. Raises `ResultError` where there is none.
    """
    some = np.flatnonzero(half == fold)
    base, source = (x.ravel() for x in np.meshgrid(some, some, indexing="ij"))
    apart = (known.answer[base] != known.answer[source]).all(1) & (known.context[base] == known.context[source])
    base, source = base[apart], source[apart]
    key = hash_keys(seed, "disentangle pairs", known.entity[base], known.entity[source], known.context[base])
    found = np.stack([base, source], 1)[np.argsort(key, kind="stable")][:n]
    if not len(found):
        raise ResultError(
            f"half {fold} of the {known.count['known']['all']} known entities has no two that differ in every attribute; give more facts"
        )
    return found


class DisentanglementRunner:
    """Computes units, one site's recording in memory."""

    def __init__(self, model: CausalModel, known: Known, dictionaries: Sequence[Dictionary], settings: Settings):
        self.model, self.known, self.settings = model, known, settings
        self.dictionaries = list(dictionaries)
        self.sites = list(dict.fromkeys(d.site for d in dictionaries))
        self.half = folds_of(known, settings.seed)
        self.pairs = [pairs_of(known, self.half, f, settings.pairs, settings.seed) for f in range(FOLDS)]
        self._current: tuple[Site, _Site] | None = None

    def units(self) -> list[Unit]:
        """Site by site, so that each is recorded once."""
        n, kinds = len(self.known.facts.attributes), {s: kinds_of([d.name for d in self._at(s)]) for s in self.sites}
        edits = {
            s: sum(1 if kind in ("all", "whole") else len(self.settings.ks) for kind, _ in kinds[s]) for s in self.sites
        }
        return [
            Unit.of(rows=len(self.pairs[fold]) * n * edits[s], group=(str(s), fold), site=str(s), fold=fold, target=target)
            for s in self.sites
            for fold in range(FOLDS)
            for target in self.known.facts.attributes
        ]  # fmt: skip

    def _at(self, site: Site) -> list[Dictionary]:
        return [d for d in self.dictionaries if d.site == site]

    @torch.no_grad()
    def __call__(self, unit: Unit, tick: Tick) -> tuple[pd.DataFrame, dict[str, Any]]:
        site, notes = Site.parse(unit["site"]), {"path": None}
        if self._current is None or self._current[0] != site:
            self._current = None
            self._current = site, _Site(self.model, self.known, site, self._at(site), self.settings)
        work, fold = self._current[1], unit["fold"]
        target = self.known.facts.attributes.index(unit["target"])
        base, source = (torch.from_numpy(x.copy()) for x in self.pairs[fold].T)
        fitted_on, train = torch.from_numpy(np.flatnonzero(self.half != fold)), self.pairs[1 - fold]
        frames, unmatched = [], 0
        for kind, sae, k, n, change in work.changes(target, fold, fitted_on, train, base, source):
            good = change.isfinite().all(-1).cpu().numpy()
            unmatched += int((~good).sum())
            found = work.effects(base[good], source[good], change[torch.from_numpy(good)], target, notes, tick)
            frames.append(found.assign(kind=kind, sae=sae, k=k, n=n))
        keys = {"layer": site.layer, "point": site.point, "fold": fold, "target": unit["target"]}
        dropped = {"random latents of a pair in which none differs": unmatched} if unmatched else {}
        return narrowed(pd.concat(frames, ignore_index=True).assign(**keys)), notes | {"rows_dropped": dropped}


def merged(done: Sequence[UnitResult]) -> dict[str, Any]:
    """The units' notes as one."""
    return {
        "rows_dropped": summed(one.notes["rows_dropped"] for one in done),
        **how_measured((one.unit["site"], one.notes) for one in done),
    }


class _Site:
    """All known prompts recorded at one site."""

    def __init__(
        self, model: CausalModel, known: Known, site: Site, dictionaries: list[Dictionary], settings: Settings
    ):
        self.known, self.site, self.dictionaries, self.settings = known, site, dictionaries, settings
        self.recording: Recording = record(model, known.tokens, [site])
        units = np.arange(len(known.entity))
        self.position = torch.from_numpy(known.position)
        self.x = self.recording.at(site, known.prompt(units, 0), self.position).float()
        rows = torch.arange(len(known.tokens))
        last = self.recording.final_hidden[rows.to(model.device), (self.recording.length - 1).to(model.device)]
        logits = torch.cat([unembed(self.recording, some).float() for some in last.split(128)])
        self.logits = logits.unflatten(0, (len(units), -1)).cpu()
        """at the end of each unit's prompts, `[unit, attribute, vocab]`"""
        self._gradients: dict[int, Tensor] = {}

    def m(self, unit: Tensor, attribute: int, base: Tensor, source: Tensor) -> Float[Tensor, "pair"]:
        """logit(the source's value) − logit(the base's value) after a unit's own prompt, without an edit."""
        answer = torch.from_numpy(self.known.answer[:, attribute])
        own = self.logits[unit, attribute]
        return (own.gather(1, answer[source][:, None]) - own.gather(1, answer[base][:, None]))[:, 0]

    def gradients(self, fold: int, base: Tensor, source: Tensor) -> Float[Tensor, "attribute pair d_model"]:
        """Of m of each attribute in the activation half way between base and source, for the pairs that choose."""
        if fold not in self._gradients:
            middle, found = (self.x[base] + self.x[source]) / 2, []
            for a in range(len(self.known.facts.attributes)):
                answer = torch.from_numpy(self.known.answer[:, a])
                objective = LogitDifference(answer[source][:, None], answer[base][:, None])
                at = self.known.prompt(base.numpy(), a), self.position[base]
                g, _ = gradients(
                    self.recording, self.site, *at, objective, vectors=middle, horizon="last", batch_rows=64
                )
                found.append(g.float())
            self._gradients[fold] = torch.stack(found)
        return self._gradients[fold]

    def changes(
        self, target: int, fold: int, fitted_on: Tensor, train: Int[ndarray, "pair 2"], base: Tensor, source: Tensor
    ) -> Iterator[tuple[str, str, int, int, Float[Tensor, "pair d_model"]]]:
        """What each kind of exchange adds to x of the base: (kind, SAE, k, how many are exchanged, Δx); k 0: all."""
        trained = [torch.from_numpy(x.copy()) for x in train.T]
        g = self.gradients(fold, *trained)
        for d in self.dictionaries:
            assert d.sae is not None
            z = torch.cat([d.sae.encode(some).float() for some in self.x.split(d.few)])
            basis = Basis(d.directions.float(), z)
            order, moved = ordered(attributed(basis, self.x, g, *trained), target), basis.differences(base, source)
            stream = generator(self.settings.seed, "disentangle random", d.label, fold, target)
            drawn = random_of_differing(moved, max(self.settings.ks), stream)
            for k in self.settings.ks:
                own = exchanged(basis.directions, moved, order[:k])
                yield "latents", d.name, k, len(order[:k]), own
                yield (
                    "random",
                    d.name,
                    k,
                    len(order[:k]),
                    at_dose(exchanged(basis.directions, moved, drawn[:, :k]), own),
                )
            yield "all", d.name, 0, len(order), moved @ basis.directions
        for kind, basis in (("pca", principal(self.x, fitted_on)), ("subspace", read_subspace(self.x, g, target))):
            moved = basis.differences(base, source)
            order = (
                torch.arange(moved.shape[1])
                if kind == "subspace"
                else ordered(attributed(basis, self.x, g, *trained), target)
            )
            for k in self.settings.ks:
                yield kind, "", k, len(order[:k]), exchanged(basis.directions, moved, order[:k])
        yield "whole", "", 0, self.x.shape[1], self.x[source] - self.x[base]

    def effects(
        self, base: Tensor, source: Tensor, change: Float[Tensor, "pair d_model"], target: int, notes: dict[str, Any], tick: Tick
    ) -> pd.DataFrame:  # fmt: skip
        """A line for each pair: whether the target's value becomes the source's, and what share of the others stay the base's."""
        n, attributes, settings = len(base), self.known.facts.attributes, self.settings
        if not n:
            return pd.DataFrame()
        unit = base.repeat(len(attributes))
        prompt = torch.cat([self.known.prompt(base.numpy(), a) for a in range(len(attributes))])
        answer = torch.from_numpy(self.known.answer)
        own, other = (torch.cat([answer[x, a] for a in range(len(attributes))])[:, None] for x in (base, source))
        position = self.position[unit]
        clean = self.recording.at(self.site, prompt, position)
        vectors = (clean.float() + change.repeat(len(attributes), 1)).to(clean)
        metrics = (Rank(other, name="source"), Rank(own, name="base"), LogitDifference(other, own, name="m"))
        found = measure(
            self.recording, self.site, prompt, position, vectors, metrics=metrics, horizon="last", path=settings.path,
            batch_rows=settings.batch_rows, progress=tick,
        )  # fmt: skip
        noted(notes, found)
        of_source, of_base, m = (found[name].reshape(len(attributes), n).double() for name in ("source", "base", "m"))
        before, after = (
            torch.stack([self.m(x, a, base, source) for a in range(len(attributes))]).double() for x in (base, source)
        )
        rest = [a for a in range(len(attributes)) if a != target]
        entity, dose = self.known.entity, change.norm(dim=-1)
        return pd.DataFrame({
            "context": self.known.context[base.numpy()], "base": entity[base.numpy()], "source": entity[source.numpy()],
            "dose": dose.cpu().numpy(), "relative_dose": (dose / self.x[base].norm(dim=-1)).cpu().numpy(),
            "cause": (of_source[target] == 0).numpy(), "isolation": (of_base[rest] == 0).double().mean(0).numpy(),
            "moved": (m - before)[target].numpy(), "whole": (after - before)[target].numpy(),
            "moved_others": (m - before)[rest].sum(0).numpy(), "whole_others": (after - before)[rest].sum(0).numpy(),
        })  # fmt: skip

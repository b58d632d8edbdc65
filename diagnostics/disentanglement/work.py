"""Units of work: one site, one half of the entities held out, one attribute to be changed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
    ordered,
    principal,
    random_of_differing,
    read_subspace,
)
from diagnostics.disentanglement.facts import Known
from diagnostics.disentanglement.learning import BATCH, Slope, learned_mask, learned_subspace
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
    learn: int
    """steps of the learned exchanges; 0: none"""
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
        n, learn = len(self.known.facts.attributes), self.settings.learn
        found = []
        for site in self.sites:
            saes = len(self._at(site))
            edits = len(self.settings.ks) * (2 * saes + 2) + saes + 1 + (saes + 1) * bool(learn)
            steps = 3 * BATCH * learn * (saes + 1)  # forward and back
            for fold in range(FOLDS):
                rows = (len(self.pairs[fold]) * edits + steps) * n
                found += [
                    Unit.of(rows=rows, group=(str(site), fold), site=str(site), fold=fold, target=target)
                    for target in self.known.facts.attributes
                ]
        return found

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
        for e in work.exchanges(target, fold, fitted_on, train, base, source, tick):
            good = e.change.isfinite().all(-1).cpu()
            unmatched += int((~good).sum())
            found = work.effects(base[good], source[good], e.change[good.to(e.change.device)], target, notes, tick)
            frames.append(found.assign(kind=e.kind, sae=e.sae, k=e.k, n=e.n))
        keys = {"layer": site.layer, "point": site.point, "fold": fold, "target": unit["target"]}
        dropped = {"random latents of a pair in which none differs": unmatched} if unmatched else {}
        return narrowed(pd.concat(frames, ignore_index=True).assign(**keys)), notes | {"rows_dropped": dropped}


class Exchange(NamedTuple):
    """What one kind adds to x of each pair's base."""

    kind: str
    sae: str
    k: int
    """asked for; 0: all, or as many as are learned"""
    n: int
    """directions exchanged"""
    change: Float[Tensor, "pair d_model"]


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
        x = self.recording.at(site, known.prompt(units, 0), self.position)
        self.x = x.to(torch.promote_types(x.dtype, torch.float32))
        self.z = {
            d.name: torch.cat([d.sae.encode(some) for some in x.split(d.few)]).to(self.x) for d in dictionaries if d.sae
        }
        rows = torch.arange(len(known.tokens), device=model.device)
        last = self.recording.final_hidden[rows, (self.recording.length - 1).to(model.device)].unflatten(
            0, (len(units), -1)
        )
        answer = torch.from_numpy(known.answer).to(model.device)
        self.said = torch.stack([
            torch.cat([unembed(self.recording, some)[:, answer[:, a]] for some in last[:, a].split(128)])
            for a in range(answer.shape[1])
        ]).to(self.x).cpu()  # fmt: skip
        """`[attribute, unit, other]`: the logit of the other unit's answer at the end of a unit's own question"""
        self._gradients: dict[int, Tensor] = {}

    def m(self, unit: Tensor, attribute: int, base: Tensor, source: Tensor) -> Float[Tensor, "pair"]:
        """logit(the source's value) − logit(the base's value) after a unit's own prompt, without an edit."""
        return self.said[attribute, unit, source] - self.said[attribute, unit, base]

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
                found.append(g.to(self.x))
            self._gradients[fold] = torch.stack(found)
        return self._gradients[fold]

    def exchanges(
        self, target: int, fold: int, fitted_on: Tensor, train: Int[ndarray, "pair 2"], base: Tensor, source: Tensor, tick: Tick
    ) -> Iterator["Exchange"]:  # fmt: skip
        """Everything that is exchanged between base and source for one target, chosen on other pairs."""
        t_base, t_source = (torch.from_numpy(x.copy()) for x in train.T)
        g, settings, x = self.gradients(fold, t_base, t_source), self.settings, self.x
        slope, apart = self._slope(t_base, t_source, target, tick), x[source] - x[base]
        for d in self.dictionaries:
            basis = Basis(d.directions.to(x), self.z[d.name])
            order, moved = ordered(attributed(basis, x, g, t_base, t_source), target), basis.differences(base, source)
            label = (d.label, fold, target)
            drawn = random_of_differing(moved, max(settings.ks), generator(settings.seed, "disentangle random", *label))
            for k in settings.ks:
                own = exchanged(basis.directions, moved, order[:k])
                lot = at_dose(exchanged(basis.directions, moved, drawn[:, :k]), own)
                yield Exchange("latents", d.name, k, len(order[:k]), own)
                yield Exchange("random", d.name, k, len(order[:k]), lot)
            if settings.learn:
                trained = basis.differences(t_base, t_source)
                mask = learned_mask(
                    trained,
                    basis.directions,
                    slope,
                    settings.learn,
                    generator(settings.seed, "disentangle mask", *label),
                )
                yield Exchange("mask", d.name, 0, len(mask), exchanged(basis.directions, moved, mask))
            yield Exchange("all", d.name, 0, len(order), moved @ basis.directions)
        components, subspace = principal(x, fitted_on), read_subspace(x, g, target)
        ranked = ordered(attributed(components, x, g, t_base, t_source), target)
        for kind, basis, order in (
            ("pca", components, ranked),
            ("subspace", subspace, torch.arange(len(subspace.directions))),
        ):
            moved = basis.differences(base, source)
            for k in settings.ks:
                yield Exchange(kind, "", k, len(order[:k]), exchanged(basis.directions, moved, order[:k]))
        if settings.learn:
            stream = generator(settings.seed, "disentangle das", self.site, fold, target)
            q = learned_subspace(x[t_source] - x[t_base], slope, settings.learn, stream)
            yield Exchange("das", "", 0, len(q), apart @ q.T @ q)
        yield Exchange("whole", "", 0, x.shape[1], apart)

    def _slope(self, base: Tensor, source: Tensor, target: int, tick: Tick) -> Slope:
        """∂loss/∂Δx of some of these pairs (see `learning`), by replay."""
        others = len(self.known.facts.attributes) - 1

        def slope(some: Tensor, delta: Tensor) -> Tensor:
            total = torch.zeros_like(delta)
            for a in range(others + 1):
                wanted = torch.from_numpy(self.known.answer[(source if a == target else base)[some].numpy(), a])
                at = self.known.prompt(base[some].numpy(), a), self.position[base[some]]
                vectors = self.recording.at(self.site, *at)

                def loss(logits: Tensor, rows: Tensor, wanted: Tensor = wanted) -> Tensor:
                    return torch.nn.functional.cross_entropy(
                        logits.float(), wanted[rows].to(logits.device), reduction="none"
                    )

                put = (vectors.to(delta) + delta).to(vectors)
                found, _ = gradients(self.recording, self.site, *at, loss, vectors=put, horizon="last", batch_rows=64)
                total += found.to(total) / (1 if a == target else others)
            tick(3 * len(some) * (others + 1))
            return total

        return slope

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
        vectors = (clean.to(change) + change.repeat(len(attributes), 1)).to(clean)
        metrics = (Rank(other, name="source"), Rank(own, name="base"), LogitDifference(other, own, name="m"))
        found = measure(
            self.recording, self.site, prompt, position, vectors, metrics=metrics, horizon="last", path=settings.path,
            nonfinite="count", batch_rows=settings.batch_rows, progress=tick,
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

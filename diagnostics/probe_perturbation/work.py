"""Units of work: one data set through one SAE, every class or attribute ablated, at every k and split."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from diagnostics.concept_ablation.conditions import dose_matched
from diagnostics.probe_perturbation.ablations import (
    attribute_effects,
    changes,
    class_effects,
    largest,
    projected_out,
)
from diagnostics.probe_perturbation.splits import BETWEEN, attributes_of, crossed_split
from diagnostics.running.units import Tick, Unit, narrowed
from diagnostics.sparse_probing.pooling import PooledTexts, pooled_texts
from diagnostics.sparse_probing.tasks import split_seed, tasks
from diagnostics.statistics.logistic import Fit, fitted
from interventions.models.causal_model import CausalModel
from interventions.sites import Site
from interventions.texts.groups import first_of_group
from interventions.texts.labelled import Labelled
from sae_models.dictionaries import Dictionary

TPP, SCR = "tpp", "scr"
"""targeted probe perturbation; spurious correlation removal"""
KINDS = ("selected", "random", "direction")
"""`selected`: the k latents of largest effect. `random`: others of similar dose, at random, their change scaled to the same ‖Δx̄‖.
`direction`: the probe's own direction projected out, a linear ceiling (k = 0)."""
_KEYS = ("protocol", "sae", "dataset", "kind", "k", "ablated", "probe")
CELLS = (*_KEYS, "layer", "point", "seed", "latents", "dose", "before", "after", "oracle", "n_test")
TEXTS = (*_KEYS, "text", "group", "n", "fell", "gap")
"""Columns of the two tables of a unit."""


class PerturbationRunner:
    """Computes units, one data set's activations in memory."""

    def __init__(
        self, model: CausalModel, sets: Mapping[str, Labelled], crossed: Sequence[str], dictionaries: list[Dictionary],
        settings: dict[str, Any],
    ):  # fmt: skip
        self.model, self.sets, self.crossed, self.settings = model, sets, set(crossed), settings
        self.dictionaries = {d.name: d for d in dictionaries}
        self._current: tuple[str, PooledTexts] | None = None

    def units(self) -> list[Unit]:
        """Data set by data set, so that each passes through the model once."""
        sizes = {name: 2 if name in self.crossed else len(some.classes) for name, some in self.sets.items()}
        return [
            Unit.of(rows=self.settings["seeds"] * sizes[name], group=(name, sae), dataset=name, sae=sae)
            for name in self.sets
            for sae in self.dictionaries
        ]

    def prepare(self, name: str) -> None:
        """Form what units of a data set share."""
        self._pooled(name)

    def _pooled(self, name: str) -> PooledTexts:
        if self._current is None or self._current[0] != name:
            self._current = None
            how = {key: self.settings[key] for key in ("max_length", "sink_filter", "seed")}
            sites = list(dict.fromkeys(d.site for d in self.dictionaries.values()))
            self._current = name, pooled_texts(self.model, self.sets[name], sites, **how)
        return self._current[1]

    def __call__(self, unit: Unit, tick: Tick) -> tuple[pd.DataFrame, dict[str, Any]]:
        name, d = unit["dataset"], self.dictionaries[unit["sae"]]
        pooled = self._pooled(name)
        crossed = attributes_of(self.sets[name]) if name in self.crossed else None
        work = _Work(pooled, d, name, self.settings)
        for number in range(self.settings["seeds"]):
            for _ in work.removal(number, crossed) if crossed else work.perturbation(number):
                tick(1)
        keys = {"protocol": SCR if crossed else TPP, "sae": d.name, "dataset": name}
        place = {"layer": d.site.layer, "point": d.site.point}
        cells = pd.DataFrame(work.cells).assign(table="cell", **keys, **place)
        frame = pd.concat([cells, work.texts().assign(table="text", **keys)], ignore_index=True)
        words = [column for column in frame if frame[column].dtype.kind not in "biuf"]
        frame = frame.fillna({column: "" if column in words else 0 for column in frame})
        return narrowed(frame), {"left_out": pooled.left_out(d.site)}


def of_table(frame: pd.DataFrame, table: str) -> pd.DataFrame:
    """Lines of one table, whose whole numbers are such again: beside lines of the other they had gaps."""
    columns = {"cell": CELLS, "text": TEXTS}[table]
    found = frame.loc[frame["table"] == table, list(columns)].reset_index(drop=True)
    whole = ("k", "layer", "seed", "latents", "n_test", "text", "group", "n", "fell", "gap")
    return found.astype({name: "int32" for name in whole if name in columns})


class _Work:
    """One data set through one SAE."""

    def __init__(self, pooled: PooledTexts, dictionary: Dictionary, name: str, settings: dict[str, Any]):
        assert dictionary.sae is not None
        self.pooled, self.dictionary, self.name, self.settings = pooled, dictionary, name, settings
        site: Site = dictionary.site
        self.usable = pooled.usable(site)
        self.x = pooled.mean_activations(site).double()
        self.x_host = self.x.cpu().numpy()
        self.z = torch.nan_to_num(
            pooled.mean_latents(dictionary.sae, site)
        )  # texts without tokens are on no side of a split
        self.group = first_of_group(pooled.groups)
        self.cells: list[dict[str, Any]] = []
        self._sums: dict[tuple[Any, ...], ndarray] = {}

    def perturbation(self, number: int) -> Iterator[str]:
        """Targeted probe perturbation on one split: a probe of each class; the latents of each class ablated in turn."""
        s, seed = self.settings, split_seed(self.settings["seed"], number)
        texts, groups = self.pooled.prompts.texts, self.pooled.groups
        found = tasks(texts, self.pooled.labels, self.usable, groups=groups, test_share=s["test_share"], seed=seed)
        probes = {name: self._fit(task.train, task.y_train) for name, task in found.items()}
        sides = {name: (probes[name], task.test, task.y_test, None) for name, task in found.items()}
        for name, task in found.items():
            w, train = torch.from_numpy(probes[name].weight), torch.from_numpy(task.train).to(self.z.device)
            effect = class_effects(self.z[train], task.y_train, w.to(self.z.device), self.dictionary.directions)
            self._measure(number, seed, name, effect, w, task.train, sides)
            yield name

    def removal(self, number: int, attributes: tuple[tuple[str, str], tuple[str, str]]) -> Iterator[str]:
        """Spurious correlation removal on one split: each attribute in turn is the spurious one, whose latents are ablated."""
        s, seed = self.settings, split_seed(self.settings["seed"], number)
        split = crossed_split(
            self.pooled.prompts.texts,
            self.pooled.labels,
            self.pooled.groups,
            self.usable,
            attributes,
            s["test_share"],
            seed,
        )
        biased = self._fit(split.agreeing, split.values[split.agreeing, 0])
        names = [BETWEEN.join(values) for values in attributes]
        for wanted, spurious in ((0, 1), (1, 0)):
            own, other = (self._fit(split.train, split.values[split.train, a]) for a in (wanted, spurious))
            w, train = torch.from_numpy(other.weight), torch.from_numpy(split.train).to(self.z.device)
            y = split.values[split.train, spurious]
            effect = attribute_effects(self.z[train], y, w.to(self.z.device), self.dictionary.directions)
            sides = {names[wanted]: (biased, split.test, split.values[split.test, wanted], own)}
            self._measure(number, seed, names[spurious], effect, w, split.train, sides)
            yield names[spurious]

    def _fit(self, texts: ndarray, y: ndarray) -> Fit:
        return fitted(self.x_host[texts], y, self.settings["inverse_penalty"])

    def _measure(
        self, number: int, seed: int, ablated: str, effect: Float[Tensor, "d_sae"], weight: Tensor, train: ndarray,
        sides: Mapping[str, tuple[Fit, ndarray, ndarray, Fit | None]],
    ) -> None:  # fmt: skip
        """sides: of each probe itself, the texts it is asked about, their truth, and a probe without bias."""
        ks, some = tuple(self.settings["ks"]), torch.from_numpy(train).to(self.z.device)
        dose = self.z[some].double().abs().mean(0) * self.dictionary.directions.double().norm(dim=1)
        selected = largest(effect, max(ks))
        lot = dose_matched(selected, dose, dose > 0, seed, f"{self.name}/{ablated}/{self.dictionary.label}")
        found = dict(changes(self.z, self.dictionary.directions, selected, lot, ks))
        found["direction", 0] = 0, projected_out(self.x, weight, train)
        for (kind, k), (n, change) in found.items():
            norm, host = change.norm(dim=-1).cpu().numpy(), change.cpu().numpy()
            for probe, (fit, test, truth, oracle) in sides.items():
                before, after = ((fit.logits(self.x_host[test] + d) > 0) == truth for d in (0, host[test]))
                best = before if oracle is None else (oracle.logits(self.x_host[test]) > 0) == truth
                self.cells.append({
                    "kind": kind, "k": k, "ablated": ablated, "probe": probe, "seed": number, "latents": n, "dose": float(norm[test].mean()),
                    "before": float(before.mean()), "after": float(after.mean()), "oracle": float(best.mean()), "n_test": len(test),
                })  # fmt: skip
                total = self._sums.setdefault((kind, k, ablated, probe), np.zeros((3, len(self.group)), dtype=int))
                total[:, test] += np.stack(
                    [np.ones(len(test), dtype=int), before.astype(int) - after, best.astype(int) - before]
                )

    def texts(self) -> pd.DataFrame:
        """A line for each text of each cell, summed over splits."""
        parts = []
        for (kind, k, ablated, probe), total in self._sums.items():
            text = np.flatnonzero(total[0])
            n, fell, gap = total[:, text]
            own = {"text": text, "group": self.group[text], "n": n, "fell": fell, "gap": gap}
            parts.append(pd.DataFrame({"kind": kind, "k": k, "ablated": ablated, "probe": probe} | own))
        return pd.concat(parts, ignore_index=True)

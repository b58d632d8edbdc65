"""The work units of sparse probing: one data set through one SAE."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from diagnostics.running.units import Tick, Unit
from diagnostics.sampling.tokens import generator
from diagnostics.sparse_probing.draws import accuracies
from diagnostics.sparse_probing.pooling import PooledTexts, pooled_texts
from diagnostics.sparse_probing.probes import task_probes
from diagnostics.sparse_probing.tasks import Task, shuffled_labels, split_seed, tasks
from diagnostics.statistics.logistic import cross_entropies
from interventions.models.causal_model import CausalModel
from interventions.sites import Site
from interventions.texts.groups import first_of_group
from interventions.texts.labelled import Labelled
from sae_models.dictionaries import Dictionary

TEXT_COLUMNS = ("sae", "dataset", "kind", "k", "text", "group", "n", "correct", "cross_entropy")
DRAW_COLUMNS = ("sae", "dataset", "draw", "number", "k", "accuracy", "test_ratio")
INTEGERS = (
    "layer",
    "seed",
    "k",
    "n_features",
    "n_train",
    "n_test",
    "n_groups",
    "text",
    "group",
    "n",
    "correct",
    "number",
)


def of_kind(frame: pd.DataFrame, line: str, columns: Sequence[str]) -> pd.DataFrame:
    """Lines of one kind, whose whole numbers are such again: beside lines of other kinds they had gaps."""
    found = frame.loc[frame["line"] == line, list(columns)].reset_index(drop=True)
    return found.astype({name: int for name in INTEGERS if name in found})


def _n_tasks(some: Labelled) -> int:
    return 1 if len(some.classes) == 2 else len(some.classes)


class ProbingRunner:
    """Computes units; one data set's activations in memory."""

    def __init__(
        self, model: CausalModel, sets: Mapping[str, Labelled], probes: list[Dictionary], settings: dict[str, Any]
    ):
        self.model, self.sets, self.settings = model, sets, settings
        self.probes = {probe.name: probe for probe in probes}
        self._current: tuple[str, PooledTexts] | None = None
        self._drawn: dict[tuple[str, Site], dict[str, list[list[Task]]]] = {}

    def units(self) -> list[Unit]:
        """Data set by data set, so that each passes through the model once."""
        return [
            Unit.of(rows=self.settings["seeds"] * _n_tasks(some), group=(name, sae), dataset=name, sae=sae)
            for name, some in self.sets.items()
            for sae in self.probes
        ]

    def prepare(self, name: str) -> None:
        """Form what units of a data set share."""
        self._pooled(name)

    def _pooled(self, name: str) -> PooledTexts:
        if self._current is None or self._current[0] != name:
            self._current = None
            s, sites = self.settings, [probe.site for probe in self.probes.values()]
            how = {key: s[key] for key in ("max_length", "sink_filter", "seed")}
            self._current = name, pooled_texts(self.model, self.sets[name], sites, **how)
        return self._current[1]

    def __call__(self, unit: Unit, tick: Tick) -> tuple[pd.DataFrame, dict[str, Any]]:
        pooled, probe, s = self._pooled(unit["dataset"]), self.probes[unit["sae"]], self.settings
        assert probe.sae is not None
        z = pooled.mean_latents(probe.sae, probe.site)
        x = pooled.mean_activations(probe.site).double().cpu().numpy()
        here = {"sae": probe.name, "dataset": unit["dataset"]}
        keys = here | {"line": "probe", "layer": probe.site.layer, "point": probe.site.point}
        lines, sums = [], {}
        texts, usable = pooled.prompts.texts, pooled.usable(probe.site)
        group = first_of_group(pooled.groups)
        for number in range(s["seeds"]):
            split = split_seed(s["seed"], number)
            found = tasks(texts, pooled.labels, usable, groups=pooled.groups, test_share=s["test_share"], seed=split)
            for name, task in found.items():
                stream = generator(split, "sparse probing", unit["dataset"], name)
                for line, logits in task_probes(z, x, task, s["ks"], s["inverse_penalty"], stream):
                    lines.append(keys | {"class": name, "seed": number} | line)
                    total = sums.setdefault((line["kind"], line["k"]), np.zeros((3, len(texts))))
                    right = (logits > 0) == task.y_test
                    total[:, task.test] += np.stack([np.ones(len(right)), right, cross_entropies(logits, task.y_test)])
                tick(1)
        for (kind, k), total in sums.items():
            text = np.flatnonzero(total[0])
            n, correct, loss = total[:, text]
            some = {
                "kind": kind,
                "k": k,
                "text": text,
                "group": group[text],
                "n": n,
                "correct": correct,
                "cross_entropy": loss,
            }
            lines += (here | {"line": "text", "latents": ""} | row for row in pd.DataFrame(some).to_dict("records"))
        lines += (here | {"line": "draw", "latents": ""} | row for row in self._draws(z, unit["dataset"], probe.site))
        return pd.DataFrame(lines), {"left_out": pooled.left_out(probe.site)}

    def _draws(self, z: torch.Tensor, name: str, site: Site) -> list[dict[str, Any]]:
        """Pooled accuracies with shuffled labels, and on each split of those with selection and fit anew."""
        found = []
        for draw, designs in self._designs(name, site).items():
            accuracy = accuracies(z, designs, self.settings["ks"], self.settings["inverse_penalty"])
            for number, (row, design) in enumerate(zip(accuracy.tolist(), designs, strict=True)):
                ratio = sum(len(task.test) for task in design) / sum(len(task.train) for task in design)
                line = {"draw": draw, "number": number, "test_ratio": ratio}
                found += (line | {"k": k, "accuracy": a} for k, a in zip(self.settings["ks"], row, strict=True))
        return found

    def _designs(self, name: str, site: Site) -> dict[str, list[list[Task]]]:
        """The tasks of each draw, the same for every SAE of a site: `shuffled`, all splits with one shuffle; `split`, one split."""
        if (name, site) not in self._drawn:
            s, pooled = self.settings, self._pooled(name)
            texts, groups, usable = pooled.prompts.texts, pooled.groups, pooled.usable(site)

            def design(labels: list[str], splits: Iterable[int]) -> list[Task]:
                how = {"groups": groups, "test_share": s["test_share"]}
                each = (tasks(texts, labels, usable, **how, seed=split_seed(s["seed"], number)) for number in splits)
                return [task for found in each for task in found.values()]

            stream = generator(s["seed"], "shuffled labels", name)
            shuffles = (shuffled_labels(pooled.labels, groups, usable, stream) for _ in range(s["shuffles"]))
            self._drawn[name, site] = {
                "shuffled": [design(labels, range(s["seeds"])) for labels in shuffles],
                "split": [design(pooled.labels, [number]) for number in range(s["refits"])],
            }
        return self._drawn[name, site]

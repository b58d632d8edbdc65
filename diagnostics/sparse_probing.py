"""How much of a class do a few latents of an SAE hold? Logistic probes on k latents, beside the raw activations and chance."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch

from diagnostics import probing_summary
from diagnostics.headlines import Headline
from diagnostics.latent_probes import task_probes
from diagnostics.pooling import PooledTexts, labelled_prompts, pooled_texts
from diagnostics.probes import Probe, probes_of
from diagnostics.probing_fits import cross_entropies
from diagnostics.probing_tasks import split_seed, tasks
from diagnostics.progress import Progressing
from diagnostics.results import Result, model_identity, model_provenance
from diagnostics.sampling import generator
from diagnostics.statistics import Estimate
from diagnostics.text_groups import first_of_group
from diagnostics.units import Tick, Unit, Units
from interventions.errors import ResultError
from interventions.labelled import Labelled, load_labelled
from interventions.models import CausalModel, wrap
from interventions.sites import Site

COLUMNS = (
    *("sae", "layer", "point", "dataset", "class", "seed", "kind", "k", "n_features", "n_train", "n_test", "n_groups"),
    *("accuracy", "accuracy_low", "accuracy_high", "balanced_accuracy", "auc", "auc_low", "auc_high"),
    *("cross_entropy", "cross_entropy_low", "cross_entropy_high", "cross_entropy_train", "latents"),
)
"""Of the table. seed: of the split into training and held-out texts, from 0; k: latents asked for, 0 for `all` and `raw`; n_features:
what the probe reads; n_groups: among the held-out texts (each text is its own where the set has no groups). accuracy to cross_entropy
(nats): on held-out texts, half of them of the class, so that chance is .5 and ln 2; `_low`, `_high`: 95 % delete-one-group jackknife,
the probe held fixed. cross_entropy_train: on the training texts. latents: those chosen, in the order of their choice, by spaces (`selected`, `random`, `best`)."""
_TEXT_COLUMNS = ("sae", "dataset", "kind", "k", "text", "group", "n", "correct", "cross_entropy")
_INTEGERS = ("seed", "k", "n_features", "n_train", "n_test", "n_groups", "text", "group", "n", "correct")


@dataclass(frozen=True)
class SparseProbing(Result):
    """What probes on a few latents found, and how it was made.

    The table has a line for each SAE × data set × class × seed × kind × k; its columns are those of `COLUMNS`.
    """

    held_out: pd.DataFrame = field(default_factory=pd.DataFrame)
    """a line for each SAE × data set × kind × k × text (its place in `tokens`; `group`: that of the first text of its group): in how many
    splits and classes it was held out (`n`), in how many of them classified rightly (`correct`), and its summed cross-entropy in nats;
    pooled estimates are made of it"""

    NAME: ClassVar[str] = "sparse_probing"
    NOTE: ClassVar[str] = probing_summary.NOTE
    TABLES: ClassVar[Mapping[str, str]] = {"held_out": "probed_texts.parquet"}
    TITLE: ClassVar[str] = "Sparse probing"
    QUESTION: ClassVar[str] = "How much of a class do k latents hold?"
    names = Result.saes

    @property
    def datasets(self) -> list[str]:
        """The sets of labelled texts."""
        return list(self.provenance["texts"])

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """Of each SAE × data set (and `mean`, over data sets) × kind × k: accuracy, cross-entropy with intervals, and by seed."""
        return probing_summary.groups(self.frame, self.held_out)

    def difference(self, first: str, second: str, *, k: int = 1, kind: str = "selected") -> dict[str, Estimate]:
        """Accuracy of `first` − that of `second`, by data set and their `mean`; paired by text, delete-one-group jackknife.

        It is of these two SAEs: what training seeds would add is not in it.
        """
        return probing_summary.difference(self.held_out, first, second, kind, k)

    def summary(self) -> pd.DataFrame:
        """A line for each group."""
        return probing_summary.summary_frame(self.groups)

    def headlines(self) -> Iterable[Headline]:
        """Accuracy of the fewest latents, beside random ones and all of the activation."""
        return probing_summary.first_numbers(self.groups, self.provenance)

    def left_out(self) -> list[str]:
        """What chance is, which texts were probed, and what is missing; a line each."""
        p = self.provenance
        nulls = (
            f"random, shuffled: k={min(p['ks'])}. Probe loss: nats, the best one-latent probe; ln 2 = 0.693 is chance."
        )
        sizes = [f"{name}: {probing_summary.described(text)}" for name, text in p["texts"].items()]
        return [nulls, *sizes, *super().left_out()]

    def plot(self) -> Any:
        """Accuracy against k, a panel a data set. Returns a matplotlib Figure."""
        from diagnostics.probing_plots import plot_probing

        return plot_probing(self.groups, self.provenance)

    def tables(self) -> dict[str, pd.DataFrame]:
        """Accuracy by SAE, data set and probe, and probe loss."""
        return {"": probing_summary.short_frame(self.groups, self.provenance)}


@torch.no_grad()
def probe_saes(
    model: Any,
    labelled: Labelled | str | Sequence[Labelled | str],
    saes: Any,
    *,
    site: Site | None = None,
    ks: Sequence[int] = (1, 2, 5, 20),
    seeds: int = 3,
    per_class: int | None = 150,
    max_length: int = 128,
    test_share: float = 0.3,
    inverse_penalty: float = 1.0,
    sink_filter: float | None = 10.0,
    seed: int = 0,
    folder: str | Path | None = None,
    overwrite: bool = False,
    progress: Progressing = None,
) -> SparseProbing:
    """Fit probes of each class against the rest on k latents of each SAE, averaged over each text's tokens.

        z̄(text) = mean of z over the text's tokens,    selected: the k largest |mean of z̄ in the class − mean of z̄ in the rest|

    labelled: sets of texts, or names and files as `load_labelled` takes them (then at most `per_class` of each class). saes: one, or
    several by name, each at the site it belongs to (`site`: where it must). ks: numbers of latents. seeds: splits into training and
    held-out texts, in whole groups (`Labelled.groups`), about `test_share` held out; the same for every SAE. max_length: tokens
    that a text is cut at. Tokens left out: see `PooledTexts`. Tasks are balanced (`tasks`): chance is .5. inverse_penalty: C of
    scikit-learn's LogisticRegression, features standardised, the same for every k. folder: where finished units, a data set and an SAE each, are kept.

    Probe loss is the cross-entropy of kind `best`, mean over classes: held out, and in `cross_entropy_train` as published, on the
    texts that the probe was fitted and chosen on. Source: arXiv:2606.15054 (mean difference, k-sparse probes), arXiv:2406.04093 (probe
    loss); balanced tasks, nulls and intervals are ours.
    Raises `BelongingError`, `SiteError` for an SAE of another width, model or site; `TextError` for texts that cannot be read;
    `ResultError` for settings that do not serve.
    """
    model = wrap(model)
    ks = tuple(dict.fromkeys(ks))
    if not ks or min(ks) < 1 or seeds < 1 or not 0 < test_share < 1 or not inverse_penalty > 0:
        raise ResultError(
            f"ks {list(ks)}, {seeds} seeds, test_share {test_share}, inverse_penalty {inverse_penalty}; expected numbers of 1 or more, "
            "a share between 0 and 1, and a penalty above 0"
        )
    probes = probes_of(saes, model, site)
    if plain := [probe.name for probe in probes if probe.sae is None]:
        raise ResultError(f"{plain[0]!r} is a set of directions; sparse probing reads the latents of an SAE")
    sets = _sets(labelled, per_class, seed)
    if (mean := probing_summary.MEAN) in sets:
        raise ResultError(
            f"a data set is called {mean!r}, which stands for the mean over data sets; give it another name"
        )
    prompts = {name: labelled_prompts(model, some, max_length=max_length, seed=seed) for name, some in sets.items()}
    settings = {
        "ks": list(ks),
        "seeds": seeds,
        "per_class": per_class,
        "max_length": max_length,
        "test_share": test_share,
        "inverse_penalty": inverse_penalty,
        "sink_filter": sink_filter or None,
        "seed": seed,
    }
    own = {"saes": {probe.name: probe.provenance() for probe in probes}, **settings}
    hashes = {name: _hash([some.tokens, *parts]) for name, (some, *parts) in prompts.items()}
    identity = {"diagnostic": SparseProbing.NAME, "texts": hashes, **own, **model_identity(model)}
    runner = _Runner(model, sets, probes, settings)
    with Units(folder, identity, overwrite) as units:
        done = units.run(runner.units(), runner, progress)
    frames, tokens = [], []
    for name, (some, *_) in prompts.items():
        frames += [_offset(d.frame, len(tokens)) for d in done if d.unit["dataset"] == name]
        tokens += some.tokens
    frame = pd.concat(frames, ignore_index=True)
    order = {probe.name: i for i, probe in enumerate(probes)}
    frame = frame.sort_values("sae", key=lambda s: s.map(order), kind="stable", ignore_index=True)
    cell = frame["text"] < 0
    provenance = {
        "diagnostic": SparseProbing.NAME,
        **model_provenance(model),
        **own,
        "sites": list(dict.fromkeys(str(probe.site) for probe in probes)),
        "texts": {
            name: {**some.provenance(), "tokens": sum(map(len, prompts[name][0].tokens))}
            | {"prompts": len(prompts[name][0].tokens), "prompts_dropped": prompts[name][0].dropped}
            for name, some in sets.items()
        },
        "left_out": {f"{d.unit['dataset']}, {own['saes'][d.unit['sae']]['site']}": d.notes["left_out"] for d in done},
        "null_models": [],
    }
    return SparseProbing(
        _typed(frame.loc[cell, list(COLUMNS)]),
        tokens,
        provenance,
        _typed(frame.loc[~cell, list(_TEXT_COLUMNS)]),
    )


def _sets(labelled: Any, per_class: int | None, seed: int) -> dict[str, Labelled]:
    some = [labelled] if isinstance(labelled, Labelled | str) else list(labelled)
    read = [load_labelled(x, per_class=per_class, seed=seed) if isinstance(x, str) else x for x in some]
    names = [x.name for x in read]
    if not names or len(set(names)) < len(names):
        raise ResultError(f"sets of labelled texts {names}; give at least one, each once")
    return dict(zip(names, read, strict=True))


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _offset(frame: pd.DataFrame, by: int) -> pd.DataFrame:
    """Texts and groups counted through all data sets."""
    return frame.assign(**{name: frame[name].where(frame["text"] < 0, frame[name] + by) for name in ("text", "group")})


def _typed(frame: pd.DataFrame) -> pd.DataFrame:
    """Lines of one kind, whose whole numbers are such again: beside lines of the other kind they had gaps."""
    return frame.reset_index(drop=True).astype({name: int for name in _INTEGERS if name in frame})


def _n_tasks(some: Labelled) -> int:
    return 1 if len(some.classes) == 2 else len(some.classes)


class _Runner:
    """Computes units; one data set's activations in memory."""

    def __init__(self, model: CausalModel, sets: Mapping[str, Labelled], probes: list[Probe], settings: dict[str, Any]):
        self.model, self.sets, self.settings = model, sets, settings
        self.probes = {probe.name: probe for probe in probes}
        self._current: tuple[str, PooledTexts] | None = None

    def units(self) -> list[Unit]:
        """Data set by data set, so that each passes through the model once."""
        return [
            Unit.of(rows=self.settings["seeds"] * _n_tasks(some), dataset=name, sae=sae)
            for name, some in self.sets.items()
            for sae in self.probes
        ]

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
        keys = {"sae": probe.name, "layer": probe.site.layer, "point": probe.site.point, "dataset": unit["dataset"]}
        lines, sums = [], {}
        texts, usable = pooled.prompts.texts, pooled.usable(probe.site)
        group = first_of_group(pooled.groups)
        for number in range(s["seeds"]):
            split = split_seed(s["seed"], number)
            found = tasks(texts, pooled.labels, usable, groups=pooled.groups, test_share=s["test_share"], seed=split)
            for name, task in found.items():
                stream = generator(split, "sparse probing", unit["dataset"], name)
                for line, logits in task_probes(z, x, task, s["ks"], s["inverse_penalty"], stream):
                    lines.append(keys | {"class": name, "seed": number, "text": -1, "group": -1} | line)
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
            lines += (keys | {"latents": ""} | row for row in pd.DataFrame(some).to_dict("records"))
        return pd.DataFrame(lines), {"left_out": pooled.left_out(probe.site)}

"""Statistics of the sums over prompts: losses with intervals, ablations paired by seed, losses as equivalent compute."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy import ndarray

from diagnostics.scaling_laws.grid import ABLATIONS, BASE
from diagnostics.statistics.estimate import Estimate
from diagnostics.statistics.jackknife import from_deletions
from diagnostics.statistics.tables import each, few_prompts, where
from interventions.errors import ResultError

MEASURES = {
    "nmse": "normalised MSE, Σ‖x − x̂‖² / Σ‖x − x̄‖² = 1 − FVE",
    "kl": "KL(clean ‖ spliced) of the next token, nats",
    "excess_ce": "cross-entropy of the next token, spliced − clean, nats",
    "loss_recovered": "(CE of zero ablation − CE) / (CE of zero ablation − clean CE)",
    "compute": "share of the model's forward compute whose early exit has this cross-entropy",
}
Share = Callable[[float | ndarray, ndarray], ndarray]


def described(saes: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Width, k, seed and condition of each SAE, from what it says of its training (`metadata` of each).

    The condition most SAEs share is `base`; others are named by what their recipe changes. Raises `ResultError` for SAEs
    without a recipe, of several sites, architectures or streams, and two of the same width, k, seed and condition.
    """
    lines, rests = [], []
    for name, said in saes.items():
        recipe = dict(said["metadata"].get("recipe") or {})
        if not {"d_sae", "k", "seed"} <= recipe.keys():
            raise ResultError(
                f"{name} says nothing of its recipe; expected SAEs that train_sae.py or scaling_laws.py trained"
            )
        lines.append(
            {
                "sae": name,
                "d_sae": int(recipe.pop("d_sae")),
                "k": float(recipe.pop("k")),
                "seed": int(recipe.pop("seed")),
            }
        )
        rests.append(recipe)
    for what in ("site", "architecture", "tokens", "batch_tokens", "text", "sink_filter", "skip_first"):
        of = {str(said.get(what, said["metadata"].get(what))): name for name, said in saes.items()}
        if len(of) > 1:
            raise ResultError(
                f"{' and '.join(list(of.values())[:2])} differ in {what}; give SAEs of one run, which differ in width, k, seed or recipe"
            )
    usual = max(rests, key=lambda recipe: sum(recipe == other for other in rests))
    for line, recipe in zip(lines, rests, strict=True):
        changed = {key: value for key, value in recipe.items() if value != usual.get(key)}
        known = [name for name, changes in ABLATIONS.items() if changes == changed]
        line["condition"] = known[0] if known else ", ".join(f"{key} {value}" for key, value in changed.items()) or BASE
    keys = [(one["d_sae"], one["k"], one["seed"], one["condition"]) for one in lines]
    if twice := [one["sae"] for one, key in zip(lines, keys, strict=True) if keys.count(key) > 1]:
        raise ResultError(f"{' and '.join(twice[:2])} have the same width, k, seed and recipe; give each once")
    return lines


@dataclass(frozen=True)
class Measured:
    """Sums of each run and prompt."""

    runs: pd.DataFrame
    """a line for each SAE"""
    frame: pd.DataFrame
    text: pd.DataFrame
    exits: pd.DataFrame

    @cached_property
    def _tables(self) -> dict[str, Float[ndarray, "run prompt"]]:
        order = {name: i for i, name in enumerate(self.runs["sae"])}
        rows = self.frame["sae"].map(order).to_numpy(int), self.frame["prompt"].to_numpy(int)
        found = {}
        for name in ("error", "kl", "ce"):
            found[name] = np.zeros((len(order), len(self.text)))
            found[name][rows] = self.frame[name]
        return found

    def text_sum(self, name: str) -> Float[ndarray, "prompt"]:
        """A column of the text."""
        return self.text[name].to_numpy(float)

    def nmse(self, run: Any, weight: Float[ndarray, "*draw prompt"]) -> Float[ndarray, "..."]:
        """Normalised MSE on prompts counted so many times each; x̄ stays the mean of all tokens."""
        return (weight @ self._tables["error"][run].T) / (weight @ self.text_sum("variance")[..., None])

    def losses(self, runs: Sequence[int]) -> Callable[[Int[ndarray, "prompt"] | None], Float[ndarray, "run"]]:
        """As `refits` takes it."""
        one = np.ones(len(self.text))
        return lambda counts: self.nmse(list(runs), one if counts is None else counts)

    def of(self, what: str, run: int, weight: Float[ndarray, "draw prompt"]) -> Float[ndarray, "draw"]:
        """A measure of one run, on prompts counted so many times each."""
        if what == "nmse":
            return self.nmse([run], weight)[:, 0]
        n = weight @ self.text_sum("n_spliced")
        if what == "kl":
            return weight @ self._tables["kl"][run] / n
        ce, clean = weight @ self._tables["ce"][run] / n, weight @ self.text_sum("ce_clean") / n
        if what == "excess_ce":
            return ce - clean
        if what == "loss_recovered":
            zero = weight @ self.text_sum("ce_zero") / n
            return (zero - ce) / (zero - clean)
        ladder = self.ladder(weight)
        return np.array([equivalent(c, rungs, self.shares) for c, rungs in zip(ce, ladder, strict=True)])

    @cached_property
    def shares(self) -> Float[ndarray, "exit"]:
        """Share of the model's compute of each exit, ascending; the last is the whole model."""
        return self.exits.drop_duplicates("layer").sort_values("layer")["share"].to_numpy(float)

    def ladder(self, weight: Float[ndarray, "draw prompt"]) -> Float[ndarray, "draw exit"]:
        """Mean cross-entropy of every exit."""
        by = self.exits.pivot(index="prompt", columns="layer", values="ce").reindex(range(len(self.text))).fillna(0.0)
        n = self.exits.drop_duplicates("prompt").set_index("prompt")["n"].reindex(range(len(self.text))).fillna(0)
        return (weight @ by.to_numpy(float)) / (weight @ n.to_numpy(float))[:, None]

    def estimate(
        self, statistic: Callable[[Float[ndarray, "draw prompt"]], Float[ndarray, "draw"]], column: str
    ) -> Estimate:
        """A statistic with its delete-one-prompt jackknife interval over the prompts that have tokens in `column`."""
        size = self.text_sum(column)
        there = np.flatnonzero(size)
        weight = np.ones((1 + len(there), len(size)))
        weight[1 + np.arange(len(there)), there] = 0
        with few_prompts(), np.errstate(all="ignore"):
            values = statistic(weight)
            return from_deletions(float(values[0]), values[1:], size[there].astype(int))

    def cells(self) -> list[int]:
        """The runs that the law is fitted to: of each width and k the base with the lowest seed."""
        base = where(self.runs, self.runs["condition"] == BASE).sort_values(by=["d_sae", "k", "seed"])
        return base.drop_duplicates(["d_sae", "k"]).index.tolist()


def equivalent(ce: float, rungs: Float[ndarray, "exit"], shares: Float[ndarray, "exit"]) -> float:
    """Share of compute at which the best exit so far has this cross-entropy; linear between exits. nan above the first exit's.

    The best so far, for an exit that is worse than an earlier one costs more and gains nothing. 1 at the whole model's and below.
    """
    best = np.minimum.accumulate(rungs)
    if not np.isfinite(ce) or ce > best[0]:
        return np.nan
    lower = np.r_[True, np.diff(best) < 0]
    # The cheapest exit of each value, ascending in −best.
    return float(np.interp(-ce, -best[lower], shares[lower]))


def loss_groups(m: Measured) -> Iterator[dict[str, Any]]:
    """A line for each SAE and measure, and for the share of latents silent on all counted tokens (no interval: it falls with their number)."""
    for i, run in enumerate(m.runs.to_dict("records")):
        place = {
            "part": "loss",
            "condition": run["condition"],
            "sae": run["sae"],
            "n": run["d_sae"],
            "k": run["k"],
            "seed": run["seed"],
        }
        for what in MEASURES:
            if what == "compute" and not len(m.exits):
                continue
            column = "n_tokens" if what == "nmse" else "n_spliced"
            yield place | {"what": what, "value": m.estimate(lambda w, i=i, what=what: m.of(what, i, w), column)}
        yield place | {"what": "silent", "value": plain(run["silent"], int(m.text["n_tokens"].sum()))}


def ablation_groups(m: Measured) -> Iterator[dict[str, Any]]:
    """Each ablation against the base of the same width, k and seeds: mean over seeds, with a jackknife interval over prompts and the range over seeds.

    Of the NMSE the ratio (exp of the mean log), of all else the difference. `base`: the standard deviation of log NMSE over its seeds.
    """
    for (n, k), some in each(m.runs, ["d_sae", "k"], sort=True):
        own = {name: dict(zip(rows["seed"], rows.index, strict=True)) for (name,), rows in each(some, ["condition"])}
        base = own.pop(BASE, {})
        place = {"part": "ablation", "n": n, "k": k}
        if len(base) > 1:
            one = np.ones((1, len(m.text)))
            logs = [float(np.log(m.of("nmse", i, one)[0])) for i in base.values()]
            sd = plain(float(np.std(logs, ddof=1)), len(logs))
            yield place | {"condition": BASE, "what": "sd of log NMSE over seeds", "value": sd}
        for condition, runs in own.items():
            if pairs := [(i, base[seed]) for seed, i in runs.items() if seed in base]:
                yield from _paired(m, place | {"condition": condition}, pairs)


def _paired(m: Measured, place: dict[str, Any], pairs: list[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    for what in ("nmse", "kl", "excess_ce"):

        def changes(w: ndarray, what: str = what) -> Float[ndarray, "pair draw"]:
            sides = [(m.of(what, i, w), m.of(what, j, w)) for i, j in pairs]
            return np.stack([np.log(a / b) if what == "nmse" else a - b for a, b in sides])

        back = np.exp if what == "nmse" else (lambda x: x)
        seeds = back(changes(np.ones((1, len(m.text))))[:, 0])
        column = "n_tokens" if what == "nmse" else "n_spliced"
        value = m.estimate(lambda w, changes=changes, back=back: back(changes(w).mean(0)), column)
        name = "nmse ratio" if what == "nmse" else f"{what} difference"
        yield place | {
            "what": name,
            "value": value,
            "seeds_low": seeds.min(),
            "seeds_high": seeds.max(),
            "seeds": len(pairs),
        }
    silent = np.array([m.runs["silent"][i] - m.runs["silent"][j] for i, j in pairs])
    ends = {"seeds_low": silent.min(), "seeds_high": silent.max(), "seeds": len(pairs)}
    yield place | {"what": "silent difference", "value": plain(float(silent.mean()), len(pairs)), **ends}


def exit_groups(m: Measured) -> Iterator[dict[str, Any]]:
    """The cross-entropy after each block, with the share of compute."""
    if not len(m.exits):
        return
    for layer, share in enumerate(m.shares):
        value = m.estimate(lambda w, layer=layer: m.ladder(w)[:, layer], "n_spliced")
        yield {"part": "exit", "what": "ce", "layer": layer, "share": float(share), "value": value}


def plain(value: float, n: int) -> Estimate:
    """A number without an interval."""
    return Estimate(float(value), np.nan, np.nan, np.nan, n, 0)

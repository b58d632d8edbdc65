"""`specification_curve`: the same claim under every combination of the choices that its authors had to make.

A specification curve (Simonsohn, Simmons & Nelson 2020): estimates sorted, the choices behind each below. The claims are those
of arXiv:2606.15054, section on direction and norm: that direction matters more than norm, and the more so the deeper.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from diagnostics import statistics
from diagnostics.direction_vs_norm.result import DirectionNorm
from diagnostics.specifications.design import COMPARISONS, DEPTHS, FACTORS, METRICS, SINKS
from diagnostics.specifications.result import Specifications
from diagnostics.statistics.tables import few_prompts
from interventions.errors import ResultError


def specification_curve(results: Mapping[str, DirectionNorm], *, level: float = 0.95) -> Specifications:
    """The claims under every combination of text × context × sink filter × metric × comparison (× depth).

    results: by text, each with its random pairs at three blocks or more, one point, horizon 1; run without a sink filter for
    both choices of it (a run with one has that choice alone). Randomly initialised models in the results go through the same.

        direction  mean over the blocks of a third of  log(effect of one ÷ effect of the other), median over pairs, exponentiated
        deeper     slope of that log ratio against depth (0 at the first block, 1 at the last), exponentiated

    "top-1 changed" is a share of pairs, so there effects are means and not medians. Intervals: 95 %, over prompts. Raises `ResultError` for other results.
    """
    if not results:
        raise ResultError("no result; give at least one")
    rows = []
    models = {result.provenance.get("weights_sha256") for result in results.values()}
    if len(models) > 1:
        raise ResultError(f"results of {len(models)} different models; a curve is of one")
    for text, result in results.items():
        points = result.points
        if "random" not in result.provenance["pair_sets"] or len(points) != 1 or result.provenance["horizon"] != 1:
            raise ResultError(
                f"{text}: points {points}, horizon {result.provenance['horizon']}; expected random pairs, one point, horizon 1"
            )
        n_layers = result.provenance["n_layers"]
        frame = result.frame.loc[(result.frame.pair_set == "random") & (result.frame.layer < n_layers - 1)]
        if frame.layer.nunique() < 3:
            raise ResultError(f"{text}: {frame.layer.nunique()} blocks below the last; give three or more")
        filtered = result.provenance["sink_filter"]
        sinks = SINKS if filtered is None else {f"{filtered:g} × median": np.inf}
        for (model, context), some in frame.groupby(["model", "context"], sort=False):  # type: ignore[misc]
            for (sink, most), (metric, name) in itertools.product(sinks.items(), METRICS.items()):
                choices = {"text": text, "context": str(context).replace("_", " "), "sink filter": sink, "metric": name}
                logs = _LogRatios(some.loc[some.norm_of_median <= most], metric, n_layers)
                rows += [{"model": model, **choices, **line} for line in logs.lines(level)]
    table = pd.DataFrame(rows)
    columns = ["claim", "model", *FACTORS["direction"], "value", "low", "high", "n_pairs", "n_prompts", "n_effective"]
    provenance = {text: result.provenance for text, result in results.items()}
    return Specifications(
        table.loc[:, columns].sort_values(by=["claim", "model"], kind="stable", ignore_index=True), provenance
    )


class _LogRatios:
    """Logarithms of ratios of effects, by layer and pair."""

    def __init__(self, rows: pd.DataFrame, metric: str, n_layers: int):
        wide = rows.assign(effect=rows[metric].astype(float)).pivot(
            index="pair", columns=["layer", "edit"], values="effect"
        )
        needed = sorted({edit for parts in COMPARISONS.values() for side in parts for edit in side})
        self.share = metric == "top1_changed"
        self.layers = sorted(rows.layer.unique().tolist())
        wide = wide.reindex(columns=[(layer, edit) for layer in self.layers for edit in needed])
        self.effects = wide.to_numpy().reshape(len(wide), len(self.layers), len(needed))
        self.column = {edit: i for i, edit in enumerate(needed)}
        first = rows.drop_duplicates("pair").set_index("pair").loc[wide.index]
        self.clusters = first[["target_prompt", "source_prompt"]].to_numpy(int)
        self.depth = np.array(self.layers) / (n_layers - 1)
        floors = (
            rows[rows.edit == "self"].groupby("layer")[metric].agg(lambda x: np.percentile(np.abs(x.astype(float)), 99))
        )
        self.floor = np.array([float(floors.get(layer, 0.0)) for layer in self.layers])

    def lines(self, level: float) -> list[dict[str, Any]]:
        """An estimate for each comparison and depth, and one of its growth for each comparison."""
        found = []
        third = np.minimum((self.depth * 3).astype(int), 2)
        for comparison, (top, bottom) in COMPARISONS.items():
            for i, depth in enumerate(DEPTHS):
                if (third == i).any():
                    weights = (third == i) / (third == i).sum()
                    found.append(
                        {
                            "claim": "direction",
                            "comparison": comparison,
                            "depth": depth,
                            **self._one(top, bottom, weights, level),
                        }
                    )
            centred = self.depth - self.depth.mean()
            slope = centred / (centred**2).sum()
            found.append(
                {"claim": "deeper", "comparison": comparison, "depth": "", **self._one(top, bottom, slope, level)}
            )
        return found

    def _one(self, top: Sequence[str], bottom: Sequence[str], weights: np.ndarray, level: float) -> dict[str, Any]:
        """exp of the median over pairs of Σ_layer weight · log(Π effects of `top` / Π effects of `bottom`).

        An effect within the noise floor counts as the floor; undefined where half of the effects of an edit are. Of shares, which are
        means of 0 and 1 and have no tail: the same sum of logarithms of means; undefined where a mean is within the floor.
        """
        use = weights != 0
        sign = np.zeros(len(self.column))
        for side, s in ((top, 1.0), (bottom, -1.0)):
            for edit in side:
                sign[self.column[edit]] += s
        some = self.effects[:, use][:, :, sign != 0]
        there = np.isfinite(some).all(axis=(1, 2))  # a rotation as long as some norm patches does not exist
        some, clusters = some[there], self.clusters[there]
        floor = np.maximum(self.floor[use, None], np.finfo(float).tiny)

        def logs(effects: np.ndarray) -> np.ndarray:
            return np.log(np.maximum(effects, floor)) @ sign[sign != 0] @ weights[use]

        def ratio_of_shares(keep: np.ndarray) -> float:
            means = some[keep].mean(axis=0) if keep.any() else np.zeros(some.shape[1:])
            return float(np.exp(logs(means))) if (means > floor).all() else np.nan

        with few_prompts():  # their number stands beside each interval
            if self.share:
                e = statistics.jackknife(ratio_of_shares, len(some), clusters, level=level, transform="log")
                value, low, high = e.value, e.low, e.high
            else:
                e = statistics.median(logs(some), clusters, level=level)
                known = bool(len(some)) and bool((np.median(some, axis=0) > floor).all())
                value, low, high = np.exp([e.value, e.low, e.high]) if known else np.full(3, np.nan)
        numbers = {"n_pairs": e.n_rows, "n_prompts": e.n_prompts, "n_effective": e.n_effective}
        return {"value": value, "low": low, "high": high, **numbers}

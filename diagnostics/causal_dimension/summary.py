"""Statistics of causal dimensionality: κ and its kin with intervals over prompts, their controls, shares of the trace in spans."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.causal_dimension.products import METRICS
from diagnostics.causal_dimension.spectra import STATISTICS
from diagnostics.causal_dimension.work import PARTS, WHOLE, WITHOUT
from diagnostics.results.headlines import Group, Headline, middle, null_range
from diagnostics.statistics.estimate import Estimate
from diagnostics.statistics.jackknife import from_deletions
from diagnostics.statistics.tables import each, from_sums, lines_of


def groups_of(frame: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """A line for each model, site and metric."""
    for (model, layer, point), some in each(frame, ["model", "layer", "point"]):
        for metric in METRICS:
            lines = lines_of(some, matrix=metric)
            if len(lines):
                yield {"model": model, "layer": int(layer), "point": point, "matrix": metric} | _dimensions(lines, some)


def _dimensions(lines: pd.DataFrame, beside: pd.DataFrame) -> dict[str, Any]:
    whole, without = lines_of(lines, part=WHOLE).iloc[0], lines_of(lines, part=WITHOUT)
    sizes = int(whole["tokens"]) - without["tokens"].to_numpy(int)
    found: dict[str, Any] = {"tokens": int(whole["tokens"]), "effective_tokens": float(whole["effective_tokens"])}
    for name in STATISTICS:
        found[name] = from_deletions(float(whole[name]), without[name].to_numpy(float), sizes, transform="log")
    for part in PARTS:
        found[f"at {part}"] = float(lines_of(lines, part=part)["effective_rank"].mean())
    rotated = lines_of(beside, matrix=f"{whole['matrix']}_rotated", part=WHOLE)
    found["rotated"] = float(rotated["effective_rank"].iloc[0]) if len(rotated) else np.nan
    found["activations"] = float(lines_of(beside, matrix="activations")["effective_rank"].iloc[0])
    found["trace"] = float(whole["trace"])
    return found


def span_groups(spans: pd.DataFrame) -> list[dict[str, Any]]:
    """The share of the trace in each span, Σ tr(QQᵀG_g) / Σ tr G_g over prompts, a line for each SAE, metric, k and kind of rows."""
    return [
        {"sae": sae, "layer": int(layer), "matrix": matrix, "k": int(k), "rows": rows, "share": from_sums(some, ["inside", "trace"], _ratio, "logit")}
        for (sae, layer, matrix, k, rows), some in each(spans, ["sae", "layer", "matrix", "k", "rows"])
    ]  # fmt: skip


def _ratio(inside: Any, trace: Any) -> Any:
    return inside / trace


def headlines(groups: Sequence[Group], nulls: Sequence[Group], provenance: Mapping[str, Any]) -> Iterator[Headline]:
    """κ at the middle block, beside its controls."""
    for g in middle(groups):
        same = ("layer", "point", "matrix")
        own = [n["effective_rank"] for n in nulls if all(n[name] == g[name] for name in same)]
        against = [f"each token's matrix turned at random: {g['rotated']:.3g}"] if np.isfinite(g["rotated"]) else []
        against += [f"activations: {g['activations']:.3g}", f"at half of the tokens: {g['at 1/2']:.3g}"]
        known = null_range(own, g["effective_rank"])
        where = f"block {g['layer']} {g['point']}, {g['tokens']} tokens"
        yield Headline(
            f"effective rank of {provenance['d_model']} ({g['matrix']}), {where}",
            str(g["effective_rank"]), "; ".join(filter(None, [*against, known])),
        )  # fmt: skip


def growing(g: Mapping[str, Any]) -> float:
    """κ of all tokens over κ of half of them: 1 where more tokens would not change it."""
    whole: Estimate = g["effective_rank"]
    return whole.value / g["at 1/2"]

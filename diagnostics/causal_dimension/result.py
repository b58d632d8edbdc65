"""The result of `causal_dimensionality`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from diagnostics.causal_dimension.summary import groups_of, growing, headlines, span_groups
from diagnostics.results.headlines import Headline
from diagnostics.results.result import Result
from diagnostics.statistics.tables import TRAINED, few_prompts

GROWS = 1.1
"""κ of all tokens over that of half of them, above which it is said to depend on their number"""


@dataclass(frozen=True)
class CausalDimension(Result):
    """Effective ranks of E[JᵀMJ] by model, site and metric, and how they were made.

    The table has a line for each model × site × matrix × part of the tokens (`all`; `without` each prompt; halves, quarters, eighths).
    """

    spectrum: pd.DataFrame
    """eigenvalues of each matrix of all tokens, falling"""
    spans: pd.DataFrame
    """trace inside and outside spans of decoder rows, prompt by prompt"""

    NAME: ClassVar[str] = "causal_dimension"
    TITLE: ClassVar[str] = "Causal dimensionality"
    QUESTION: ClassVar[str] = "How many directions of an activation does the model above the site read?"
    NULL_MODELS: ClassVar[bool] = True
    TABLES: ClassVar[Mapping[str, str]] = {
        "spectrum": "causal_dimension_spectrum.parquet", "spans": "causal_dimension_spans.parquet",
    }  # fmt: skip
    NOTE: ClassVar[str] = (
        "effective_rank κ, participation ratio, and directions for 50, 80, 90 % of the trace of E[JᵀMJ], with 95 % intervals over prompts "
        "(of the draw of tokens, not of the bias of few tokens); at 1/2: mean κ of each half of the tokens; rotated: κ where each token's "
        "matrix is turned at random; activations: effective rank of their covariance."
    )

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """κ and its kin of each model, site and metric."""
        with few_prompts():  # few prompts: their number stands beside each interval
            return list(groups_of(self.frame))

    @cached_property
    def span_groups(self) -> list[dict[str, Any]]:
        """The share of the trace that spans of decoder rows hold."""
        with few_prompts():
            return span_groups(self.spans)

    @property
    def defaults(self) -> dict[str, Any]:
        """The model itself."""
        return {"model": TRAINED}

    def as_dict(self) -> dict[str, Any]:
        """Summary, shares in spans and provenance, as they stand in the JSON file."""
        return super().as_dict() | {"spans": self.span_groups}

    def tables(self) -> dict[str, pd.DataFrame]:
        """κ; and, where SAEs were given, shares of the trace in the span of k directions."""
        frame = pd.DataFrame(self.groups)
        first = ["model", "layer", "point", "matrix", "effective_rank", "rotated", "activations"]
        found = {"": frame.reindex(columns=[*first, *(name for name in frame if name not in first)])}
        if self.span_groups:
            table = pd.DataFrame(self.span_groups).assign(share=lambda t: t["share"].map(str))
            table = table.pivot(index=["sae", "layer", "matrix", "k"], columns="rows", values="share").reset_index()
            table = table.reindex(
                columns=["sae", "layer", "matrix", "k", "most_active", "random", "principal", "eigenvectors"]
            )
            found["Share of the trace in the span of k directions"] = table.rename_axis(columns=None)
        return found

    def own_caveats(self) -> list[str]:
        """Where κ still grows with the number of tokens, and what a sketch gives."""
        found = []
        grown = {(g["layer"], g["matrix"]): growing(g) for g in self.select()}
        if many := [ratio for ratio in grown.values() if np.isfinite(ratio) and ratio > GROWS]:
            found.append(
                f"the effective rank still grows with the number of tokens in {len(many)} of {len(grown)} cases (up to {max(many):.2f} × "
                "that of half of them): read it as a lower bound, and compare only equal numbers of tokens"
            )
        if k := self.provenance["directions"]:
            found.append(
                f"a sketch of {k} of {self.provenance['d_model']} directions: effective ranks are too low, the more so the nearer they are to "
                f"{k}; participation ratios are not"
            )
        return found

    def headlines(self) -> Iterable[Headline]:
        """κ at the middle block."""
        nulls = [g for label in self.null_models for g in self.select(model=label)]
        return headlines(self.select(), nulls, self.provenance)

    def plot(self) -> Any:
        """κ, directions needed and growth with tokens, by depth. Returns a matplotlib Figure."""
        return next(iter(self.figures().values()))

    def figures(self) -> dict[str, Any]:
        """By depth, a figure for each point within blocks; shares of the trace in spans, where SAEs were given."""
        from diagnostics.causal_dimension.figures import plot_dimension, plot_spans

        found = {}
        for point in self.points:
            nulls = [self.select(model=label, point=point) for label in self.null_models]
            name = self.NAME if len(self.points) == 1 else f"{self.NAME}_{point}"
            found[name] = plot_dimension(self.select(point=point), nulls, point, self.provenance)
        if self.span_groups:
            found[f"{self.NAME}_spans"] = plot_spans(self.span_groups, self.provenance)
        return found

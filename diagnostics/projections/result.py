"""The result of projection ablations: its table, statistics and figures."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, cast

import numpy as np
import pandas as pd

from diagnostics.figures.by_depth import DepthPlan
from diagnostics.projections.depth import PLANS
from diagnostics.projections.summary import NOTE, first_numbers, short_frame, summaries, summary_frame, within_floors
from diagnostics.results.headlines import Headline
from diagnostics.results.result import Result
from diagnostics.statistics.tables import TRAINED
from interventions.errors import ResultError


@dataclass(frozen=True)
class ProjectionEffects(Result):
    """What ablations of directions did, row by row, and how it was made.

    The table has a line for each model × layer × point × context × SAE × latent × token × edit; its columns are `COLUMNS` of `design`.
    """

    NAME: ClassVar[str] = "projections"
    TITLE: ClassVar[str] = "Ablated directions"
    QUESTION: ClassVar[str] = "Does the effect of removing a direction go with the cosine or with the inner product?"
    NOTE: ClassVar[str] = NOTE
    DEPTH: ClassVar[Mapping[str, DepthPlan]] = PLANS
    NULL_MODELS: ClassVar[bool] = True

    @property
    def main(self) -> str:
        """The edit that every row pair has, with its placebos: one of `REFERENCES`."""
        return self.provenance["reference"]

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """Statistics of each model × layer × point × context × SAE."""
        return summaries(self.frame, self.provenance)

    @property
    def defaults(self) -> dict[str, Any]:
        """The model itself; the first point and context."""
        return {"model": TRAINED, "point": self.points[0], "context": self.provenance["context"][0]}

    def rows(self, group: Mapping[str, Any]) -> pd.DataFrame:
        """The table's lines of a group (anything with its model, layer, point, context and sae)."""
        keys = ("model", "layer", "point", "context", "sae")
        own = np.logical_and.reduce([self.frame[key] == group[key] for key in keys])
        return cast(pd.DataFrame, self.frame.loc[own])

    def summary(self) -> pd.DataFrame:
        """One row per model, layer, point, context and SAE: median KL of each edit, ratios to placebos, exponents, with intervals."""
        return summary_frame(self.groups)

    def headlines(self) -> Iterable[Headline]:
        """Of each SAE, the effect over its placebo's, and the rescaled exponent less its placebo's."""
        return first_numbers(self.select())

    def left_out(self) -> list[str]:
        """What is missing, and how many rows lie within the noise floor; a line each."""
        return [*within_floors(self.groups), *super().left_out()]

    def plot(self, context: str | None = None) -> Any:
        """The norm exponent by depth: across tokens and of rescaled activations, beside placebos'. Returns a matplotlib Figure."""
        from diagnostics.projections.figures import plot_exponents

        groups = [g for g in self.groups if g["point"] == self.points[0]]
        return plot_exponents(groups, self.provenance, [context] if context else self.provenance["context"])

    def plot_dose(self, sae: str | None = None, latents: Sequence[int] | None = None) -> Any:
        """KL against dose for some latents, coloured by norm. Returns a matplotlib Figure."""
        from diagnostics.projections.figures import plot_dose

        groups = self.select()
        group = next((g for g in groups if g["sae"] == sae), None) if sae else groups[len(groups) // 2]
        if group is None:
            raise ResultError(f"no SAE {sae!r} in this result; known: {', '.join(self.saes)}")
        return plot_dose(self.rows(group), self.provenance, latents)

    def figures(self) -> dict[str, Any]:
        """Exponents by depth; KL against dose of some latents of the SAE in the middle."""
        return {f"{self.NAME}_exponent": self.plot(), f"{self.NAME}_dose": self.plot_dose()}

    def tables(self) -> dict[str, pd.DataFrame]:
        """Effects and exponents, a line for each model, context, block and SAE."""
        return {"": short_frame(self.groups)}

"""The result of a dose-response run: its table, statistics and figures."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import pandas as pd

from diagnostics.dose.depth import PLANS
from diagnostics.dose.summary import NOTE, first_numbers, short_frame, shown_dose, summaries, summary_frame
from diagnostics.figures.by_depth import DepthPlan
from diagnostics.results.headlines import Headline
from diagnostics.results.result import Result
from diagnostics.statistics.tables import TRAINED


@dataclass(frozen=True)
class DoseResponse(Result):
    """What edits of equal length did, row by row, and how it was made.

    The table has a line for each model × layer × point × context × pair × edit × dose; its columns are `COLUMNS` of `design`.
    """

    NAME: ClassVar[str] = "dose_response"
    TITLE: ClassVar[str] = "Dose and response"
    QUESTION: ClassVar[str] = "How far must an activation move, and which way, before the output changes?"
    NOTE: ClassVar[str] = NOTE
    DEPTH: ClassVar[Mapping[str, DepthPlan]] = PLANS
    NULL_MODELS: ClassVar[bool] = True

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """Statistics of each model × layer × point × context × dose: of every edit, and ratios at equal dose."""
        return summaries(self.frame, list(self.provenance["directions"]))

    @property
    def defaults(self) -> dict[str, Any]:
        """The model itself; the first point and context."""
        return {"model": TRAINED, "point": self.points[0], "context": self.provenance["context"][0]}

    def summary(self) -> pd.DataFrame:
        """One row per model, layer, point, context, dose and edit: KL (nats), ratios to the controls, direct ÷ total, intervals."""
        return summary_frame(self.groups)

    def headlines(self) -> Iterable[Headline]:
        """At the middle block and the dose that figures by depth show."""
        nulls = [g for label in self.null_models for g in self.select(model=label)]
        return first_numbers(self.select(), nulls, self.provenance)

    def plot(self, point: str | None = None, context: str | None = None) -> Any:
        """KL against dose, a panel a layer. Returns a matplotlib Figure."""
        from diagnostics.dose.figures import plot_dose_response

        groups, nulls, place = self._drawn(point, context)
        return plot_dose_response(groups, nulls, self.provenance, *place)

    def plot_depth(self, dose: float = 0.2, point: str | None = None, context: str | None = None) -> Any:
        """By depth at one dose: each edit over an isotropic rotation, and direct over total effect. Returns a matplotlib Figure."""
        from diagnostics.dose.figures import plot_dose_depth

        groups, nulls, place = self._drawn(point, context)
        return plot_dose_depth(groups, nulls, self.provenance, dose, *place)

    def _drawn(self, point: str | None, context: str | None) -> tuple[Any, Any, tuple[str, str]]:
        place = point or self.points[0], context or self.provenance["context"][0]
        of = {
            label: self.select(model=label, point=place[0], context=place[1]) for label in (TRAINED, *self.null_models)
        }
        return of.pop(TRAINED), list(of.values()), place

    def figures(self) -> dict[str, Any]:
        """Both figures, for each point and context."""
        found, doses = {}, self.provenance["doses"]
        dose = shown_dose(doses)
        for i, point in enumerate(self.points):
            for j, context in enumerate(self.provenance["context"]):
                end = "" if i == j == 0 else f"_{point}_{context}"
                found[f"{self.NAME}{end}"] = self.plot(point, context)
                found[f"{self.NAME}_depth{end}"] = self.plot_depth(dose, point, context)
        return found

    def tables(self) -> dict[str, pd.DataFrame]:
        """KL and ratios by layer and dose, a table for each context and point."""
        return {
            f"{context.replace('_', '-')}, {point}": self._short(point, context)
            for context in self.provenance["context"]
            for point in self.points
        }

    def _short(self, point: str, context: str) -> pd.DataFrame:
        nulls = [self.select(model=label, point=point, context=context) for label in self.null_models]
        return short_frame(self.select(point=point, context=context), nulls, list(self.provenance["directions"]))

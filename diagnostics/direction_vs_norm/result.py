"""The result of direction and norm patches: its table, statistics and figure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from diagnostics.direction_vs_norm.depth import PLANS
from diagnostics.direction_vs_norm.summary import NOTE, first_numbers, short_frame, summaries, summary_frame
from diagnostics.figures.by_depth import DepthPlan
from diagnostics.results.headlines import Headline
from diagnostics.results.result import Result
from diagnostics.statistics.tables import TRAINED


@dataclass(frozen=True)
class DirectionNorm(Result):
    """What patching direction, norm and their placebos did, row by row, and how it was made.

    The table has a line for each model × layer × point × context × pair × edit; its columns are `COLUMNS` of `design`.
    """

    NAME: ClassVar[str] = "direction_norm"
    TITLE: ClassVar[str] = "Direction and norm"
    QUESTION: ClassVar[str] = "Does the model read an activation's direction or its norm?"
    NOTE: ClassVar[str] = NOTE
    DEPTH: ClassVar[Mapping[str, DepthPlan]] = PLANS
    NULL_MODELS: ClassVar[bool] = True

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """Statistics of each model × layer × point × context × pair set, with 95 % intervals over prompts.

        Intervals from fewer than 20 effective prompts are too narrow; `n_effective` says how many stand behind each.
        """
        return summaries(self.frame, float(np.log(self.provenance["vocab"])))

    @property
    def defaults(self) -> dict[str, Any]:
        """Random pairs, the model itself, the first site's point."""
        return {"pair_set": "random", "model": TRAINED, "point": self.points[0]}

    def summary(self, pair_set: str = "random") -> pd.DataFrame:
        """One row per model, layer, point and context: median KL (nats) and dose ‖Δx‖/‖x‖ of the patches, ratios, intervals."""
        return summary_frame([group for group in self.groups if group["pair_set"] == pair_set])

    def headlines(self) -> Iterable[Headline]:
        """In the first context, at the middle block."""
        nulls = [g for label in self.null_models for g in self.select(model=label)]
        return first_numbers(self.select(context=self.provenance["context"][0]), nulls)

    def left_out(self) -> list[str]:
        """What is missing, conditioned pair sets with fewer pairs than asked for too; a line each."""
        few = [
            f"{name} {found['used']} of {found['asked']} at {site}"
            for name, by_site in self.provenance["drawn"][TRAINED]["pair_sets"].items()
            for site, found in by_site.items()
            if "exist" in found and found["used"] < found["asked"]
        ]
        said = [f"fewer pairs than asked: {'; '.join(few)}"] if few else []
        return [*said, *super().left_out()]

    def plot(self, point: str | None = None) -> Any:
        """The figure: KL by depth above, ratios below, of one point (default: the first). Returns a matplotlib Figure."""
        from diagnostics.direction_vs_norm.figures import plot_direction_norm

        point = point or self.points[0]
        nulls = [self.select(model=label, point=point) for label in self.null_models]
        return plot_direction_norm(self.select(point=point), nulls, self.provenance, point)

    def figures(self) -> dict[str, Any]:
        """A figure for each point."""
        if "random" not in self.provenance["pair_sets"]:
            return {}
        return {self.NAME + ("" if i == 0 else f"_{point}"): self.plot(point) for i, point in enumerate(self.points)}

    def tables(self) -> dict[str, pd.DataFrame]:
        """KL, doses and ratios of the random pairs by depth, a table for each point."""
        return {point: self._short(point) for point in self.points}

    def _short(self, point: str) -> pd.DataFrame:
        nulls = {label: self.select(model=label, point=point) for label in self.null_models}
        return short_frame(self.select(point=point), nulls)

"""The result of forcing activations to norm 1: its table, statistics and figure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import pandas as pd

from diagnostics.figures.by_depth import DepthPlan
from diagnostics.results.headlines import Headline
from diagnostics.results.result import Result
from diagnostics.statistics.tables import TRAINED, few_prompts
from diagnostics.unit_norm.depth import PLANS
from diagnostics.unit_norm.summary import first_numbers, group_statistics


@dataclass(frozen=True)
class UnitNorm(Result):
    """What forcing norm 1 did, token by token, and how it was made.

    The table has a line for each model × layer × token × edit.
    """

    NAME: ClassVar[str] = "unit_norm"
    TITLE: ClassVar[str] = "Unit norm"
    QUESTION: ClassVar[str] = "What is lost when activations keep their direction and all have norm 1?"
    DEPTH: ClassVar[Mapping[str, DepthPlan]] = PLANS
    NULL_MODELS: ClassVar[bool] = True
    NOTE: ClassVar[str] = (
        "Median KL in nats, 95 % intervals over prompts; rotation: by the same distance, norm kept; everywhere: all tokens at once."
    )

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """Median KL (nats) of each model × layer × edit, and of unit_norm over rotation, with intervals over prompts; means without."""
        with few_prompts():  # few prompts: n_prompts stands beside each interval
            return [group_statistics(key, rows) for key, rows in self.frame.groupby(["model", "layer"], sort=False)]

    @property
    def defaults(self) -> dict[str, Any]:
        """The model itself."""
        return {"model": TRAINED}

    def tables(self) -> dict[str, pd.DataFrame]:
        """Medians; the means stand in `summary()`."""
        frame = pd.DataFrame(self.groups)
        ratios = [name for name in frame if " ÷ " in name and "mean" not in name]
        rest = [name for name in frame if not (name in ("model", "layer", *ratios) or name.startswith("mean "))]
        return {"": frame.reindex(columns=["model", "layer", *ratios, *rest])}

    def headlines(self) -> Iterable[Headline]:
        """At the middle block, beside randomly initialised models."""
        nulls = [g for label in self.null_models for g in self.select(model=label)]
        return first_numbers(self.select(), nulls)

    def plot(self) -> Any:
        """KL by depth. Returns a matplotlib Figure."""
        from diagnostics.unit_norm.figures import plot_unit_norm

        nulls = [self.select(model=label) for label in self.provenance["null_models"]]
        return plot_unit_norm(self.select(), nulls, self.provenance)

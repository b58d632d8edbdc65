"""The result of `probe_perturbation`: its tables, statistics and figure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import pandas as pd

from diagnostics.probe_perturbation import summary
from diagnostics.probe_perturbation.work import SCR, TPP
from diagnostics.results.headlines import Headline
from diagnostics.results.result import Result


@dataclass(frozen=True)
class ProbePerturbation(Result):
    """What ablating the latents of a class, or of a spurious attribute, does to probes.

    The table has a line for each SAE × data set × kind × k × ablated × probe × split: accuracies on held-out texts `before` and `after`,
    of a probe of balanced texts (`oracle`; of TPP the probe itself), `latents` ablated, and the `dose`, mean ‖Δx̄‖.
    """

    held_out: pd.DataFrame = field(default_factory=pd.DataFrame)
    """a line for each text (its place in `tokens`; `group`: that of the first text of its group) of each cell: in how many splits it was held
    out (`n`); in how many more it was right before than after (`fell`), and by the probe of balanced texts than before (`gap`)"""

    NAME: ClassVar[str] = "probe_perturbation"
    NOTE: ClassVar[str] = summary.NOTE
    TABLES: ClassVar[Mapping[str, str]] = {"held_out": "perturbed_texts.parquet"}
    TITLE: ClassVar[str] = "Probe perturbation"
    QUESTION: ClassVar[str] = "Does ablating the latents of a class change the probe of that class, and no other?"

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """TPP and SCR of each SAE × data set × kind × k × ablated class or attribute."""
        return list(summary.groups_of(self.frame, self.held_out))

    def tables(self) -> dict[str, pd.DataFrame]:
        """Targeted probe perturbation; spurious correlation removal."""
        titles = {TPP: "targeted probe perturbation, mean over classes", SCR: "spurious correlation removal"}
        found = {title: summary.table_of(self.groups, protocol) for protocol, title in titles.items()}
        return {title: table for title, table in found.items() if len(table)}

    def headlines(self) -> Iterable[Headline]:
        """Both scores at the middle k."""
        return summary.headlines(self.groups, self.provenance)

    def left_out(self) -> list[str]:
        """Attributes without SCR, and what is missing; a line each."""
        return [*summary.without_gap(self.groups), *super().left_out()]

    def plot(self) -> Any:
        """Both scores against k, a panel a data set. Returns a matplotlib Figure."""
        from diagnostics.probe_perturbation.figures import plot_perturbation

        return plot_perturbation(self.groups, self.provenance)

"""The result of `shapley`."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from diagnostics.pairs.shares import share_of_sums
from diagnostics.results.headlines import Headline
from diagnostics.results.result import Result
from diagnostics.statistics.tables import each


@dataclass(frozen=True)
class Shapley(Result):
    """What each of several components contributes to their joint effect, pair by pair; see `work.COLUMNS` for the table."""

    NAME: ClassVar[str] = "shapley"
    TITLE: ClassVar[str] = "Coalitions of components"
    QUESTION: ClassVar[str] = (
        "How much does each component contribute when several are patched together, and which of them overlap?"
    )
    NOTE: ClassVar[str] = (
        "share: Σ Shapley value / Σ (m_clean − m_corrupt) over pairs, with a 95 % interval over pairs; the shares add up to that of all "
        "components patched together. Lines with a partner: Shapley interaction index of two, above 0 where they do more together "
        "than apart, below 0 where each does what the other does too. sampling: largest half-width, over pairs, of a value's 95 % interval "
        "over sampled orders."
    )

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """Each component's share, then each pair's interaction, largest first."""
        found = []
        for (component, partner), some in each(self.frame, ["component", "partner"]):
            value, total, low, high = (some[name].to_numpy(float) for name in ("value", "total", "low", "high"))
            found.append({
                "component": str(component), "partner": str(partner), "pairs": len(some), "share": share_of_sums(value, total),
                "value": float(value.mean()), "sampling": float(np.max(high - low) / 2),
            })  # fmt: skip
        return sorted(found, key=lambda line: (line["partner"] != "", -abs(line["share"].value)))

    @property
    def together(self) -> Any:
        """The share of all components patched at once, with its interval."""
        some = self.frame.drop_duplicates("pair")
        return share_of_sums(some["all"].to_numpy(float), some["total"].to_numpy(float))

    def tables(self) -> dict[str, pd.DataFrame]:
        """Shares of components; interactions."""
        values, pairs = ([g for g in self.groups if bool(g["partner"]) == two] for two in (False, True))
        found = {f"Shapley values (all together: {self.together})": pd.DataFrame(values).drop(columns="partner")}
        return found | ({"Interactions": pd.DataFrame(pairs).drop(columns="sampling")} if pairs else {})

    def matrix(self) -> pd.DataFrame:
        """Shares: Shapley values on the diagonal, interactions beside it; nan where these were not measured."""
        names = self.provenance["components"]
        found = pd.DataFrame(np.nan, index=names, columns=names)
        for g in self.groups:
            found.loc[g["component"], g["partner"] or g["component"]] = g["share"].value
            found.loc[g["partner"] or g["component"], g["component"]] = g["share"].value
        return found

    def headlines(self) -> Iterable[Headline]:
        """The largest part, and the strongest interaction."""
        parts = [g for g in self.groups if not g["partner"]][:1] + [g for g in self.groups if g["partner"]][:1]
        for g in parts:
            what = (
                f"interaction of {g['component']} and {g['partner']}"
                if g["partner"]
                else f"Shapley value of {g['component']}"
            )
            yield Headline(f"{what}, share", str(g["share"]), f"all components together: {self.together}")

    def plot(self) -> Any:
        """Shapley values with intervals beside the matrix of interactions. Returns a matplotlib Figure."""
        from diagnostics.coalitions.figures import plot_shapley

        return plot_shapley(self.groups, self.matrix(), self.provenance)

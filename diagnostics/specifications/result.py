"""The result of a specification curve: its table, statistics and figures."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from diagnostics.results.headlines import Headline
from diagnostics.results.result import BaseResult
from diagnostics.specifications.design import CLAIMS, FACTORS
from diagnostics.statistics.tables import TRAINED
from interventions.errors import ResultError


@dataclass(frozen=True)
class Specifications(BaseResult):
    """Every claim under every combination of choices."""

    frame: pd.DataFrame
    """one line for each claim × model × specification: `value` and its interval; a ratio, for `deeper` its factor of growth
    from the first block to the last, by a line fitted without the last; `n_pairs` that the comparison has; nan where it is undefined (no effect to divide by)"""
    provenance: dict[str, Any]
    """of the runs it was formed of, by text"""

    NAME: ClassVar[str] = "specification"
    TITLE: ClassVar[str] = "Specification curve"
    QUESTION: ClassVar[str] = "Do the claims about direction and norm survive the choices behind them?"
    CALL: ClassVar[str] = "specification_curve"
    FORMED_OF: ClassVar[str] = "DirectionNorm"
    NULL_MODELS: ClassVar[bool] = True
    NOTE: ClassVar[str] = (
        "A specification: one choice of each factor. Interval above 1, below 1: share of specifications whose whole 95 % interval over "
        "prompts lies there. Deeper: factor of growth from the first block to the last."
    )

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """Of each claim and model: how many specifications, their median, the share whose whole interval lies above 1, and below."""
        rows = []
        for (claim, model), some in self.frame.groupby(["claim", "model"], sort=False):  # type: ignore[misc]
            known = some[some.value.notna()]
            rows.append(
                {
                    "claim": CLAIMS[str(claim)],
                    "model": model,
                    "specifications": len(some),
                    "undefined": len(some) - len(known),
                    "median": known.value.median(),
                    "interval above 1": float((known.low > 1).mean()) if len(known) else np.nan,
                    "interval below 1": float((known.high < 1).mean()) if len(known) else np.nan,
                }
            )
        return rows

    def by_choice(self, claim: str = "direction") -> pd.DataFrame:
        """Median over the other choices, for each choice of each factor (trained model)."""
        some = self.frame[(self.frame.claim == claim) & (self.frame.model == TRAINED)]
        parts = []
        for factor in FACTORS[claim]:
            grouped = some.groupby(factor, sort=False)["value"].median()
            parts += [{"factor": factor, "choice": choice, "median": value} for choice, value in grouped.items()]
        return pd.DataFrame(parts)

    def tables(self) -> dict[str, pd.DataFrame]:
        """The summary, and of each claim medians by choice."""
        medians = {f"{words}, median by choice": self.by_choice(claim) for claim, words in CLAIMS.items()}
        return {"": self.summary()} | medians

    def plot(self, claim: str = "direction") -> Any:
        """The curve of one claim. Returns a matplotlib Figure."""
        from diagnostics.specifications.figures import plot_specifications

        if claim not in CLAIMS:
            raise ResultError(f"no claim {claim!r}; known: {', '.join(CLAIMS)}")
        frame = self.frame.loc[self.frame.claim == claim]
        label = "ratio" if claim == "direction" else "growth of the ratio\nfrom first block to last"
        return plot_specifications(frame, self.provenance, CLAIMS[claim], FACTORS[claim], label)

    def counted_in(self) -> Any:
        """The specifications, each an estimate."""
        return self.frame.reindex(columns=["n_prompts", "n_effective"]).assign(se=0.0).to_dict("records")

    def headlines(self) -> Iterator[Headline]:
        """How many specifications each claim survives."""
        for g in self.groups:
            if g["model"] != TRAINED:
                continue
            nulls = [n["interval above 1"] for n in self.groups if n["claim"] == g["claim"] and n["model"] != TRAINED]
            known = g["specifications"] - g["undefined"]
            against = f"randomly initialised models: {min(nulls):.0%} to {max(nulls):.0%}" if nulls else ""
            words = f"share of {known} specifications of “{g['claim']}” whose whole interval is above 1 (median {g['median']:.3g})"
            yield Headline(words, f"{g['interval above 1']:.0%}", against)

    def figures(self) -> dict[str, Any]:
        """A figure for each claim."""
        return {f"{self.NAME}_{claim}": self.plot(claim) for claim in CLAIMS}

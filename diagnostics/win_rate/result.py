"""A report of win rates: its table, statistics and figures."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, cast

import pandas as pd
from typing_extensions import Self

from diagnostics.figures.by_depth import DepthPlan, DepthPoint
from diagnostics.projections.result import ProjectionEffects
from diagnostics.results.headlines import Headline
from diagnostics.results.result import BaseResult
from diagnostics.results.stored import Stored
from diagnostics.statistics.tables import TRAINED, with_ends
from diagnostics.win_rate.depth import PLANS
from diagnostics.win_rate.files import read_contests
from diagnostics.win_rate.summary import NOTE, PARTS, Contest, first_numbers, frame_of, labels_of, line_of
from diagnostics.win_rate.summary import PLACE as SHOWN_PLACE
from interventions.errors import ResultError


@dataclass(frozen=True, eq=False)
class WinRateReport(BaseResult):
    """Win rates, overall and by quartile of ‖x‖, with their placebos, their bands and what they are called."""

    contests: list[Contest]
    runs: dict[str, ProjectionEffects]
    """the runs that they were formed of, by name"""

    NAME: ClassVar[str] = "win_rate"
    TITLE: ClassVar[str] = "Win rate of the cosine"
    QUESTION: ClassVar[str] = (
        "How often does a latent's effect correlate more with its cosine than with its inner product?"
    )
    CALL: ClassVar[str] = "win_rate_report"
    FORMED_OF: ClassVar[str] = "ProjectionEffects"
    NOTE: ClassVar[str] = NOTE
    TABLES: ClassVar[Mapping[str, str]] = {"latents": "win_rate_latents.parquet"}
    DEPTH: ClassVar[Mapping[str, DepthPlan]] = PLANS
    NULL_MODELS: ClassVar[bool] = True

    @classmethod
    def read(cls, stored: Stored) -> Self:
        """A report formed of its files; its runs without their rows."""
        contests, runs = read_contests(stored)
        return cls(contests, {name: ProjectionEffects(pd.DataFrame(), [], p) for name, p in runs.items()})

    @property
    def provenance(self) -> dict[str, Any]:  # type: ignore[override]
        """Of the runs it was formed of, by name."""
        return {name: run.provenance for name, run in self.runs.items()}

    @property
    def frame(self) -> pd.DataFrame:  # type: ignore[override]
        """One line for each run × model × layer × point × context × SAE × edit × quartile of ‖x‖ (`all`: all rows)."""
        return frame_of(self.contests)

    @property
    def latents(self) -> pd.DataFrame:
        """One line for each latent: its correlations, its margin with its standard error, p and q."""
        return pd.concat([c.rates.latents.assign(run=c.run, **c.place) for c in self.contests], ignore_index=True)

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """Every group's numbers, as they stand in the JSON file."""
        return [contest.as_dict() for contest in self.contests]

    def summary(self) -> pd.DataFrame:
        """A line for each run and group: exponents, win rates beside the placebos', labels; estimates with the ends of their intervals."""
        return pd.DataFrame([with_ends(line_of(contest)) for contest in self.contests])

    def headlines(self) -> Iterable[Headline]:
        """Win rates of the model itself in the first context, each beside its placebo's."""
        return first_numbers(self.contests, self.provenance)

    def depth_points(self, figure: str) -> list[DepthPoint]:
        """The points of one of the figures by depth in `DEPTH`."""
        return list(self.DEPTH[figure].points(self.contests, self.provenance))

    def tables(self) -> dict[str, pd.DataFrame]:
        """The summary in three parts."""
        whole = pd.DataFrame([line_of(contest) for contest in self.contests])
        place = [name for name in SHOWN_PLACE if name != "model" or whole["model"].nunique() > 1]
        parts = {title: [*place, *(name for name in columns if name in whole)] for title, columns in PARTS.items()}
        return {title: cast(pd.DataFrame, whole[columns]) for title, columns in parts.items()}

    def without_labels(self) -> list[str]:
        """Scores that have no label, with the reason."""
        parts = []
        for c in self.contests:
            reasons = {"": c.why_no_labels} if c.simpson is None else c.simpson.reasons
            where = f"{c.run}, {c.place['context'].replace('_', '-')}, {c.place['sae']}"
            parts += [f"{where}: no label{' of ' + score if score else ''}: {why}" for score, why in reasons.items()]
        return parts

    def left_out(self) -> list[str]:
        """What has no label, with the reason, and what is missing of each run; a line each."""
        return [*self.without_labels(), *super().left_out()]

    def plot(self) -> Any:
        """Win rate by depth, in context beside the one-token context, with the placebos' band. Returns a matplotlib Figure."""
        from diagnostics.win_rate.figures import plot_win_rate

        return plot_win_rate(self.frame, self.provenance)

    def plot_paradox(self, run: str | None = None, context: str | None = None) -> Any:
        """Overall against within quartiles of one run and context (default: the first), with the band that range restriction alone
        predicts. Returns a matplotlib Figure."""
        from diagnostics.win_rate.figures import plot_paradox

        run = next(iter(self.runs)) if run is None else run
        if run not in self.runs:
            raise ResultError(f"no run {run!r} in this report; known: {', '.join(self.runs)}")
        context = context or str(self.runs[run].provenance["context"][0])
        own = [c for c in self.contests if (c.run, c.place["context"], c.place["model"]) == (run, context, TRAINED)]
        labels = {c.place["sae"]: labels_of(c.simpson) for c in own}
        return plot_paradox(self.frame, self.provenance, labels, run, context)

    def figures(self) -> dict[str, Any]:
        """Win rates by depth; overall against within quartiles, for each run."""
        found = {self.NAME: self.plot()}
        for i, run in enumerate(self.runs):
            found[f"{self.NAME}_paradox" + (f"_{run.replace('/', '_')}" if i else "")] = self.plot_paradox(run)
        return found

"""The result of `edge_patching`."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from diagnostics.edges.summary import edge_shares
from diagnostics.pairs.shares import standing_out, tested, with_intervals
from diagnostics.results.headlines import Headline
from diagnostics.results.result import Result
from diagnostics.statistics.estimate import with_interval
from diagnostics.statistics.tables import lines_of
from interventions.errors import ResultError

_SHOWN = 20
"""edges in a printed table"""


@dataclass(frozen=True)
class EdgePatching(Result):
    """What single edges carry, pair by pair. The table has a line for each pair × direction × edge × control; see
    `work.COLUMNS`."""

    NAME: ClassVar[str] = "edge_patching"
    TITLE: ClassVar[str] = "Edge patching"
    QUESTION: ClassVar[str] = "Which heads and MLPs read what differs between two prompts from which others?"
    NOTE: ClassVar[str] = (
        "share: Σ effect / Σ (m_clean − m_corrupt) over pairs, with a 95 % interval over pairs; control: the share where the sender "
        "writes as much along the difference of two other pairs; q: false discovery rate of edge ≠ control within the direction; null: the "
        "largest share of a control. denoise: how much of the clean metric the "
        "edge alone restores in the corrupt run; noise: how much it takes from the clean run."
    )

    @cached_property
    def edges(self) -> pd.DataFrame:
        """Each edge's share with its interval, by direction, strongest first (see `summary.edge_shares`)."""
        return edge_shares(self.frame)

    @property
    def tested(self) -> bool:
        """Whether edges were compared with controls: there are controls, and 10 pairs or more."""
        return tested(self.edges)

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """`edges`, a mapping for each."""
        return [{str(name): value for name, value in line.items()} for line in self.edges.to_dict("records")]

    def strongest(self, n: int | None = _SHOWN, direction: str | None = None) -> pd.DataFrame:
        """The n edges of largest |share| (None: all) that beat their controls; of all, where none was tested: without controls, or with
        fewer than 10 pairs. Raises `ResultError` for a direction that was not measured."""
        return standing_out(self._of(direction)).head(len(self.edges) if n is None else n)

    def _of(self, direction: str | None) -> pd.DataFrame:
        direction = direction or self.provenance["directions"][0]
        if direction not in self.provenance["directions"]:
            raise ResultError(f"no direction {direction!r}; measured: {', '.join(self.provenance['directions'])}")
        return lines_of(self.edges, direction=direction)

    def tables(self) -> dict[str, pd.DataFrame]:
        """The strongest edges of each direction."""
        columns = ["sender", "receiver", "label", "pairs", "share", "share_low", "share_high", "control", "q", "dose"]
        found = {}
        for direction in self.provenance["directions"]:
            every, some = self._of(direction), self.strongest(None, direction)
            top = some.head(_SHOWN)
            title = f"the {len(top)} strongest of {len(every)} edges (not tested: no controls, or fewer than 10 pairs)"
            if tested(every):
                title = f"the {len(top)} strongest of {len(some)} that beat their controls, of {len(every)} edges"
                title = title if len(some) else f"none of {len(every)} edges beats its control"
                title += f"; largest |share| of a control: {every['null'].iloc[0]:.3g}"
            found[f"{direction}: {title}"] = with_intervals(top[columns])
        return found

    def headlines(self) -> Iterable[Headline]:
        """The edge of largest |share| of each direction, beside its control."""
        for direction in self.provenance["directions"]:
            for line in self._of(direction).head(1).to_dict("records"):
                metric = self.provenance["metric"].replace("_", " ")
                what = f"share of the {metric} that the edge {line['sender']} → {line['receiver']} carries, {direction}"
                beside = (
                    "no controls"
                    if pd.isna(line["control"])
                    else f"its control: {line['control']:.3g}, {_tested(line['q'])}"
                )
                yield Headline(what, with_interval(line["share"], line["share_low"], line["share_high"]), beside)

    def plot(self, direction: str | None = None) -> Any:
        """Senders × receivers, coloured by share. Returns a matplotlib Figure."""
        from diagnostics.edges.figures import plot_matrix

        return plot_matrix(self._of(direction), self.provenance)

    def plot_graph(self, direction: str | None = None, n: int = _SHOWN) -> Any:
        """The n edges of `strongest` drawn as a graph, layers from bottom to top. Returns a matplotlib Figure."""
        from diagnostics.edges.figures import plot_graph

        return plot_graph(self._of(direction), self.provenance, n)

    def figures(self) -> dict[str, Any]:
        """Matrix and graph of each direction."""
        found = {}
        for direction in self.provenance["directions"]:
            found[f"{self.NAME}_{direction}"] = self.plot(direction)
            found[f"{self.NAME}_graph_{direction}"] = self.plot_graph(direction)
        return found


def _tested(q: float) -> str:
    return "not tested" if np.isnan(q) else f"q = {q:.2g}"

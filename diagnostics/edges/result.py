"""The result of `edge_patching`."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import pandas as pd

from diagnostics.edges.summary import edge_shares
from diagnostics.results.result import Result
from interventions.errors import ResultError

_SHOWN = 20
"""edges in a printed table"""


@dataclass(frozen=True)
class EdgePatching(Result):
    """What single edges carry, pair by pair. The table has a line for each pair × direction × edge; see `work.COLUMNS`."""

    NAME: ClassVar[str] = "edge_patching"
    TITLE: ClassVar[str] = "Edge patching"
    QUESTION: ClassVar[str] = "Which heads and MLPs read what differs between two prompts from which others?"
    NOTE: ClassVar[str] = (
        "share: Σ effect / Σ (m_clean − m_corrupt) over pairs, with a 95 % interval over pairs. denoise: how much of the clean metric the "
        "edge alone restores in the corrupt run; noise: how much it takes from the clean run."
    )

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """Each edge's share with its interval, by direction, strongest first."""
        return edge_shares(self.frame)

    def tables(self) -> dict[str, pd.DataFrame]:
        """The strongest edges of each direction."""
        columns = ["sender", "receiver", "label", "pairs", "share", "effect"]
        found = {}
        for direction in self.provenance["directions"]:
            lines = [g for g in self.groups if g["direction"] == direction]
            title = f"{direction}: the {min(_SHOWN, len(lines))} strongest of {len(lines)} edges"
            found[title] = pd.DataFrame(lines[:_SHOWN])[columns]
        return found

    def strongest(self, direction: str | None = None, n: int = _SHOWN) -> list[dict[str, Any]]:
        """The n edges of largest |share|. Raises `ResultError` for a direction that was not measured."""
        direction = direction or self.provenance["directions"][0]
        if direction not in self.provenance["directions"]:
            raise ResultError(f"no direction {direction!r}; measured: {', '.join(self.provenance['directions'])}")
        return [g for g in self.groups if g["direction"] == direction][:n]

    def plot(self, direction: str | None = None) -> Any:
        """Senders × receivers, coloured by share. Returns a matplotlib Figure."""
        from diagnostics.edges.figures import plot_matrix

        return plot_matrix(self.strongest(direction, len(self.groups)), self.provenance)

    def plot_graph(self, direction: str | None = None, n: int = _SHOWN) -> Any:
        """The n strongest edges drawn as a graph, layers from bottom to top. Returns a matplotlib Figure."""
        from diagnostics.edges.figures import plot_graph

        return plot_graph(self.strongest(direction, n), self.provenance)

    def figures(self) -> dict[str, Any]:
        """Matrix and graph of each direction."""
        found = {}
        for direction in self.provenance["directions"]:
            found[f"{self.NAME}_{direction}"] = self.plot(direction)
            found[f"{self.NAME}_graph_{direction}"] = self.plot_graph(direction)
        return found

"""The result of `disentangle`: its table, statistics and figure."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import pandas as pd

from diagnostics.disentanglement.summary import EVERY, groups_of, headlines, table_of
from diagnostics.results.headlines import Headline
from diagnostics.results.result import Result
from diagnostics.statistics.tables import few_prompts

COLUMNS = (
    *(
        "layer",
        "point",
        "fold",
        "target",
        "kind",
        "sae",
        "k",
        "n",
        "context",
        "base",
        "source",
        "dose",
        "relative_dose",
    ),
    *("cause", "isolation", "moved", "whole", "moved_others", "whole_others"),
)
"""Columns of the table. fold: the half of the entities that is measured; kind: `latents`, `random`, `mask`, `all` of an SAE, `pca`,
`subspace`, `das`, `whole`; k: asked for (0: all, or learned); n: exchanged; base, source: row of the facts; dose ‖Δx‖, relative_dose ‖Δx‖/‖x‖. cause, isolation: see
`disentangle`. moved: change of m = logit(the source's value) − logit(the base's) in the target's question; whole: its difference between
the source's own prompt and the base's; moved_others, whole_others: the same, summed over the other attributes."""


@dataclass(frozen=True)
class Disentanglement(Result):
    """Exchanges of one attribute between two entities: a line for each pair, target, kind and k. `tokens`: the prompts of known entities."""

    NAME: ClassVar[str] = "disentanglement"
    TITLE: ClassVar[str] = "Disentanglement"
    QUESTION: ClassVar[str] = (
        "Can one attribute of an entity be changed through an SAE's latents while the others stay?"
    )
    NOTE: ClassVar[str] = (
        "cause: the target's answer becomes the source's; isolation: the others stay the base's; score: their mean, .5 where nothing is "
        "exchanged; over_random: score less that of random latents, pair by pair. moved, moved_others: change of the logit difference ÷ its whole difference. 95 % intervals over entities, base and "
        "source. chosen: k that is best on the other half of the entities. random: as far as the chosen latents in each pair."
    )

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """Cause, isolation and score of each kind, k and target."""
        with few_prompts():  # few entities: their number stands beside each interval
            return list(groups_of(self.frame))

    @property
    def defaults(self) -> dict[str, Any]:
        """All targets together."""
        return {"target": EVERY}

    def tables(self) -> dict[str, pd.DataFrame]:
        """Every kind and k, over all targets."""
        return {"": table_of(self.groups)}

    def left_out(self) -> list[str]:
        """What the model knows, and what was left out."""
        known = self.provenance["known"]
        own = ", ".join(f"{name} {n}" for name, n in known["known"].items())
        said = (
            f"{known['asked']} entities in contexts asked about; known: {own}; pairs: {sum(self.provenance['pairs'])}."
        )
        return [said, *(f"left out: {n} × {why}" for why, n in known["left_out"].items()), *super().left_out()]

    def headlines(self) -> Iterable[Headline]:
        """The score of each SAE, beside its controls."""
        return headlines(self.groups, self.provenance)

    def plot(self) -> Any:
        """Score against k, and cause against isolation. Returns a matplotlib Figure."""
        from diagnostics.disentanglement.figures import plot_disentanglement

        return plot_disentanglement(self.groups, self.provenance)

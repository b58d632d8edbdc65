"""The result of activation patching: its table, cells, audit and maps."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import pandas as pd

from diagnostics.pairs.shares import with_intervals
from diagnostics.patching import summary
from diagnostics.results.headlines import Headline
from diagnostics.results.result import Result
from diagnostics.statistics.estimate import with_interval
from diagnostics.statistics.tables import each
from interventions.errors import ResultError


@dataclass(frozen=True)
class ActivationPatching(Result):
    """What every cell did, pair by pair, and how it was made.

    The table has a line for each pair × direction × cell × control (0: the patch itself). `tokens`: the clean prompts, then the
    corrupt ones.
    """

    NAME: ClassVar[str] = "activation_patching"
    TITLE: ClassVar[str] = "Activation patching"
    QUESTION: ClassVar[str] = "Which activations carry what differs between two prompts?"
    NOTE: ClassVar[str] = (
        "share: Σ effect / Σ (m_clean − m_corrupt) over pairs, 95 % intervals over pairs; control: the same of another source, which "
        "moves a cell as far along the difference of two other pairs; beat_control: cells that differ from their control at a false "
        "discovery rate of 5 %. denoise: clean into corrupt; noise: corrupt into clean."
    )

    @cached_property
    def cells(self) -> pd.DataFrame:
        """Shares, intervals, controls and scores of each cell (see `summary.cells`)."""
        return summary.cells(self.frame)

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """Each direction × site: cells run, cells that beat their controls, the largest share and the largest of a control."""
        return summary.families(self.cells, self.frame)

    def audit(self) -> pd.DataFrame:
        """What each cheap score makes of the cells (see `summary.audit`)."""
        return summary.audit(self.cells)

    def strongest(self, n: int = 10) -> pd.DataFrame:
        """The n largest cells of each direction × site that beat their controls."""
        return summary.strongest(self.cells, n)

    def tables(self) -> dict[str, pd.DataFrame]:
        """Families, the strongest cells, and the audit."""
        columns = ["direction", "site", "cell", "share", "share_low", "share_high", "control", "q", "dose", "n"]
        top = self.strongest()
        named = top.assign(cell=[summary.cell_name(cell) for _, cell in top.iterrows()]).reindex(columns=columns)
        title = (
            "cells that beat their controls"
            if top["q"].notna().any()
            else "largest cells (not tested: no controls, or fewer than 10 pairs)"
        )
        found = {"": summary.shown(self.groups), title: with_intervals(named)}
        audit = self.audit()
        return found | ({} if audit.empty else {"cheap scores beside the exact effect": audit})

    def headlines(self) -> Iterable[Headline]:
        """The largest cell of each direction × site, beside the largest control."""
        for group in self.groups:
            what = f"share of the {self.provenance['metric'].replace('_', ' ')} that {group['largest_at']} carries, {group['direction']}"
            null = "no controls" if pd.isna(group["null"]) else f"largest of its controls: {group['null']:.3g}"
            yield Headline(what, with_interval(group["largest"], group["largest_low"], group["largest_high"]), null)

    def plot(self) -> Any:
        """The map of the first site, both directions. Returns a matplotlib Figure."""
        from diagnostics.patching.figures import plot_maps

        (_, some), *_ = each(self.cells, ["pool", "site"])
        return plot_maps(some, self.provenance)

    def plot_beside_control(self, label: str = "END", direction: str | None = None) -> Any:
        """The heads at one position beside their controls, in the same colours; direction: default the first. Returns a matplotlib Figure.

        Raises `ResultError` where no head was measured there.
        """
        from diagnostics.patching.figures import plot_beside_control

        heads: Any = self.cells[self.cells["head"] >= 0]
        heads = heads[heads["control"].notna()]
        some = heads[(heads["label"] == label) & (heads["direction"] == (direction or self.cells["direction"].iloc[0]))]
        if some.empty:
            known = ", ".join(map(str, dict.fromkeys(heads.sort_values("position")["label"]))) or "none"
            raise ResultError(
                f"no heads beside a control at {label}; positions known: {known}; measure with sites=('z',), controls=1"
            )
        first = some[(some["pool"] == some["pool"].iloc[0]) & (some["site"] == some["site"].iloc[0])]
        return plot_beside_control(first, self.provenance)

    def plot_scores(self, site: str | None = None) -> Any:
        """The scores of a site's cells (default: the first site) beside the exact effects. Returns a matplotlib Figure.

        Raises `ResultError` where the site has no scores.
        """
        from diagnostics.patching.figures import plot_audit

        audit = self.audit()
        known = [] if audit.empty else list(dict.fromkeys(audit["site"]))
        site = site or next(iter(known), None)
        if site not in known:
            raise ResultError(
                f"no scores at {site or 'any site'}; known: {', '.join(known) or 'none'}; measure with scores=('gradient',)"
            )
        return plot_audit(self.cells[self.cells["site"] == site], audit[audit["site"] == site], self.provenance)

    def figures(self) -> dict[str, Any]:
        """A map of each site and pool; of each site the scores beside the exact effects, where there are any."""
        from diagnostics.patching.figures import plot_maps

        found = {}
        for (pool, point), some in each(self.cells, ["pool", "site"]):
            found[f"{self.NAME}_{point}{f'_{pool}' if pool else ''}"] = plot_maps(some, self.provenance)
        audit = self.audit()
        for point in [] if audit.empty else dict.fromkeys(audit["site"]):
            found[f"{self.NAME}_{point}_scores"] = self.plot_scores(point)
        return found

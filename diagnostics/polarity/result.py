"""The result of protocols A, B and C on planted pairs: its tables, statistics and figure."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import pandas as pd

from diagnostics.polarity.summary import AUROC, ERROR, ONE, numbers
from diagnostics.results.headlines import Headline
from diagnostics.results.result import BaseResult
from diagnostics.statistics.estimate import MISSING, digits


@dataclass(frozen=True)
class Polarity(BaseResult):
    """Signed and unsigned SAEs on planted antipodal pairs; no model and no text."""

    frame: pd.DataFrame
    """a line for each condition (pairs/d_model, ρ), seed, selector and sparsity: L0, `error` (share of variance not explained), shares of
    polarities `represented` and of pairs `consolidated`, calibration slopes (see `Matched`)"""
    provenance: dict[str, Any]
    """settings, seed, machine"""
    anomalies: pd.DataFrame = field(default_factory=pd.DataFrame)
    """a line for each seed, what is read (an SAE by its selector, pca, random) and budget m: AUROC of `deviation`, or of ‖x − x̂‖ (`error`)"""

    NAME: ClassVar[str] = "polarity"
    TITLE: ClassVar[str] = "Polarity"
    QUESTION: ClassVar[str] = "Does one signed latent represent both polarities of a planted direction?"
    TABLES: ClassVar[Mapping[str, str]] = {"anomalies": "polarity_anomalies.parquet"}
    NOTE: ClassVar[str] = (
        "Planted data, our reconstruction of the protocols. Median and range over seeds, no intervals. Error: share of variance not "
        "explained; slope 1: calibrated, above 1: shrunk; m: numbers read."
    )

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """Each number of the protocols: median, lowest and highest over seeds."""
        return list(numbers(self.frame, self.anomalies, self.provenance["middle"]))

    def tables(self) -> dict[str, pd.DataFrame]:
        """A table for each protocol; ranges over seeds in brackets."""
        titles = {"A": "A: polarity dial", "B": "B: directional anomalies", "C": "C: toy geometry"}
        found = {}
        for protocol, title in titles.items():
            lines = [
                {name: g[name] for name in ("what", "sae", "rho", "superposition", "m", "l0") if g[name] is not None}
                | {"median [range]": _said(g), "seeds": g["seeds"]}
                for g in self.select(protocol=protocol)
            ]
            found[title] = pd.DataFrame(lines)
        return found

    def headlines(self) -> Iterator[Headline]:
        """The errors' ratios and the pairs in one latent at the lowest ρ; AUROC with the largest budget."""
        rho = min(self.provenance["settings"]["rhos"])
        for g in self.select(what=ERROR, rho=rho):
            where = f"{g['sae']}, ρ = {rho:g}, L0 {digits(g['l0'], '.2g')}"
            yield Headline(f"unexplained variance, {where}{_range(g)}", _said(g), "1: no better than unsigned")
        most = max(self.provenance["settings"]["budgets"])
        reads = self.select(what=AUROC, m=most)
        controls = "; ".join(f"{g['sae']}: {g['median']:.3g}" for g in reads if g["sae"] in ("pca", "random"))
        for g in reads:
            if g["sae"] not in ("pca", "random"):
                what = f"AUROC of unseen polarities, {g['sae']}, {most} latents{_range(g)}"
                yield Headline(what, _said(g), f"0.5: chance; {controls}")
        least = min(self.provenance["settings"]["superpositions"])
        for g in self.select(what=ONE, rho=rho, superposition=least):
            what = f"{ONE}, {g['sae']}, pairs ÷ d_model {least:g}, ρ = {rho:g}{_range(g)}"
            yield Headline(what, _said(g), "0: unsigned latents, by construction")

    def plot(self) -> Any:
        """Error against L0, AUROC against the budget, pairs in one latent against superposition. Returns a matplotlib Figure."""
        from diagnostics.polarity.figures import plot_polarity

        return plot_polarity(self.frame, self.anomalies, self.groups, self.provenance)


def _said(g: Mapping[str, Any]) -> str:
    if not g["seeds"]:
        return MISSING
    return f"{g['median']:.3g} [{g['lowest']:.3g}, {g['highest']:.3g}]"


def _range(g: Mapping[str, Any]) -> str:
    return f" (range of {g['seeds']} seed{'' if g['seeds'] == 1 else 's'}, no interval)"

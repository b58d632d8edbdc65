"""The result of a comparison of dictionaries: its tables, statistics and figures."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import pandas as pd

from diagnostics.dictionary_comparison.summary import NOTE, columns_of, matching, tables
from diagnostics.results.headlines import Headline
from diagnostics.results.result import Result
from diagnostics.results.stored import Stored
from interventions.errors import ResultError


@dataclass(frozen=True)
class DictionaryComparison(Result):
    """Latents that dictionaries share, their norms, alignment and effects.

    The table has a line for each SAE × latent: `fired` (tokens), `frequency`, `usable` (for matching), `mean_activation`,
    `negative_share`, `share_q1` to `share_q4` (of its firing, by quartile of ‖x‖), `alignment` <w_i, d_i>, `alignment_cosine`,
    `gradient_ratio`, `error_ratio`, `error_norm_ratio`, `sensitivity_ratio` (see `EntryGradients`; fourth ÷ first quartile), `duplicates` (how many near-duplicates
    it has), `mcs_seeds` and `mcs_mean` (mean MCS to its other seeds, and to all other SAEs), `ablated_tokens`, and where it was
    ablated means over tokens of `kl`, `kl_placebo_token`, `kl_placebo_isotropic` (nats) and `delta_norm`, and `latent_weight` (how many
    live latents it represents).
    """

    partners: pd.DataFrame = field(default_factory=pd.DataFrame)
    """a line for each SAE × other SAE × latent: `class` (one of `CLASSES`, or not usable), the most similar latent there
    (`partner`) with `correlation` and `cosine`, its one-to-one `match` (−1: none), `mcs`, and `stable` (see `Partners`)"""
    duplicates: pd.DataFrame = field(default_factory=pd.DataFrame)
    """a line for each pair of near-duplicates within an SAE: cosine of decoder rows, correlation of activations"""
    ablations: pd.DataFrame = field(default_factory=pd.DataFrame)
    """a line for each ablated SAE × latent × token, with `COLUMNS` of `ablations`; empty where none were asked for"""
    lines: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """statistics in their JSON form: `saes`, `pairs`, `seeds`, `alignment`, `discovery`"""

    NAME: ClassVar[str] = "dictionary_comparison"
    NOTE: ClassVar[str] = NOTE

    TITLE: ClassVar[str] = "Dictionaries compared"
    QUESTION: ClassVar[str] = "Which latents do dictionaries share, and how do the others differ?"
    TABLES: ClassVar[Mapping[str, str]] = {
        name: f"dictionary_{name}.parquet" for name in ("partners", "duplicates", "ablations")
    }
    names = Result.saes

    @classmethod
    def _stored(cls, stored: Stored) -> dict[str, Any]:
        """The fields of a result, by name."""
        return super()._stored(stored) | {"lines": stored.summary}

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """A line for each SAE and other SAE."""
        return self.lines["pairs"]

    def as_dict(self) -> dict[str, Any]:
        """Summary and provenance, as they stand in the JSON file."""
        return {"summary": self.lines, "provenance": self.provenance}

    def pair(self, sae: str, other: str) -> dict[str, Any]:
        """The line of an SAE against another. Raises `ResultError` for a pair that is not there."""
        found = [line for line in self.groups if (line["sae"], line["other"]) == (sae, other)]
        if not found:
            raise ResultError(f"no pair {sae!r}, {other!r}; known: {', '.join(self.names)}")
        return found[0]

    def summary(self) -> pd.DataFrame:
        """A line for each SAE and other SAE: shares of latents, MCS, chance levels, firing by quartile, with the ends of intervals."""
        return pd.DataFrame([columns_of(line) for line in self.groups])

    def left_out(self) -> list[str]:
        """What was counted and how latents were matched, and what was left out; a line each."""
        p = self.provenance
        return [f"{p['counted']:,} tokens of {p['prompts']} prompts at {p['site']}", *matching(p), *super().left_out()]

    def headlines(self) -> Iterator[Headline]:
        """The share of each SAE's latents with a match in each other one."""
        for line in self.groups:
            words = f"share of the latents of {line['sae']} with a match in {line['other']} (no interval)"
            yield Headline(words, f"{line['matched_share']:.1%}", f"chance: {line['matched_share_null']:.1%}")

    def plot(self) -> Any:
        """Where matched and unique latents fire, by quartile of ‖x‖. Returns a matplotlib Figure."""
        from diagnostics.dictionary_comparison.figures import plot_quartiles

        return plot_quartiles(self.groups, self.provenance)

    def figures(self) -> dict[str, Any]:
        """Firing by quartile; MCS and matched shares; gradient ratios; alignment against MCS, and against effect where it was measured."""
        from diagnostics.dictionary_comparison.figures import (
            plot_alignment,
            plot_effect,
            plot_gradients,
            plot_stability,
        )

        p, lines = self.provenance, self.lines["alignment"]
        found = {"dictionary_quartiles": self.plot(), "dictionary_stability": plot_stability(self.groups, p)}
        if self.frame["gradient_ratio"].notna().any():
            found["dictionary_gradients"] = plot_gradients(self.frame, self.lines["saes"], p)
        if self.frame["alignment"].notna().any():
            found["dictionary_alignment"] = plot_alignment(self.frame, lines, p)
            if len(self.ablations):
                found["dictionary_effect"] = plot_effect(self.frame, lines, p)
        return found

    def tables(self) -> dict[str, pd.DataFrame]:
        """SAEs, pairs of them, seeds, alignment against MCS and effect, discovery."""
        return tables(self.lines)

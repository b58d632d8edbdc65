"""The result of N2G: its tables, statistics and figure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import pandas as pd

from diagnostics.results.headlines import Headline
from diagnostics.results.result import Result
from diagnostics.statistics.tables import few_prompts
from diagnostics.token_patterns import summary as patterns_summary


@dataclass(frozen=True)
class TokenPatterns(Result):
    """Token patterns of latents, and how well they predict where the latents are active.

    A line for each SAE × latent × polarity × `of` (latent, or its random direction) × kind of prediction; columns and kinds: `work`.
    Counts of tokens: tp (predicted and active), predicted, active; `fit_` on the fitting prompts, else on those held out; strong: tokens
    of at least half the largest z. weight: how many latents a line stands for. entries: patterns or tokens that predict.
    """

    patterns: pd.DataFrame = field(default_factory=pd.DataFrame)
    """a line for each pattern: token ids in reading order (`*`: any token), as text, how many examples it came from, counts"""
    held_out: pd.DataFrame = field(default_factory=pd.DataFrame)
    """a line for each prediction × held-out prompt in which something is predicted or active; what intervals are made of"""

    NAME: ClassVar[str] = "token_patterns"
    NOTE: ClassVar[str] = patterns_summary.NOTE
    TABLES: ClassVar[Mapping[str, str]] = {"patterns": "patterns.parquet", "held_out": "pattern_counts.parquet"}
    TITLE: ClassVar[str] = "Token patterns (N2G)"
    QUESTION: ClassVar[str] = "Which token patterns make a latent fire, and how well do they predict it?"

    @cached_property
    @few_prompts()
    def groups(self) -> list[dict[str, Any]]:
        """Of each SAE, latents and random directions, and kind: precision, recall, F1, share explained, with intervals; then differences of F1."""
        return list(patterns_summary.groups_of(self.frame, self.held_out, self.provenance["test_prompts"]))

    def headlines(self) -> Iterable[Headline]:
        """F1 of all patterns and the share that one explains, beside tokens and random directions."""
        return patterns_summary.headlines(self.groups)

    def tables(self) -> dict[str, pd.DataFrame]:
        """Scores by SAE and kind; differences of F1; the patterns that predict best."""
        return {
            "": patterns_summary.short_frame(self.groups),
            "F1, latent by latent": patterns_summary.difference_frame(self.groups),
            "Patterns of largest held-out F1, one of a latent": patterns_summary.best_patterns(self.patterns, 12),
        }

    def left_out(self) -> list[str]:
        """Latents and examples that are not measured, and what probing cost; a line each."""
        return patterns_summary.left_out(self.provenance, self.groups)

    def plot(self) -> Any:
        """Scores by kind, and each latent's F1 against that of tokens. Returns a matplotlib Figure."""
        from diagnostics.token_patterns.figures import plot_patterns

        return plot_patterns(self.groups, self.frame, self.provenance)

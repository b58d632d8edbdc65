"""The result of judging latents: its tables, statistics and figure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import pandas as pd

from diagnostics.auto_interpretation import summary as judged_summary
from diagnostics.results.headlines import Headline
from diagnostics.results.result import Result
from diagnostics.statistics.tables import few_prompts


@dataclass(frozen=True)
class AutoInterp(Result):
    """How well judges detect where latents are active, from examples of them.

    A line for each SAE × latent × polarity × judge × `of` (own explanation, or shuffled: that of `shuffled_with`): `auc`,
    `balanced_accuracy`, numbers of `active` and `inactive` snippets; bin and `frequency` of the latent, `weight` (how many it stands
    for), `alignment` <w_i, d_i> and `alignment_cosine`.
    """

    snippets: pd.DataFrame = field(default_factory=pd.DataFrame)
    """a line for each snippet × judge × `of`: the token about which it lies, whether the latent is active, the judge's score"""
    explanations: pd.DataFrame = field(default_factory=pd.DataFrame)
    """a line for each latent × judge: its explanation as JSON, and how many examples it was made of"""

    NAME: ClassVar[str] = "autointerp"
    NOTE: ClassVar[str] = judged_summary.NOTE
    TABLES: ClassVar[Mapping[str, str]] = {"snippets": "snippets.parquet", "explanations": "explanations.parquet"}
    TITLE: ClassVar[str] = "Automated interpretation"
    QUESTION: ClassVar[str] = "Can a judge who sees a latent's examples tell where it fires?"

    @cached_property
    @few_prompts()
    def groups(self) -> list[dict[str, Any]]:
        """Of each SAE and judge: detection scores, those with another latent's explanation, correlations with alignment."""
        return list(judged_summary.groups_of(self.frame, self.snippets))

    def headlines(self) -> Iterable[Headline]:
        """AUC beside that of shuffled explanations."""
        return judged_summary.headlines(self.groups)

    def tables(self) -> dict[str, pd.DataFrame]:
        """Scores by SAE and judge; correlations with alignment."""
        title = "Spearman's correlation of alignment with AUC, over latents"
        return {"": judged_summary.short_frame(self.groups), title: judged_summary.alignment_frame(self.groups)}

    def left_out(self) -> list[str]:
        """Latents that are not judged; a line each."""
        return judged_summary.left_out(self.provenance)

    def plot(self) -> Any:
        """Scores with own and shuffled explanations; AUC of each latent against its alignment. Returns a matplotlib Figure."""
        from diagnostics.auto_interpretation.figures import plot_judged

        return plot_judged(self.groups, self.frame, self.provenance)

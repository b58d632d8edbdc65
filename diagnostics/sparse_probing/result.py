"""The result of sparse probing: its table, statistics and figure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import pandas as pd

from diagnostics.results.headlines import Headline
from diagnostics.results.result import Result
from diagnostics.sparse_probing import summary as probing_summary
from diagnostics.statistics.estimate import Estimate

COLUMNS = (
    *("sae", "layer", "point", "dataset", "class", "seed", "kind", "k", "n_features", "n_train", "n_test", "n_groups"),
    *("accuracy", "accuracy_low", "accuracy_high", "balanced_accuracy", "auc", "auc_low", "auc_high"),
    *("cross_entropy", "cross_entropy_low", "cross_entropy_high", "cross_entropy_train", "latents"),
)
"""Columns of the table. seed: of the split into training and held-out texts, from 0; k: latents asked for, 0 for `all` and `raw`;
n_features: inputs of the probe; n_groups: groups of held-out texts (each text its own where the set has no groups). accuracy to
cross_entropy (nats): on held-out texts, half of them of the class, so that chance is .5 and ln 2; `_low`, `_high`: 95 %
delete-one-group jackknife, the probe held fixed. cross_entropy_train: on the training texts. latents: those chosen, in order,
separated by spaces (`selected`, `random`, `best`)."""


@dataclass(frozen=True)
class SparseProbing(Result):
    """Accuracy of probes on a few latents.

    The table has a line for each SAE × data set × class × seed × kind × k; its columns are `COLUMNS`.
    """

    held_out: pd.DataFrame = field(default_factory=pd.DataFrame)
    """a line for each SAE × data set × kind × k × text (its place in `tokens`; `group`: that of the first text of its group): in how many
    splits and classes it was held out (`n`), in how many of them classified rightly (`correct`), and its summed cross-entropy in nats;
    pooled estimates are made of it"""
    draws: pd.DataFrame = field(default_factory=pd.DataFrame)
    """a line for each SAE × data set × k × draw of kind `selected`, with selection and fit anew in each: held-out accuracy, pooled over
    classes, with shuffled labels (`draw` shuffled: over the splits of the table) and on one split (`draw` split); number: of the
    shuffle or split, from 0, the same for every SAE of a site; test_ratio: held-out texts ÷ training texts"""

    NAME: ClassVar[str] = "sparse_probing"
    NOTE: ClassVar[str] = probing_summary.NOTE
    TABLES: ClassVar[Mapping[str, str]] = {"held_out": "probed_texts.parquet", "draws": "probed_draws.parquet"}
    TITLE: ClassVar[str] = "Sparse probing"
    QUESTION: ClassVar[str] = "How well do k latents predict a class?"
    names = Result.saes

    @property
    def datasets(self) -> list[str]:
        """The sets of labelled texts."""
        return list(self.provenance["texts"])

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """Of each SAE × data set (and `mean`, over data sets) × kind × k: accuracy, cross-entropy with intervals, and by seed.

        Of `selected` also `refits`, accuracy over splits with its interval, and `shuffled`, the null: see `draws.beside`.
        """
        return probing_summary.groups(self.frame, self.held_out, self.draws)

    def difference(
        self, first: str, second: str, *, k: int = 1, kind: str = "selected", refits: bool = False
    ) -> dict[str, Estimate]:
        """Accuracy of `first` − that of `second`, by data set and their `mean`; paired by text, delete-one-group jackknife.

        refits: of `selected`, over splits with selection and fit anew, paired by split (`with_refits`); else probes are held fixed.
        Neither interval includes variation between training seeds.
        """
        if refits:
            return probing_summary.refitted_difference(self.draws, self.groups, first, second, k)
        return probing_summary.difference(self.held_out, first, second, kind, k)

    def summary(self) -> pd.DataFrame:
        """A line for each group."""
        return probing_summary.summary_frame(self.groups)

    def headlines(self) -> Iterable[Headline]:
        """Accuracy of the fewest latents, beside random ones and the whole activation."""
        return probing_summary.first_numbers(self.groups, self.provenance)

    def left_out(self) -> list[str]:
        """Chance levels, the texts, and what is missing; a line each."""
        p = self.provenance
        nulls = f"random: k={min(p['ks'])}. Probe loss: nats, the best one-latent probe; ln 2 = 0.693 is chance."
        sizes = [f"{name}: {probing_summary.described(text)}" for name, text in p["texts"].items()]
        return [nulls, *sizes, *super().left_out()]

    def plot(self) -> Any:
        """Accuracy against k, a panel a data set. Returns a matplotlib Figure."""
        from diagnostics.sparse_probing.figures import plot_probing

        return plot_probing(self.groups, self.provenance)

    def tables(self) -> dict[str, pd.DataFrame]:
        """Accuracy by SAE, data set and probe, and probe loss; that of selected latents with refits and beside shuffled labels."""
        p = self.provenance
        title = f"Selected latents over {p['refits']} splits, and beside {p['shuffles']} shuffles of the labels"
        return {"": probing_summary.short_frame(self.groups, p), title: probing_summary.null_frame(self.groups)}

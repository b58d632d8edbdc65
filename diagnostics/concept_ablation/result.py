"""The result of a feature ablation: its table, curves and figures."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import pandas as pd

from diagnostics.concept_ablation import summary as ablation_tables
from diagnostics.concept_ablation.curves import KEEP, Curve
from diagnostics.concept_ablation.equal_effects import EqualEffect, equal_effects
from diagnostics.concept_ablation.summary import FORMS, curves, first_numbers, mean_over_concepts, summaries
from diagnostics.results.headlines import Headline
from diagnostics.results.result import Result
from diagnostics.statistics.tables import lines_of

COLUMNS = (
    "sae", "layer", "point", "data", "concept", "ranking", "arm", "count", "n_latents", "text", "group", "own", "n_tokens", "n_edited",
    "n_reads", "delta_norm", "delta_square", "coherence", "kl", "target_fall", "other_square", "class_probe_clean", "class_probe",
)  # fmt: skip
"""Columns of the table. count: N; n_latents: how many there were; text: index of the text in `tokens`; group: index of the first text of
its group; own: whether it has the concept. n_tokens: tokens that count; n_edited: those with Δx ≠ 0; n_reads: tokens at which effects
are read and finite. delta_norm: mean ‖Δx‖ over the edited tokens (0: none); delta_square: mean ‖Δx‖² over all tokens that count;
coherence: ‖Σ Δx‖/Σ ‖Δx‖ over the text (nan: no token edited); Δx is after rounding to the model's dtype. kl: nats; target_fall: fall of
the target tokens' mean vocabulary-centred logit; other_square: mean squared change of the other tokens' centred logits; each a mean
over the reads (nan: none). class_probe: logit of the probe of the text's class at its mean activation (nan without classes)."""


@dataclass(frozen=True)
class FeatureAblation(Result):
    """Effects of ablating the latents of concepts, text by text.

    The table has a line for each SAE × concept × ranking × condition (`arm`) × N × text of the measuring half, with `COLUMNS`.
    """

    NAME: ClassVar[str] = "feature_ablation"
    TITLE: ClassVar[str] = "Feature ablation"
    QUESTION: ClassVar[str] = "Do a concept's latents take away the concept and nothing else?"
    NOTE: ClassVar[str] = ablation_tables.NOTE

    @property
    def concepts(self) -> list[tuple[str, str]]:
        """(data, concept) in the order given."""
        return [(data, name) for data, found in self.provenance["texts"].items() for name in found["concepts"]]

    @property
    def forms(self) -> list[str]:
        """The forms of intended and collateral effect in this result."""
        return [form for form in FORMS if form != "probe" or self.frame["class_probe"].notna().any()]

    @cached_property
    def curves(self) -> list[Curve]:
        """Intended and collateral effect at each N, of each SAE × concept × ranking × condition × form."""
        return curves(self.frame, self.forms)

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """A line for each point of each curve: effects, selectivity, ratio, with intervals, and doses."""
        return summaries(self.frame, self.curves)

    def equal_effects(self, form: str = "kl", share: float = 0.5) -> list[EqualEffect]:
        """Collateral effect of each SAE and concept at equal intended effect: see `equal_effects.equal_effects`."""
        return equal_effects([c for c in self.curves if c.form == form], share)

    def means(self, form: str = "probe") -> list[Curve]:
        """Curves of the mean over concepts, of each SAE × ranking × condition."""
        return mean_over_concepts([c for c in self.curves if c.form == form])

    def as_dict(self) -> dict[str, Any]:
        """Summary, collateral effects at equal intended effect, and provenance, as they stand in the JSON file."""
        equal = {form: [e.as_dict() for e in self.equal_effects(form)] for form in self.forms}
        return {"summary": self.groups, "at_equal_intended_effect": equal, "provenance": self.provenance}

    def headlines(self) -> Iterable[Headline]:
        """Selectivity of the selected latents, in the first form, beside that of the controls."""
        return first_numbers(self.forms[0], self.means(self.forms[0]))

    def own_caveats(self) -> list[str]:
        """Whether there is a placebo."""
        known = "placebo" in self.provenance.get("arms", ())
        return [] if known else ["no placebo: the effect of a random edit of the same norm and angle is unknown"]

    def left_out(self) -> list[str]:
        """The texts, and what is missing; a line each."""
        p = self.provenance
        said = [f"{name}: {ablation_tables.measured(found)}" for name, found in p["texts"].items()]
        untouched = f"{p['texts_untouched']} (edit, text) pairs in which nothing fired: no effect, and no pass"
        return [*said, *super().left_out(), untouched]

    def plot(self, form: str = "kl") -> Any:
        """Collateral against intended effect, a panel a concept, and selectivity at equal intended effect. A matplotlib Figure."""
        from diagnostics.concept_ablation.figures import plot_precision

        curves = [c for c in self.curves if (c.form, c.ranking) == (form, self._shown)]
        equal = [e for e in self.equal_effects(form) if e.ranking == self._shown]
        return plot_precision(curves, equal, self.provenance, form)

    def plot_counts(self) -> Any:
        """By N: the ratio of the probe form, ‖Δx‖², and the share recovered when only N latents are kept. A matplotlib Figure."""
        from diagnostics.concept_ablation.figures import plot_counts

        form, shown = "probe" if "probe" in self.forms else "kl", self._shown
        means = [c for c in self.means(form) if c.ranking == shown]
        kept = [c for c in self.means("kl") if (c.ranking, c.arm) == (shown, KEEP)]
        doses = lines_of(self.frame, arm="selected", ranking=shown)
        return plot_counts(means, kept, doses, self.provenance, form)

    @property
    def _shown(self) -> str:
        """The ranking in the figures."""
        return self.provenance["rankings"][0]

    def figures(self) -> dict[str, Any]:
        """A figure for each form, and one by N."""
        return {f"{self.NAME}_{form}": self.plot(form) for form in self.forms} | {
            f"{self.NAME}_counts": self.plot_counts()
        }

    def tables(self) -> dict[str, pd.DataFrame]:
        """Of each form: means over concepts by N, and SAEs at equal intended effect."""
        return ablation_tables.tables(
            self.frame, {form: (self.means(form), self.equal_effects(form)) for form in self.forms}
        )

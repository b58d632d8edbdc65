"""The result of an evaluation of SAEs: its tables, statistics and figures."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import pandas as pd

from diagnostics.figures.by_depth import DepthPlan, DepthPoint
from diagnostics.results.headlines import Headline
from diagnostics.results.result import Result
from diagnostics.sae_evaluation import measures as sae_measures
from diagnostics.sae_evaluation.depth import PLANS, aligned
from diagnostics.sae_evaluation.matched import AXES, Family, families, matched
from diagnostics.sae_evaluation.shift import shifts
from diagnostics.sae_evaluation.summary import (
    UNIFORM,
    alignment_of,
    as_group,
    fired,
    matched_table,
    overall_table,
    quartile_table,
    shift_table,
)
from diagnostics.sampling.counted import NO_SINKS, QUARTILES


@dataclass(frozen=True)
class SAEEvaluation(Result):
    """Reconstruction, sparsity, splicing and alignment of SAEs at their sites.

    The table has a line for each SAE × corpus × tokens (`all`, `no sinks`) × quartile of ‖x‖: `MEASURES`, each with `_low`, `_high`
    (95 % delete-one-prompt jackknife) and `_se`, and `dead_share`: of latents that fire on none of the line's `n_tokens` tokens.
    It has no interval, and falls with the number of tokens. KL and CE are of the line's tokens in the spliced prompts.
    """

    latents: pd.DataFrame = field(default_factory=pd.DataFrame)
    """a line for each SAE × corpus × latent: frequency and number of active tokens by quartile (without sinks), mean activation on active
    tokens, <w_i, d_i> (`alignment`), its cosine, the exponent a_i of a cosine score, and the first two prompts in which it fires"""
    deletions: pd.DataFrame = field(default_factory=pd.DataFrame)
    """a line for each SAE × corpus × prompt: its counted tokens, and every measure over all others' counted tokens"""

    NAME: ClassVar[str] = "sae_evaluation"
    NOTE: ClassVar[str] = (
        "95 % delete-one-prompt jackknife intervals. MSE: summed over d_model. KL and CE scores: against zero ablation, nats."
    )
    TABLES: ClassVar[Mapping[str, str]] = {"latents": "sae_latents.parquet", "deletions": "sae_deletions.parquet"}
    TITLE: ClassVar[str] = "SAE evaluation"
    QUESTION: ClassVar[str] = "How well do SAEs reconstruct the activations at their sites?"
    DEPTH: ClassVar[Mapping[str, DepthPlan]] = PLANS

    names = Result.saes

    @property
    def corpora(self) -> list[str]:
        """Names of the texts."""
        return list(self.provenance["texts"])

    @property
    def counted(self) -> str:
        """The tokens of figures and of the table of latents: `no sinks`, or `all` without a sink filter."""
        return sae_measures.counted(self.provenance)

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """The table's lines, with their measures as estimates."""
        return [as_group(row) for row in self.frame.to_dict("records")]

    def summary(self) -> pd.DataFrame:
        """A line for each SAE and corpus: all quartiles of the tokens that are no sinks."""
        overall = (self.frame["tokens"] == self.counted) & (self.frame["quartile"] == QUARTILES[0])
        return self.frame.loc[overall].reset_index(drop=True)

    @cached_property
    def alignments(self) -> list[dict[str, Any]]:
        """For each SAE statistics of <w_i, d_i>, its cosine and a_i over live latents, those that fired on any corpus."""
        return [alignment_of(name, rows) for name, rows in self.latents.groupby("sae", sort=False)]

    @property
    def main(self) -> list[dict[str, Any]]:
        """The groups of all counted tokens, a line for each SAE and corpus."""
        return self.select(quartile=QUARTILES[0], tokens=self.counted)

    @cached_property
    def families(self) -> list[Family]:
        """SAEs that differ in sparsity alone (see `families`)."""
        return families(self.provenance["saes"]) if len(self.deletions) else []

    @cached_property
    def matched(self) -> list[dict[str, Any]]:
        """Families of SAEs compared at equal L0 and at equal FVE, in the middle of their common range (see `matched`)."""
        return self.matched_at()

    def matched_at(self, *, l0: float | None = None, fve: float | None = None) -> list[dict[str, Any]]:
        """The same at an L0 and an FVE of your choice; a line says so where that is outside the common range."""
        at = {axis: q for axis, q in (("l0", l0), ("fve", fve)) if q is not None}
        return list(matched(self.families, self.main, self.deletions, at))

    @cached_property
    def shift(self) -> list[dict[str, Any]]:
        """For each SAE and further text every measure minus that on the first text, alone and against another SAE (see `shifts`)."""
        if not len(self.deletions):
            return []
        return list(shifts(self.provenance["saes"], self.main, self.deletions, self.latents))

    def as_dict(self) -> dict[str, Any]:
        """Summary, alignment, comparisons and provenance, as they stand in the JSON file."""
        found = {"summary": self.groups, "alignment": self.alignments, "matched": self.matched, "shift": self.shift}
        return found | {"provenance": self.provenance}

    def headlines(self) -> Iterator[Headline]:
        """Variance explained of each SAE on the first text; families at equal L0 and FVE; what a second text changes."""
        for g in self.select(quartile=QUARTILES[0], tokens=self.counted, corpus=self.corpora[0]):
            beside = f"the mean activation: 0; KL score {g['kl_score']}, zero ablation: 0"
            beside += f"; {g['dead_share']:.1%} of latents never fire"
            yield Headline(f"variance explained, {g['sae']} at {g['site']}", str(g["fve"]), beside)
        for m in self.matched:
            if m["corpus"] == self.corpora[0] and not m["note"]:
                what, measure = ("FVE", "fve") if m["axis"] == "l0" else ("KL score", "kl_score")
                where = f"{AXES[m['axis']]} {m['value']:.3g}, {m['family']} − {m['reference']} at {m['site']}"
                yield Headline(f"{what} at {where}", str(m[measure]), "0")
        for m in self.shift:
            if not m["against"]:
                what = f"variance explained, {m['second']} − {m['first']}, {m['sae']} at {m['site']}"
                yield Headline(what, str(m["fve"]), f"0; silent latents {m['silent']}")

    def depth_points(self, figure: str) -> list[DepthPoint]:
        """The points of one of the figures by depth in `DEPTH`."""
        return list(aligned(self.groups, self.alignments)) if figure == "sae_latents" else super().depth_points(figure)

    def tables(self) -> dict[str, pd.DataFrame]:
        """Over all quartiles; by quartile; families at equal L0 and FVE; between texts; alignment of encoder and decoder."""
        overall = [overall_table(g) for g in self.select(quartile=QUARTILES[0])]
        quartiles = [
            quartile_table(self.select(sae=name, corpus=corpus, tokens=self.counted))
            for name in self.names
            for corpus in self.corpora
        ]
        modes = f"a bimodality above {UNIFORM:.2f}, that of a uniform distribution, indicates two modes"
        compared = {}
        if self.matched:
            title = "At equal sparsity or reconstruction: family − reference, interpolated over the sweep, paired over prompts"
            compared[title] = pd.DataFrame([matched_table(m) for m in self.matched])
        for title, against in (
            ("Second text − first; silent: of as many tokens of each", False),
            ("The same, minus that of another SAE (paired over the prompts of each text)", True),
        ):
            if some := [m for m in self.shift if bool(m["against"]) == against]:
                compared[title] = pd.DataFrame([shift_table(m) for m in some])
        return {
            "": pd.DataFrame(overall),
            f"By quartile of ‖x‖, {self.counted if self.counted == NO_SINKS else 'all tokens'}": pd.DataFrame(
                quartiles
            ),
            **compared,
            f"Alignment <w, d> of live latents; {modes}": pd.DataFrame(self.alignments),
        }

    def plot(self, tokens: str | None = None) -> Any:
        """FVE and KL score of each SAE by quartile. Returns a matplotlib Figure.

        tokens: `no sinks` (default where there is a sink filter) or `all`.
        """
        from diagnostics.sae_evaluation.figures import plot_evaluation

        return plot_evaluation(self.groups, self.provenance, tokens or self.counted)

    def figures(self) -> dict[str, Any]:
        """FVE and KL score; sweeps of sparsity; histograms of alignment, and of exponents where an SAE has them."""
        from diagnostics.sae_evaluation.figures import plot_alignment, plot_exponents
        from diagnostics.sae_evaluation.sweep_figures import plot_sweeps

        found, site = {self.NAME: self.plot()}, {g["sae"]: g["site"] for g in self.groups}
        if self.families:
            curves = {f.name: [g for name in f.saes for g in self.main if g["sae"] == name] for f in self.families}
            found["sae_sweeps"] = plot_sweeps(curves, self.matched, self.provenance)
        facts = [g | {"site": site[g["sae"]]} for g in self.alignments]
        latents = self.latents.assign(live=fired(self.latents)).drop_duplicates(["sae", "latent"])
        if latents["alignment"].notna().any():
            found["sae_alignment"] = plot_alignment(latents, facts, self.provenance)
        if latents["exponent"].notna().any():
            found["sae_exponents"] = plot_exponents(latents, facts, self.provenance)
        return found

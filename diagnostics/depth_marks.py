"""What a result says at each depth: its own statistics, taken from it as they stand, for the panels of a figure."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from diagnostics.atlas import CausalAtlas
from diagnostics.contests import QUARTILES, WinRateReport
from diagnostics.direction_patching import DirectionNorm
from diagnostics.dosing import DoseResponse, shown_dose
from diagnostics.norm_exponent import CLEAR
from diagnostics.projections import ProjectionEffects
from diagnostics.sae_evaluation import SAEEvaluation
from diagnostics.sae_measures import QUARTILES as EVALUATED
from diagnostics.statistics import Estimate, FiellerInterval
from diagnostics.study import TRAINED
from diagnostics.style import EDIT_LABELS
from diagnostics.unit_norm import UnitNorm

PLACEBOS = ("placebo_token", "placebo_isotropic")


@dataclass(frozen=True)
class Mark:
    """One point of a figure by depth."""

    panel: str
    """key of the panel, a column of the figure"""
    series: str
    """what the colour says: an edit, a context, an SAE's name, a score"""
    layer: int
    point: str
    """of the site"""
    estimate: Estimate | FiellerInterval
    row: str = ""
    """key of the row of panels: a context, a corpus, an SAE"""
    network: str = TRAINED
    role: str = "main"
    """`main`, or the placebo whose value it is: what the same statistic is where a direction has no meaning"""
    noise: bool = False
    """the effect lies within 10 times the noise floor"""
    run: str = ""
    """name of the run within a result that holds several"""
    settings: dict[str, Any] = field(default_factory=dict)
    """what else must agree for two marks to stand in one panel"""


def _plain(value: float, n: int, sd: float = np.nan) -> Estimate:
    """A number without an interval, or with the spread of what it is the mean of."""
    return Estimate(value, value - sd, value + sd, np.nan, n, 0)


def patched(result: DirectionNorm) -> Iterator[Mark]:
    """Mean KL of each patch and of its placebos; of untrained networks, the patches alone."""
    panels = {"direction": ("direction", "placebo_token", "placebo_direction"), "norm": ("norm", "placebo_norm")}
    for g in _random_pairs(result):
        for panel, edits in panels.items():
            for edit in edits if g["model"] == TRAINED else edits[:1]:
                kl = g["edits"][edit]["mean_kl"]
                noise = kl.value <= CLEAR * g["noise_floor"]
                yield Mark(panel, edit, g["layer"], g["point"], kl, g["context"], g["model"], noise=noise)


def patch_ratios(result: DirectionNorm) -> Iterator[Mark]:
    """Direction ÷ norm (median over pairs), and each patch over its placebos (ratio of mean KLs)."""
    panels = ("direction ÷ norm", "norm ÷ placebo_norm", "direction ÷ placebo_token", "direction ÷ placebo_direction")
    for g in _random_pairs(result):
        for panel in panels:
            ratio, top = g["ratios"][panel], g["edits"][panel.split(" ÷ ")[0]]["mean_kl"].value
            estimate = ratio["median"].estimate if panel == panels[0] else ratio["of_means"]
            noise = top <= CLEAR * g["noise_floor"]
            yield Mark(panel, g["context"], g["layer"], g["point"], estimate, network=g["model"], noise=noise)


def _random_pairs(result: DirectionNorm) -> list[dict[str, Any]]:
    return [g for g in result.groups if g["pair_set"] == "random"]


def unit_norms(result: UnitNorm) -> Iterator[Mark]:
    """KL of forcing norm 1 and of a rotation by the same distance, one token or all; and the one over the other."""
    for g in result.groups:
        floor = CLEAR * g["noise_floor"]
        for row, end in (("alone", ""), ("everywhere", "_everywhere")):
            for edit in ("unit_norm", "rotation"):
                kl = g[edit + end]
                yield Mark("kl", edit, g["layer"], "resid_post", kl, row, g["model"], noise=kl.value <= floor)
            ratio, noise = g[f"unit_norm{end} ÷ rotation{end}"], g["unit_norm" + end].value <= floor
            yield Mark("ratio", "unit_norm", g["layer"], "resid_post", ratio, row, g["model"], noise=noise)


def dosed(result: DoseResponse) -> Iterator[Mark]:
    """At one dose: KL of each edit over that of a random rotation, and direct over total effect."""
    dose = shown_dose(result.provenance["doses"])
    for g in result.groups:
        if not np.isclose(g["dose"], dose):
            continue
        for edit in EDIT_LABELS if g["model"] == TRAINED else ("toward_token", "norm_up"):
            found = g["edits"][edit]
            noise = found["mean_kl"].value <= CLEAR * g["noise_floor"]
            values = {"direct ÷ total": found["direct_over_total"]}
            if edit != "isotropic":
                values["÷ isotropic"] = g["ratios"][f"{edit} ÷ isotropic"]
            for panel, value in values.items():
                yield Mark(panel, edit, g["layer"], g["point"], value, g["context"], g["model"], noise=noise,
                           settings={"dose": dose})  # fmt: skip


def won(report: WinRateReport) -> Iterator[Mark]:
    """Win rate of the cosine over the inner product, overall and within quartiles of ‖x‖, and its placebos'."""
    for c in report.contests:
        place, p = c.place, report.runs[c.run].provenance
        how = {"sampling": p["sampling"], "edit": c.rates.edit, "a win is": "r > r" if c.rates.signed else "|r| > |r|"}
        how["scores"] = "absolute" if c.rates.absolute else "with their sign"
        for rates in (c.rates.main, *(c.rates.placebos.values() if place["model"] == TRAINED else ())):
            for panel, rate in zip(QUARTILES, (rates.overall, *rates.quartiles), strict=True):
                role = "main" if rates is c.rates.main else rates.edit
                yield Mark(panel, place["sae"], place["layer"], place["point"], rate.estimate, place["context"],
                           place["model"], role, run=c.run, settings=how)  # fmt: skip


def exponents(result: ProjectionEffects) -> Iterator[Mark]:
    """The norm exponent: across tokens, of the same token rescaled, of the placebo, and what a cosine SAE learned."""
    how = {"sampling": result.provenance["sampling"], "edit": result.main}
    for g in result.groups:
        values: dict[str, Any] = {name: way.a for name, way in g["exponents"].items()}
        if g["learned_a"] is not None and g["model"] == TRAINED:
            values["learned"] = _plain(g["learned_a"]["mean"], g["n_latents"])
        for panel in ("observational", "placebo_token", "interventional", "learned"):
            if panel in values:
                yield Mark(
                    panel, g["sae"], g["layer"], g["point"], values[panel], g["context"], g["model"], settings=how
                )


def evaluated(result: SAEEvaluation) -> Iterator[Mark]:
    """Fraction of variance explained, KL score and share of latents that never fire, over all tokens counted."""
    how = {
        "tokens": result.counted,
        "sinks in the spliced stream": "replaced" if result.provenance["splice_sinks"] else "left",
    }
    for g in result.select(tokens=result.counted, quartile=EVALUATED[0]):
        values = {"fve": g["fve"], "kl_score": g["kl_score"], "dead_share": _plain(g["dead_share"], g["d_sae"])}
        for panel, value in values.items():
            yield Mark(panel, g["sae"], g["layer"], g["point"], value, g["corpus"], settings=how)


def aligned(result: SAEEvaluation) -> Iterator[Mark]:
    """Alignment <w_i, d_i>, cosine of both, and exponent a_i: mean over live latents ± standard deviation over them."""
    place = {g["sae"]: g for g in result.groups}
    for line in result.alignments:
        g = place[line["sae"]]
        for panel in ("alignment", "cosine", "exponent"):
            if np.isfinite(line[panel]):
                value = _plain(line[panel], line["live"], line[f"{panel} sd"])
                yield Mark(panel, line["sae"], g["layer"], g["point"], value)


def removed(result: CausalAtlas) -> Iterator[Mark]:
    """Mean KL of removing one latent, that over its placebo's, and the share of all effect in one row of a hundred."""
    for g in result.groups:
        values = {"kl": g["kl"], "÷ placebo": g["kl_over_placebo"]}
        values["share"] = _plain(g["share_of_largest_hundredth"], g["rows"])
        for panel, value in values.items():
            if value is not None:
                noise = panel == "kl" and g["kl"].value <= CLEAR * g["noise_floor"]
                yield Mark(panel, g["sae"], g["layer"], g["point"], value, noise=noise)


def scored(result: CausalAtlas) -> Iterator[Mark]:
    """How well each cheap score finds a latent's effect, a row of panels for each SAE."""
    for g in result.groups:
        for score, found in g["scores"].items():
            for panel in ("rank", "recall", "false_negatives"):
                yield Mark(panel, score, g["layer"], g["point"], found[panel], g["sae"])
        yield Mark("recall", "chance", g["layer"], g["point"], _plain(g["chance_recall"], g["scored_tokens"]), g["sae"])

"""Which figures by depth there are: what each is drawn from, its panels and axes, and what its caption must say."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from diagnostics import depth_marks
from diagnostics.atlas import CausalAtlas
from diagnostics.atlas_summary import FIRST
from diagnostics.atlas_summary import LABELS as SCORES
from diagnostics.contests import WinRateReport
from diagnostics.depth_marks import Mark
from diagnostics.direction_patching import DirectionNorm
from diagnostics.dosing import DoseResponse
from diagnostics.projections import ProjectionEffects
from diagnostics.results import Shown
from diagnostics.sae_evaluation import SAEEvaluation
from diagnostics.style import COLOURS, EDIT_COLOURS, EDIT_LABELS, EDIT_MARKERS, LABELS, MARKERS, REFERENCE, SCORE_LOOKS
from diagnostics.unit_norm import UnitNorm

Looks = dict[str, tuple[str, str]]
KL, TIMES = "mean KL(clean ‖ intervened), nats", "ratio of mean KLs"
LOWEST_RATIO = 1e-3
JACKKNIFE = "95 % delete-one-prompt jackknife intervals"
PATCHES: Looks = {name: (COLOURS[name], MARKERS[name]) for name in MARKERS}
CONTEXTS: Looks = {"in_place": (COLOURS["in_place"], "o"), "single_token": (COLOURS["single_token"], "s")}
DOSED: Looks = {name: (EDIT_COLOURS[name], EDIT_MARKERS[name]) for name in EDIT_COLOURS}
UNIT: Looks = {"unit_norm": DOSED["norm_up"], "rotation": DOSED["isotropic"]}
PATCH_LABELS = {name: label.strip() for name, label in LABELS.items()} | {
    "placebo_token": "direction's placebo, tangent between tokens",
    "placebo_direction": "direction's placebo, isotropic tangent",
    "placebo_norm": "norm's placebo: rotation by the same distance",
}


@dataclass(frozen=True)
class Panel:
    """A column of a figure."""

    title: str
    label: str
    """of the y axis, with its unit"""
    log: bool = False
    lines: tuple[float, ...] = ()
    """special values: a ratio of 1, a win rate of ½, the exponents of cosine and inner product"""
    lowest: float = -math.inf
    """a value at or below is drawn open at the bottom: an axis that holds it would show nothing else"""
    limits: tuple[float, float] | None = None
    """beyond which the y axis does not go; with `whole` it goes there wherever values lie"""
    whole: bool = False


@dataclass(frozen=True)
class Plan:
    """A figure by depth."""

    kind: type[Shown]
    """the results it is drawn from"""
    marks: Callable[[Any], Iterator[Mark]]
    what: str
    """the figure's sentence"""
    panels: dict[str, Panel]
    unit: str
    """what n counts"""
    looks: Looks | None = None
    """colour and marker of each series; None: series are SAEs"""
    labels: dict[str, str] | None = None
    bars: str = JACKKNIFE
    done: str = "edited"
    """what is done to a block's output"""
    rows_are_saes: bool = False
    """a row of panels for each SAE"""
    one_scale: bool = False
    """all panels share the y axis"""
    placebo: str = ""
    """what the broad bars of placebos mean"""


_QUARTERS = {
    q: Panel(f"quartile {q} of ‖x‖", "win rate of the cosine", lines=(0.5,), limits=(-0.04, 1.04), whole=True)
    for q in "1234"
}
_A = {"label": "norm exponent a", "lines": (0, 1), "limits": (-1.6, 2.6)}
PLANS: dict[str, Plan] = {
    "direction_norm_kl": Plan(
        DirectionNorm,
        depth_marks.patched,
        "Mean KL of patching the direction or the norm of another token, beside random edits of the same norm and angle, or distance",
        {
            "direction": Panel("direction patch", KL, log=True, lowest=0),
            "norm": Panel("norm patch", KL, log=True, lowest=0),
        },
        "pairs",
        PATCHES,
        PATCH_LABELS,
    ),
    "direction_norm_ratio": Plan(
        DirectionNorm,
        depth_marks.patch_ratios,
        "What a direction patch does over what a norm patch does (median over pairs; doses differ), and each over random edits of the same "
        "dose (ratios of mean KLs)",
        {
            "direction ÷ norm": Panel(
                "direction ÷ norm, unequal doses", "median ratio of KLs", log=True, lines=(1,), lowest=LOWEST_RATIO
            ),
            "norm ÷ placebo_norm": Panel(
                "norm ÷ rotation, same distance", TIMES, log=True, lines=(1,), lowest=LOWEST_RATIO
            ),
            "direction ÷ placebo_token": Panel(
                "direction ÷ placebo between tokens", TIMES, log=True, lines=(1,), lowest=LOWEST_RATIO
            ),
            "direction ÷ placebo_direction": Panel(
                "direction ÷ isotropic placebo", TIMES, log=True, lines=(1,), lowest=LOWEST_RATIO
            ),
        },
        "pairs",
        CONTEXTS,
        LABELS,
    ),
    "unit_norm": Plan(
        UnitNorm,
        depth_marks.unit_norms,
        "Activations forced to norm 1, and turned by the same distance with their norm kept",
        {
            "kl": Panel("effect", KL, log=True, lowest=0),
            "ratio": Panel("norm 1 ÷ rotation", TIMES, log=True, lines=(1,), lowest=LOWEST_RATIO),
        },
        "tokens",
        UNIT,
        {"unit_norm": "norm forced to 1", "rotation": "turned by the same distance"},
    ),
    "dose_response": Plan(
        DoseResponse,
        depth_marks.dosed,
        "At equal length of Δx: mean KL over that of a rotation towards a random direction; effect of the change carried straight to the "
        "unembedding over its whole effect (above 1 later blocks undo it, below they amplify it)",
        {
            "÷ isotropic": Panel("÷ random rotation", TIMES, log=True, lines=(1,), lowest=LOWEST_RATIO),
            "direct ÷ total": Panel("direct ÷ total effect", TIMES, log=True, lines=(1,), lowest=LOWEST_RATIO),
        },
        "tokens",
        DOSED,
        EDIT_LABELS | {"norm_down": "norm down"},
    ),
    "win_rate": Plan(
        WinRateReport,
        depth_marks.won,
        "Share of latents whose KL correlates more with the cosine than with the inner product",
        {"all": Panel("all norms", "win rate of the cosine", lines=(0.5,), limits=(-0.04, 1.04), whole=True)}
        | _QUARTERS,
        "(latent, token) pairs",
        done="ablated",
        placebo="placebos of the same dose and no meaning, the rate's null",
    ),
    "norm_exponent": Plan(
        ProjectionEffects,
        depth_marks.exponents,
        "Norm exponent a of what removing a latent's direction does: 0 where the cosine predicts the effect, 1 where the inner "
        "product does; across tokens, of a placebo of the same dose, of the same token rescaled, and as the SAE learned it",
        {
            "observational": Panel("across tokens", **_A),
            "placebo_token": Panel("placebo, across tokens", **_A),
            "interventional": Panel("same token rescaled", **_A),
            "learned": Panel("learned by the SAE", **_A),
        },
        "(latent, token) pairs",
        bars="95 % Fieller intervals from the delete-one-prompt jackknife, latents held fixed; learned: mean over latents, no sample",
        done="ablated",
        one_scale=True,
    ),
    "sae_evaluation": Plan(
        SAEEvaluation,
        depth_marks.evaluated,
        "Reconstruction, what the model loses with the SAE in its stream, and latents that fire on no counted token",
        {
            "fve": Panel("variance explained", "fraction of variance explained"),
            "kl_score": Panel("spliced into the stream", "KL score: 1 − KL / KL of zero ablation"),
            "dead_share": Panel("never fires", "share of latents"),
        },
        "tokens",
        bars=f"{JACKKNIFE}; shares of latents count every latent and have none; seeds of training are points",
        done="read by the SAE",
    ),
    "sae_latents": Plan(
        SAEEvaluation,
        depth_marks.aligned,
        "Live latents' encoder and decoder rows, and exponents of cosine scores",
        {
            "alignment": Panel("alignment", "⟨wᵢ, dᵢ⟩"),
            "cosine": Panel("cosine of encoder and decoder", "cos(wᵢ, dᵢ)"),
            "exponent": Panel("exponent of ‖x_c‖", "exponent aᵢ", lines=(0,)),
        },
        "live latents",
        bars="± one standard deviation over live latents, which are no sample",
        done="read by the SAE",
    ),
    "atlas_effects": Plan(
        CausalAtlas,
        depth_marks.removed,
        "Every active latent of every token removed once: its mean effect, over that of a random edit of the same dose, and the share of "
        "all effect that the hundredth with the largest effects holds",
        {
            "kl": Panel("one latent removed", KL, log=True, lowest=0),
            "÷ placebo": Panel("÷ its placebo", TIMES, log=True, lines=(1,), lowest=LOWEST_RATIO),
            "share": Panel("largest hundredth", "share of the summed KL", limits=(0, 1), whole=True),
        },
        "ablations",
        bars=f"{JACKKNIFE}; shares have none",
        done="edited",
    ),
    "atlas_scores": Plan(
        CausalAtlas,
        depth_marks.scored,
        "How well a cheap score of a latent at a token finds the effect of removing it",
        {
            "rank": Panel("rank correlation with KL", "Spearman's ρ among a token's latents", lines=(0,)),
            "recall": Panel(
                f"the {FIRST} largest effects found",
                f"share among the {FIRST} largest scores",
                limits=(0, 1),
                whole=True,
            ),
            "false_negatives": Panel(
                "large effects missed", "share scored below the median", limits=(0, 0.6), lines=(0.5,), whole=True
            ),
        },
        "tokens or ablations",
        {**SCORE_LOOKS, "chance": (REFERENCE, "_")},
        {**SCORES, "chance": "chance"},
        rows_are_saes=True,
        done="edited",
    ),
}
"""Every figure by depth, by name."""

"""The contents of a latent's card."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd
from jaxtyping import Float
from numpy import ndarray

from diagnostics.cards.effects import EffectSummary
from diagnostics.cards.examples import Example
from diagnostics.cards.neighbours import Neighbour
from diagnostics.statistics.estimate import Estimate
from interventions.direct_logits import TokenLogit


class Histogram(NamedTuple):
    """Counts between edges."""

    edges: Float[ndarray, "edge"]
    counts: Float[ndarray, "bin"]


@dataclass(frozen=True)
class CardContent:
    """One latent of an SAE on a text. Effects are of subtracting z·d at one token; the SAE's error is kept."""

    sae: str
    """the SAE's name"""
    kind: str
    """score → selector"""
    model: str
    site: str
    latent: int
    chosen_by: str
    """`number`; `frequent`: one of those that fire most often on this text; `top`: one of the largest summed KL at the even prompts of
    the atlas; its effects, effect_rows and rank are then of the other prompts alone, everything else of the whole text"""
    d_sae: int
    frequency: Estimate
    """share of the usable tokens on which it is active (z ≠ 0), with its jackknife interval"""
    n_active: int
    """usable tokens on which it is active"""
    n_tokens: int
    """usable tokens"""
    active_left_out: int
    """tokens on which it is active that do not count (first of a prompt, special, sinks)"""
    z_mean: float
    """mean |z| where it is active; nan for a dead latent"""
    z_range: tuple[float, float]
    """least and largest z where it is active; nan for a dead latent"""
    decoder_norm: float
    """‖d‖"""
    alignment: float
    """<w, d>, w the encoder row as the score uses it; nan where the encoder has no rows"""
    alignment_cosine: float
    """cos(w, d)"""
    learned_a: float | None
    """exponent of ‖x_c‖ in a cosine-scored SAE; None for other scores"""
    quartile_shares: tuple[Estimate, ...]
    """of its firing, by quartile of ‖x‖ over the usable tokens; .25 each for a latent that does not depend on the norm"""
    z_histogram: Histogram
    """of z where it is active"""
    norm_histograms: tuple[Histogram, Histogram]
    """of ‖x‖: where it is active, and of all usable tokens; density, logarithmic bins"""
    examples: tuple[Example, ...]
    promoted: tuple[TokenLogit, ...]
    """tokens whose logits its decoder row raises most: see `direct_logits`; for z = z_mean (a dead latent: z = 1)"""
    suppressed: tuple[TokenLogit, ...]
    """tokens whose logits it lowers most"""
    effects: EffectSummary | None
    """None for a dead latent, and for one chosen by `top` that is active at none of the other prompts"""
    effect_rows: pd.DataFrame
    """usable tokens where it is active, drawn uniformly: prompt, position and the columns of `measured`"""
    neighbours: tuple[Neighbour, ...]
    """in the same SAE and in others"""
    atlas: dict[str, Any] | None
    """the latent's rank by summed KL in the atlas, its share of the sum, numbers of joined rows, and the largest difference of KLs that
    were measured again; None without an atlas"""
    provenance: dict[str, Any]
    """model, text, settings, counts of what was left out, which path ran and how exact it was"""

    @property
    def dead(self) -> bool:
        """Active at no usable token."""
        return self.n_active == 0

    def line(self) -> str:
        """The card in one line, for a terminal."""
        if self.dead:
            return f"latent {self.latent}: dead on this text ({self.n_tokens} tokens)"
        e = self.effects
        others = " at prompts that did not choose it" if self.chosen_by == "top" else ""
        effect = (
            "not active"
            if e is None
            else f"removing it KL {e.kl} nats at ‖Δx‖/‖x‖ {e.dose}, {e.placebo_ratio} × its placebo"
        )
        return (
            f"latent {self.latent}: fires on {self.frequency} of {self.n_tokens} tokens; {effect}{others}; "
            f"promotes {', '.join(repr(t.token) for t in self.promoted[:3])}"
        )

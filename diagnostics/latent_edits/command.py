"""Latents of SAEs edited one by one and together: interactions, concentration, steering, substitution, sparsity of effects."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any, Literal

import tyro

from diagnostics.commands import command
from diagnostics.commands.ranges import FiniteFloat, NonNegativeInt, PositiveInt, Range
from diagnostics.commands.sae_inputs import SAERunOptions
from diagnostics.latent_edits.choices import COEFFICIENTS
from interventions.errors import MechdiagError

PARTS = {
    "pairs": ("interactions", "Interactions", "interactions"),
    "matrix": ("interactions", "Interactions", "interactions"),
    "concentration": ("concentration", "Concentration", "causal_concentration"),
    "steering": ("steering", "Steering", "latent_steering"),
    "substitution": ("substitution", "Substitutions", "atom_substitution"),
    "sparsity": ("sparsity", "AblationSparsity", "ablation_sparsity"),
    "polarity": ("polarities", "PolarityEffects", "polarity_effects"),
}
"""Module, kind of result and function of each part."""
_OF_ANY = tuple(part for part in PARTS if part != "polarity")


def part_of(name: str) -> tuple[Any, Callable[..., Any]]:
    """The kind of result and the function of a part."""
    home, kind, function = PARTS[name]
    module = import_module(f"diagnostics.latent_edits.{home}")
    return getattr(module, kind), getattr(module, function)


@dataclass(frozen=True, kw_only=True)
class LatentEditsOptions(SAERunOptions):
    """What do an SAE's latents do, alone and together?

    Every edit is compared with random edits of equal dose. Parts:
      pairs: do two latents active at a token act independently, in the logits, beside pairs of similar geometry?
      matrix: the same for the most frequent latents of each SAE, at tokens where two are active, as a heat map.
      concentration: how many of a token's latents carry its effect, and do single effects add up?
      steering: latents added at increasing strength, alone and jointly.
      substitution: another decoder direction in a latent's place, against deletion of equal dose.
      sparsity: how many logits, and how many later tokens, an ablation changes.
      polarity: do the two polarities of a signed latent do opposite things? (of SAEs with signed latents; not by default)

    Each part writes a table (Parquet), its tokens, a summary with provenance (JSON) and figures into a folder of its name in --out.

    Examples:
      scripts/interactions.py --parts pairs concentration --out results/interactions
      scripts/interactions.py --parts steering --latent 12 345 --saes cosine \\
          --out results/steering
    """

    layers: tuple[NonNegativeInt, ...] = (15,)
    """blocks, 0-based, for kinds in --saes; an SAE given by name has its own block"""
    parts: tuple[str, ...] = _OF_ANY
    """any of pairs, matrix, concentration, steering, substitution, sparsity, polarity"""
    n_prompts: PositiveInt = 60
    """prompts sampled from the text"""
    n_tokens: PositiveInt = 100
    """pairs, concentration, steering: tokens, the same for all SAEs; matrix: tokens for each SAE, where two of its latents are active"""
    per_token: Annotated[int, Range(2)] = 8
    """pairs, matrix: active latents of a token whose pairs are measured"""
    matrix_latents: Annotated[int, Range(2)] = 30
    """matrix: number of most frequent latents"""
    min_tokens: PositiveInt = 5
    """matrix: tokens at which both latents of a pair must be active"""
    latents: PositiveInt = 24
    """steering, substitution, sparsity, polarity: latents of each SAE, sampled uniformly from those that fire"""
    latent: tuple[NonNegativeInt, ...] = ()
    """these latents, in place of a number"""
    tokens_per_latent: PositiveInt = 4
    """substitution, sparsity: tokens for each latent where it is active; polarity: of each polarity, and where it is silent"""
    coefficients: tuple[FiniteFloat, ...] = COEFFICIENTS
    """steering: times the latent's typical activation, or ||x||"""
    unit: Literal["activation", "norm"] = "activation"
    """steering: activation (mean |z| where active) or norm (||x||)"""
    ahead: PositiveInt = 16
    """sparsity: positions that are measured, from the edited one on"""
    batch_rows: Annotated[int | None, tyro.conf.Suppress] = None

    def check(self, files: tuple[str, ...]) -> None:
        from diagnostics.latent_edits.steering import check_coefficients
        from interventions.files import claim_run

        if not self.parts or any(part not in PARTS for part in self.parts):
            raise MechdiagError(f"--parts {' '.join(self.parts)}; known: {', '.join(PARTS)}")
        check_coefficients(self.coefficients)
        super().check(files)
        for part in self.parts:
            claim_run(self.out / part, part_of(part)[0].files(), self.overwrite)

    def asked(self, part: str) -> dict[str, Any]:
        """Keyword arguments of a part's diagnostic."""
        names = ["sink_filter", "seed", "path", "overwrite"]
        if part in ("pairs", "matrix"):
            names += ["per_token", "min_tokens"]
        if part in ("pairs", "matrix", "concentration", "steering"):
            names += ["n_tokens"]
        if part in ("substitution", "sparsity", "polarity"):
            names += ["tokens_per_latent"]
        if part == "steering":
            names += ["coefficients", "unit"]
        own = self.named(*names) | {"folder": self.out / part}
        if part == "matrix":
            own["latents"] = self.matrix_latents
        if part in ("steering", "substitution", "sparsity", "polarity"):
            own["latents"] = list(self.latent) or self.latents
        return own | ({"horizon": self.ahead} if part == "sparsity" else {})


def main(options: LatentEditsOptions) -> command.Document:
    """Run the command."""
    options.check(())
    saes = options.load_saes()
    given = (*options.load(), saes)
    return {
        part: options.measure(part, "item", part_of(part)[1], *given, **options.asked(part))
        for part in dict.fromkeys(options.parts)
    }


def run() -> None:
    """The command line of `scripts/interactions.py`."""
    command.run(LatentEditsOptions, main)

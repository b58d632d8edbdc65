"""Latents of SAEs edited one by one and together: interactions, concentration, steering, substitution, sparsity of effects."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from diagnostics.commands import command
from diagnostics.commands.sae_inputs import SAEInputs
from diagnostics.latent_edits.concentration import Concentration, causal_concentration
from diagnostics.latent_edits.interactions import Interactions, interactions
from diagnostics.latent_edits.sparsity import AblationSparsity, ablation_sparsity
from diagnostics.latent_edits.steering import COEFFICIENTS, UNITS, Steering, check_coefficients, latent_steering
from diagnostics.latent_edits.substitution import Substitutions, atom_substitution
from diagnostics.results.result import Result
from interventions.errors import MechdiagError
from interventions.files import claim_run

PARTS: dict[str, tuple[type[Result], Callable[..., Any]]] = {
    "pairs": (Interactions, interactions),
    "matrix": (Interactions, interactions),
    "concentration": (Concentration, causal_concentration),
    "steering": (Steering, latent_steering),
    "substitution": (Substitutions, atom_substitution),
    "sparsity": (AblationSparsity, ablation_sparsity),
}


@dataclass(frozen=True, kw_only=True)
class LatentEditsOptions(SAEInputs):
    """What do an SAE's latents do, alone and together?

    Every edit stands beside random ones of equal dose. Parts:
      pairs: do two latents active at a token act independently, in the logits, beside pairs of like geometry?
      matrix: the same of the most frequent latents of each SAE, where two of them meet, as a heat map.
      concentration: how many of a token's latents carry its effect, and do single effects add up?
      steering: latents added more and more strongly, alone and jointly.
      substitution: another atom in a latent's place against deletion of equal dose.
      sparsity: how many logits, and how many later tokens, an ablation reaches.

    Each part writes a table (Parquet), its tokens, a summary with provenance (JSON) and figures into a folder of its name in --out.

    Examples:
      scripts/interactions.py --parts pairs concentration --out results/interactions
      scripts/interactions.py --parts steering --latent 12 345 --saes cosine \\
          --out results/steering
    """

    layers: tuple[int, ...] = (15,)
    """blocks that kinds in --saes are taken of, 0-based; SAEs that are named say themselves where they belong"""
    parts: tuple[str, ...] = tuple(PARTS)
    """any of pairs, matrix, concentration, steering, substitution, sparsity"""
    n_prompts: int = 60
    """prompts drawn from the text"""
    n_tokens: int = 100
    """tokens that pairs, concentration and steering ask at, the same for all SAEs; matrix: of each SAE, where two of its latents meet"""
    per_token: int = 8
    """pairs, matrix: all pairs of so many active latents of a token"""
    matrix_latents: int = 30
    """matrix: so many of the most frequent latents"""
    min_tokens: int = 5
    """matrix: tokens at which a pair must meet"""
    latents: int = 24
    """steering, substitution, sparsity: latents of each SAE, all that fire equally likely"""
    latent: tuple[int, ...] = ()
    """which latents, in place of so many"""
    tokens_per_latent: int = 4
    """substitution, sparsity: tokens of each latent where it is active"""
    coefficients: tuple[float, ...] = COEFFICIENTS
    """steering: times the latent's typical activation, or ||x||"""
    unit: str = "activation"
    """steering: activation (mean |z| where active) or norm (||x||)"""
    ahead: int = 16
    """sparsity: positions that are read, from the edited one on"""
    context: Annotated[str, tyro.conf.Suppress] = "in_place"
    null_model: Annotated[str, tyro.conf.Suppress] = "none"
    null_seeds: Annotated[int, tyro.conf.Suppress] = 3
    batch_rows: Annotated[int | None, tyro.conf.Suppress] = None

    def check(self, files: tuple[str, ...]) -> None:
        """What can be wrong without a model. Raises `MechdiagError`."""
        if not self.parts or any(part not in PARTS for part in self.parts):
            raise MechdiagError(f"--parts {' '.join(self.parts)}; known: {', '.join(PARTS)}")
        if self.unit not in UNITS:
            raise MechdiagError(f"--unit {self.unit}; known: {', '.join(UNITS)}")
        if (self.context, self.null_model, self.batch_rows) != ("in_place", "none", None):
            raise MechdiagError(
                "effects are read in place, of the model as it is: leave context, null_model and batch_rows"
            )
        least = {"n_prompts": 1, "n_tokens": 1, "per_token": 2, "matrix_latents": 2, "min_tokens": 1, "latents": 1,
                 "tokens_per_latent": 1, "ahead": 1}  # fmt: skip
        for name, n in least.items():
            if getattr(self, name) < n:
                raise MechdiagError(f"--{name.replace('_', '-')} {getattr(self, name)}; expected {n} or more")
        if min(self.latent, default=0) < 0:
            raise MechdiagError(f"--latent {' '.join(map(str, self.latent))}; latents are numbered from 0")
        check_coefficients(self.coefficients)
        super().check(())
        for part in self.parts:
            claim_run(self.out / part, PARTS[part][0].files(), self.overwrite)

    def asked(self, part: str) -> dict[str, Any]:
        """Keyword arguments of a part's diagnostic."""
        own: dict[str, Any] = {
            "sink_filter": self.sink_filter or None, "seed": self.seed, "path": self.path, "folder": self.out / part,
            "overwrite": self.overwrite,
        }  # fmt: skip
        if part in ("pairs", "matrix"):
            own |= {"per_token": self.per_token, "min_tokens": self.min_tokens}
        if part == "matrix":
            own |= {"latents": self.matrix_latents}
        if part in ("pairs", "matrix", "concentration", "steering"):
            own |= {"n_tokens": self.n_tokens}
        if part in ("steering", "substitution", "sparsity"):
            own |= {"latents": list(self.latent) or self.latents}
        if part in ("substitution", "sparsity"):
            own |= {"tokens_per_latent": self.tokens_per_latent}
        if part == "steering":
            own |= {"coefficients": self.coefficients, "unit": self.unit}
        return own | ({"horizon": self.ahead} if part == "sparsity" else {})


def main(settings: LatentEditsOptions) -> command.Document:
    """Everything that can be wrong with the input is looked at before the model runs."""
    settings.check(())
    saes = settings.load_saes()
    model, prompts = settings.load()
    found = {}
    for part in dict.fromkeys(settings.parts):
        with settings.progress(part, unit="item") as progress:
            result = PARTS[part][1](model, prompts, saes, progress=progress, **settings.asked(part))
        found[part] = settings.finish(result, settings.out / part)
    return found


def run() -> None:
    """The command line of `scripts/interactions.py`."""
    command.run(LatentEditsOptions, main)

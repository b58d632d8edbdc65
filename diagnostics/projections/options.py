"""What commands that ablate directions ask for: SAEs, latents, tokens, edits."""

from dataclasses import dataclass
from typing import Any

from diagnostics.commands.sae_inputs import SAEInputs
from diagnostics.projections.design import REFERENCES
from diagnostics.sampling.latents import SAMPLINGS
from interventions.errors import MechdiagError


@dataclass(frozen=True, kw_only=True)
class ProjectionInputs(SAEInputs):
    """Options of both commands."""

    latents: int = 200
    """latents of each SAE"""
    latent: tuple[int, ...] = ()
    """which latents, in place of so many"""
    tokens_per_latent: int = 200
    """tokens of each latent"""
    sampling: str = "stratified"
    """stratified (latents from bins of log frequency, tokens from strata of ||x|| x |cos| over all tokens, both weighted), or
    active (the most frequent latents where they are active, as published)"""
    reference: str = "zero"
    """what every (latent, token) has removed: zero (<x,d>), mean (<x-mean,d>), latent (z), cosine (cos(x,d) x median norm)"""
    detail: float = 0.25
    """share of them with the other references, a fixed-dose rotation, and ablations of rescaled activations as well"""
    angle: float = 0.1
    """of the rotation away from the direction, radians"""
    single_token_share: float = 0.1
    """share of the latents that also go into the one-token context, where --context asks for it"""

    def check(self, files: tuple[str, ...]) -> None:
        """What can be wrong without a model. Raises `MechdiagError`."""
        if self.sampling not in SAMPLINGS or self.reference not in REFERENCES:
            raise MechdiagError(
                f"--sampling {self.sampling}, --reference {self.reference}; known: {', '.join(SAMPLINGS)}; {', '.join(REFERENCES)}"
            )
        super().check(files)

    def asked(self) -> dict[str, Any]:
        """Keyword arguments of `projection_effects`."""
        common = {name: value for name, value in self.common().items() if name != "horizon"}
        own = ("tokens_per_latent", "sampling", "reference", "detail", "angle", "single_token_share")
        return {name: getattr(self, name) for name in own} | {"latents": self.latent or self.latents} | common

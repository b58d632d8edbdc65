"""Options of commands that ablate directions: SAEs, latents, tokens, edits."""

from dataclasses import dataclass
from math import pi
from typing import Annotated, Any, Literal

from diagnostics.commands.inputs import Context, NullRunOptions
from diagnostics.commands.ranges import NonNegativeInt, PositiveInt, PositiveShare, Range, Share
from diagnostics.commands.sae_inputs import SAERunOptions


@dataclass(frozen=True, kw_only=True)
class AblationOptions(SAERunOptions, NullRunOptions):
    """Options of `ablate_projections.py` and `win_rate.py`."""

    context: Context = "in_place"
    """in_place (the token's own prompt and position), single_token (the vector as the only token, id 0), or both"""
    latents: PositiveInt = 200
    """number of latents of each SAE"""
    latent: tuple[NonNegativeInt, ...] = ()
    """these latents, in place of a number"""
    tokens_per_latent: PositiveInt = 200
    """tokens for each latent"""
    sampling: Literal["stratified", "active"] = "stratified"
    """stratified (latents from bins of log frequency, tokens from strata of ||x|| x |cos| over all tokens, both weighted), or
    active (the most frequent latents where they are active, as published)"""
    reference: Literal["zero", "mean", "latent", "cosine"] = "zero"
    """what is removed from every (latent, token) pair: zero (<x,d>), mean (<x-mean,d>), latent (z), cosine (cos(x,d) x median norm)"""
    detail: Share = 0.25
    """share of the pairs that also get half of the ablation and ablations of rescaled activations, with placebos (9 rows), the other
    references and a fixed-dose rotation (6 rows), beside the 3 rows of every pair"""
    edits: Literal["all", "rescaled"] = "all"
    """rescaled: without the other references and the rotation; with --detail 1 the cheapest way to the exponent a of rescaled
    activations and its placebos' (12 rows a pair)"""
    angle: Annotated[float, Range(0, pi / 2, above=True, below=True)] = 0.1
    """of the rotation away from the direction, radians"""
    single_token_share: PositiveShare = 0.1
    """share of the latents that also go into the one-token context, if --context asks for it"""

    def common(self) -> dict[str, Any]:
        """Keyword arguments of `projection_effects`."""
        own = self.named(
            *("context", "tokens_per_latent", "sampling", "reference", "detail", "edits", "angle", "single_token_share")
        )
        return super().common() | own | {"latents": self.latent or self.latents}

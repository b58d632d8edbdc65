"""What commands that ablate directions ask for: SAEs, latents, tokens, edits."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diagnostics.held_out import split
from diagnostics.inputs import Inputs, short_names
from diagnostics.latent_sampling import SAMPLINGS
from diagnostics.projection_design import REFERENCES
from interventions.errors import MechdiagError
from interventions.models import DEFAULT_MODEL, LAYERNORM_MODEL
from interventions.texts import Texts
from sae_models.loading import load_sae
from sae_models.sae import SAE


@dataclass(frozen=True)
class ProjectionInputs(Inputs):
    """Options of both commands."""

    saes: tuple[str, ...] = ("standard", "cosine")
    """folders, files, names in the zoo, hf:owner/name/folder; or kinds of the packaged zoo, such as cosine, of each of --layers"""
    layers: tuple[int, ...] = (7, 15, 22)
    """blocks that kinds in --saes are taken of, 0-based; SAEs that are named say themselves where they belong"""
    n_prompts: int = 200
    """prompts drawn from the text"""
    held_out: float = 0.1
    """share of the paragraphs that train_sae.py keeps for evaluation; only these are read (0: all are)"""
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
        if self.sites != ("resid_post",) or self.horizon != "1":
            raise MechdiagError(
                "SAEs say where they belong, and effects are read in place: leave out --sites and --horizon"
            )
        if not self.saes or not 0 <= self.held_out < 1:
            raise MechdiagError(
                f"--saes {list(self.saes)}, --held-out {self.held_out}; expected some, and a share below 1"
            )
        super().check(files)

    def texts(self, name: str) -> Texts:
        """The held-out paragraphs of a text, or all."""
        texts = super().texts(name)
        return split(texts, self.held_out)[1] if self.held_out else texts

    def load_saes(self, device: Any) -> dict[str, SAE]:
        """The SAEs by name. Raises `CheckpointError`, `MechdiagError`."""
        zoo = DEFAULT_MODEL if self.model == LAYERNORM_MODEL else self.model
        paths = []
        for name in self.saes:
            kind = "/" not in name and ":" not in name and not Path(name).exists()
            paths += [f"{zoo}/{layer}/{name}" for layer in self.layers] if kind else [name]
        return dict(zip(short_names(tuple(paths)), (load_sae(path, device=device) for path in paths), strict=True))

    def asked(self) -> dict[str, Any]:
        """Keyword arguments of `projection_effects`."""
        common = {name: value for name, value in self.common().items() if name != "horizon"}
        own = ("tokens_per_latent", "sampling", "reference", "detail", "angle", "single_token_share")
        return {name: getattr(self, name) for name in own} | {"latents": self.latent or self.latents} | common

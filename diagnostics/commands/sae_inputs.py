"""What commands ask for that put SAEs to a model's text: which SAEs, which paragraphs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from diagnostics.commands.inputs import Inputs, ModelInputs, TextInputs, short_names
from interventions.errors import MechdiagError
from interventions.models.loading import DEFAULT_MODEL, LAYERNORM_MODEL, resolve_device
from interventions.texts.held_out import split
from interventions.texts.prompts import Texts
from sae_models.loading import load_sae
from sae_models.sae import SAE


@dataclass(frozen=True, kw_only=True)
class SAEChoice(ModelInputs):
    """Options of every command that loads SAEs of a model."""

    saes: tuple[str, ...] = ("standard", "cosine")
    """folders, files, names in the zoo, hf:owner/name/folder; or kinds of the packaged zoo, such as cosine, of each of --layers"""
    layers: tuple[int, ...] = (15,)
    """blocks that kinds in --saes are taken of, 0-based; SAEs that are named say themselves where they belong"""

    def load_saes(self) -> dict[str, SAE]:
        """The SAEs by name. Raises `CheckpointError`, `MechdiagError`."""
        return named_saes(self.saes, self.layers, self.model, resolve_device(self.device))


@dataclass(frozen=True, kw_only=True)
class HeldOutText(TextInputs):
    """Options of every command that keeps away from the text that SAEs were trained on."""

    held_out: float = 0.1
    """share of the paragraphs that train_sae.py keeps for evaluation; only these are read (0: all are)"""

    def check_share(self) -> None:
        """What can be wrong without a text. Raises `MechdiagError`."""
        if not 0 <= self.held_out < 1:
            raise MechdiagError(f"--held-out {self.held_out}; expected a share from 0 to below 1")

    def texts(self, name: str) -> Texts:
        """The held-out paragraphs of a text, or all. Raises `MechdiagError`."""
        texts = super().texts(name)
        return split(texts, self.held_out)[1] if self.held_out else texts


@dataclass(frozen=True, kw_only=True)
class SAEInputs(SAEChoice, HeldOutText, Inputs):
    """Options shared by these commands. SAEs say themselves where they belong: the command line takes no sites and no horizon."""

    layers: tuple[int, ...] = (7, 15, 22)
    """blocks that kinds in --saes are taken of, 0-based; SAEs that are named say themselves where they belong"""
    n_prompts: int = 200
    """prompts drawn from the text"""
    sites: Annotated[tuple[str, ...], tyro.conf.Suppress] = ("resid_post",)
    horizon: Annotated[str, tyro.conf.Suppress] = "1"

    def check(self, files: tuple[str, ...]) -> None:
        """What can be wrong without a model. Raises `MechdiagError`."""
        if self.sites != ("resid_post",) or self.horizon != "1":
            raise MechdiagError(
                "SAEs say where they belong, and effects are read in place: leave sites and horizon as they are"
            )
        if not self.saes:
            raise MechdiagError("--saes is empty; name at least one")
        self.check_share()
        super().check(files)


def sae_paths(names: Sequence[str], layers: Sequence[int], model: str) -> tuple[str, ...]:
    """Where SAEs are: a kind, such as cosine, is the zoo's of that model at each of the layers; whatever else is named stays."""
    zoo = DEFAULT_MODEL if model == LAYERNORM_MODEL else model
    paths = []
    for name in names:
        kind = "/" not in name and ":" not in name and not Path(name).exists()
        paths += [f"{zoo}/{layer}/{name}" for layer in layers] if kind else [name]
    return tuple(paths)


def named_saes(names: Sequence[str], layers: Sequence[int], model: str, device: Any) -> dict[str, SAE]:
    """The SAEs of `sae_paths`, under short names that tell them apart. Raises `CheckpointError`, `MechdiagError`."""
    paths = sae_paths(names, layers, model)
    return dict(zip(short_names(paths), (load_sae(path, device=device) for path in paths), strict=True))

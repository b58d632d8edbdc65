"""Options of commands that run SAEs on a model's text: which SAEs, which paragraphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics.commands.inputs import ModelOptions, RunOptions, TextOptions, short_names
from diagnostics.commands.ranges import NonNegativeInt, PositiveInt, ShareBelowOne
from interventions.errors import MechdiagError

if TYPE_CHECKING:
    from interventions.texts.prompts import Texts
    from sae_models.sae import SAE


@dataclass(frozen=True, kw_only=True)
class SAEOptions(ModelOptions):
    """Options of every command that loads SAEs of a model."""

    saes: tuple[str, ...] = ("standard", "cosine")
    """folders, files, names in the zoo, hf:owner/name/folder; or kinds of SAE in the packaged zoo, such as cosine, one for each of --layers"""
    layers: tuple[NonNegativeInt, ...] = (15,)
    """blocks, 0-based, for kinds in --saes; an SAE given by name has its own block"""

    def load_saes(self) -> dict[str, SAE]:
        """The SAEs by name. Raises `CheckpointError`, `MechdiagError`."""
        from interventions.models.loading import resolve_device

        return named_saes(self.saes, self.layers, self.model, resolve_device(self.device))


@dataclass(frozen=True, kw_only=True)
class HeldOutTextOptions(TextOptions):
    """Options of every command that reads only paragraphs that SAEs were not trained on."""

    held_out: ShareBelowOne = 0.1
    """share of the paragraphs that train_sae.py holds out; only these are read (0: read all)"""

    def texts(self, name: str) -> Texts:
        """The held-out paragraphs of a text, or all. Raises `MechdiagError`."""
        from interventions.texts.held_out import split

        texts = super().texts(name)
        return split(texts, self.held_out)[1] if self.held_out else texts


@dataclass(frozen=True, kw_only=True)
class SAERunOptions(SAEOptions, HeldOutTextOptions, RunOptions):
    """Options of commands that edit activations through SAEs, each at its own site."""

    layers: tuple[NonNegativeInt, ...] = (7, 15, 22)
    """blocks, 0-based, for kinds in --saes; an SAE given by name has its own block"""
    n_prompts: PositiveInt = 200
    """prompts sampled from the text"""

    def check(self, files: tuple[str, ...]) -> None:
        if not self.saes:
            raise MechdiagError("--saes is empty; name at least one")
        super().check(files)


def sae_paths(names: Sequence[str], layers: Sequence[int], model: str) -> tuple[str, ...]:
    """Paths of SAEs: a kind, such as cosine, is the zoo's SAE of that model at each of the layers; all other names stay."""
    from interventions.models.names import DEFAULT_MODEL, LAYERNORM_MODEL

    zoo = DEFAULT_MODEL if model == LAYERNORM_MODEL else model
    paths = []
    for name in names:
        kind = "/" not in name and ":" not in name and not Path(name).exists()
        paths += [f"{zoo}/{layer}/{name}" for layer in layers] if kind else [name]
    return tuple(paths)


def named_saes(names: Sequence[str], layers: Sequence[int], model: str, device: Any) -> dict[str, SAE]:
    """The SAEs of `sae_paths` by distinct short names. Raises `CheckpointError`, `MechdiagError`."""
    return saes_at(sae_paths(names, layers, model), device)


def saes_at(paths: tuple[str, ...], device: Any) -> dict[str, SAE]:
    """The SAEs at some paths by distinct short names. Raises `CheckpointError`, `MechdiagError`."""
    from sae_models.loading import load_sae

    return dict(zip(short_names(paths), (load_sae(path, device=device) for path in paths), strict=True))

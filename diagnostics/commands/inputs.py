"""What every command that patches a model on texts asks for: model, text, where, how."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from diagnostics.commands.command import Resumable
from interventions.errors import MechdiagError, SiteError
from interventions.files import claim_run
from interventions.models.causal_model import CausalModel
from interventions.models.loading import DEFAULT_MODEL, load_model, resolve_device, resolve_dtype
from interventions.replaying.rows import Horizon
from interventions.sites import POINTS, Site
from interventions.texts.inputs import check_prompts
from interventions.texts.prompts import Prompts, Texts, load_texts, tokenize


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """Options of every command that runs a model."""

    model: str = DEFAULT_MODEL
    """smollm2-135m (packaged), a folder, or a Hugging Face hub id"""
    dtype: str = "float32"
    """of the model: float32, bfloat16 or float16"""
    device: str | None = None
    """cpu, cuda, cuda:1 (default: cuda where there is one)"""
    trust_remote_code: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """run code that comes with the model's folder or hub id (never asked for)"""

    def check_model(self) -> None:
        """What can be wrong without the model. Raises `ModelError`."""
        resolve_dtype(self.dtype)
        resolve_device(self.device)

    def load_model(self) -> CausalModel:
        """The model, with a tokenizer. Raises `MechdiagError`."""
        model = load_model(self.model, dtype=self.dtype, device=self.device, trust_remote_code=self.trust_remote_code)
        if model.tokenizer is None:
            raise MechdiagError(f"model {self.model!r} has no tokenizer, so it cannot read text; name another")
        return model


@dataclass(frozen=True, kw_only=True)
class TextInputs:
    """Options of every command that reads a text."""

    prompts: str = "boolq"
    """boolq (packaged Wikipedia paragraphs), sotu (State of the Union addresses, by npm), a .txt, .jsonl or .csv file, or
    hf:owner/name[:split:column]"""
    n_prompts: int = 200
    """prompts drawn from the text"""
    max_length: int = 128
    """tokens a prompt is cut at"""
    chat_template: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """put each prompt into the tokenizer's chat template, as a user's turn"""

    def texts(self, name: str) -> Texts:
        """The text of a name. Raises `MechdiagError`."""
        return load_texts(name)

    def tokenized(self, texts: Texts, model: CausalModel, seed: int) -> Prompts:
        """Prompts drawn from a text by seed, as token ids that the model can read. Raises `TextError`."""
        prompts = tokenize(
            texts,
            model.tokenizer,
            max_length=self.max_length,
            n_prompts=self.n_prompts,
            chat_template=self.chat_template,
            seed=seed,
        )
        check_prompts(model, prompts.tokens)
        return prompts


@dataclass(frozen=True, kw_only=True)
class Inputs(Resumable, ModelInputs, TextInputs):
    """Options shared by commands that patch a model; each adds its own."""

    model: str = DEFAULT_MODEL
    """smollm2-135m (packaged), smollm2-135m-layernorm (its weights under LayerNorm, for parity tests alone), a folder, or a
    Hugging Face hub id"""
    layers: tuple[int, ...] = ()
    """blocks that are patched, 0-based (default: six, from the first to the last)"""
    sites: tuple[str, ...] = ("resid_post",)
    """where: resid_pre, attn_out, resid_mid, mlp_out, resid_post of every block in --layers, or single sites such as 15.attn_out"""
    context: str = "in_place"
    """in_place (the token's own prompt and position), single_token (the vector as the only token, id 0), or both"""
    horizon: str = "1"
    """read the effect at so many positions from the edited one on, or at the prompt's 'last' position"""
    n_prompts: int = 100
    """prompts drawn from the text"""
    sink_filter: float = 10.0
    """drop tokens with ||x|| above this many times the site's median (0: keep them)"""
    null_model: str = "none"
    """random: also networks of the same configuration with random weights, through the same diagnostic, drawn in grey"""
    null_seeds: int = 3
    """how many of them"""
    batch_rows: int | None = None
    """tokens in one forward pass (default: 512 on the CPU, 4096 elsewhere); halved when memory runs out"""
    path: str = "auto"
    """auto (replay, checked against full forward passes), replay, or hooks (full forward passes)"""
    seed: int = 0
    """of prompts, rows and placebos"""

    def check(self, files: tuple[str, ...]) -> None:
        """What can be wrong without a model: options, device, folder. Raises `MechdiagError`."""
        if self.path not in ("auto", "replay", "hooks"):
            raise MechdiagError(f"unknown path {self.path!r}; known: auto, replay, hooks")
        if self.null_model not in ("none", "random"):
            raise MechdiagError(f"unknown null model {self.null_model!r}; known: none, random")
        self.check_model()
        self.positions()
        for name in self.sites:
            if name not in POINTS:
                Site.parse(name)
        claim_run(self.out, files, self.overwrite)

    def load(self, prompts: str | None = None) -> tuple[CausalModel, Prompts]:
        """The model and its prompts (of another text than `self.prompts` where one is named). Raises `MechdiagError`."""
        texts = self.texts(prompts or self.prompts)
        model = self.load_model()
        return model, self.tokenized(texts, model, self.seed)

    def positions(self) -> Horizon:
        """The horizon as the engine takes it. Raises `SiteError`."""
        if self.horizon == "last":
            return "last"
        if not (self.horizon.isascii() and self.horizon.isdecimal()) or int(self.horizon) < 1:
            raise SiteError(f"horizon {self.horizon!r}; expected a number of positions, 1 or more, or 'last'")
        return int(self.horizon)

    def places(self, default_layers: list[int]) -> list[Site]:
        """The sites asked for: points of every layer, and single sites."""
        layers = list(self.layers) or default_layers
        points = [name for name in self.sites if name in POINTS]
        single = [Site.parse(name) for name in self.sites if name not in POINTS]
        return [Site(layer, point) for point in points for layer in layers] + single

    def common(self) -> dict[str, Any]:
        """Keyword arguments that every diagnostic takes."""
        return {
            "context": self.context,
            "horizon": self.positions(),
            "sink_filter": self.sink_filter or None,
            "seed": self.seed,
            "null_seeds": self.null_seeds if self.null_model == "random" else 0,
            "batch_rows": self.batch_rows,
            "path": self.path,
            "folder": self.out,
            "overwrite": self.overwrite,
        }


def short_names(paths: tuple[str, ...]) -> list[str]:
    """The last part of each path, with as many before it as tell them apart. Raises `MechdiagError` for one given twice."""
    parts = [[part for part in Path(path).parts if part not in ("/", "..")] or [path] for path in paths]
    if twice := [path for path, n in Counter(map(tuple, parts)).items() if n > 1]:
        raise MechdiagError(f"{'/'.join(twice[0])} is given twice; name each once")
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(some[-n:]) for some in parts]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("paths that differ have names that do")

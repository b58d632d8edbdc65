#!/usr/bin/env python
"""Tokens a second in SAE training, side by side in one run: ours, SAELens' trainer, and the one dense product that must be formed."""

import importlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diagnostics.commands import command
from diagnostics.commands.ranges import NonNegativeInt, PositiveInt
from interventions.activations import ActivationStream
from interventions.files import claim_folder, write_json
from interventions.models.causal_model import CausalModel
from interventions.models.loading import load_model
from interventions.provenance import model_provenance
from interventions.sites import Site
from interventions.texts.prompts import Prompts, load_texts, tokenize
from sae_models.architectures import named
from sae_models.training.from_model import SAESpec, train_saes
from sae_models.training.recipe import Recipe
from sae_models.training.trainer import SAETraining

VARIANTS = ("standard", "cosine", "cosine-global", "cosine-feature", "bypass", "aligned")


@dataclass(frozen=True, kw_only=True)
class BenchOptions(command.OutputOptions):
    """How fast SAEs are trained: on cached activations against SAELens, and many from one pass over a text against one pass each.

    On cached activations: a step of a BatchTopK SAE, ours and sae_lens.SAETrainer's (where sae-lens is installed: .venv-tl3), and
    the limit: the product of the batch with the encoder alone. From text: six variants fed by one pass, and by six passes.

    Examples:
      .venv-tl3/bin/python scripts/bench_sae_training.py --out results/bench_sae
      .venv-tl3/bin/python scripts/bench_sae_training.py --d-sae 2304 --text-tokens 0 --out results/cached
    """

    d_sae: PositiveInt = 4608
    """latents"""
    k: PositiveInt = 32
    """active latents a token"""
    batch_tokens: PositiveInt = 4096
    """tokens a step, on cached activations"""
    steps: PositiveInt = 12
    """steps timed, in each of --repeats turns, each on another batch"""
    repeats: PositiveInt = 3
    """the fastest turn counts; the ways take turns"""
    layer: NonNegativeInt = 15
    """block whose output the SAEs are trained on"""
    text_tokens: NonNegativeInt = 8192
    """tokens from text (0: leave this part out)"""
    out: Path
    """folder for bench_sae_training.json"""


def main(options: BenchOptions) -> command.Document:
    """Run the command: two tables, with ratios of numbers from this run."""
    out = claim_folder(options.out, ["bench_sae_training.json"], options.overwrite)
    model = load_model("smollm2-135m", device="cpu")
    cached = on_cached(options, model)
    options.say(_table("cached activations", cached, "SAELens SAETrainer"))
    found: dict[str, Any] = {"cached": cached}
    if options.text_tokens:
        found["text"] = from_text(options, model)
        options.say(_table(f"{len(VARIANTS)} SAEs from text, block {options.layer}", found["text"], "six passes"))
    document = {"tokens_per_second": found, **model_provenance(model)}
    write_json(out / "bench_sae_training.json", document)
    options.say(f"wrote bench_sae_training.json into {out}")
    return {**document, "out": str(out), "files": ["bench_sae_training.json"]}


def on_cached(options: BenchOptions, model: CausalModel) -> dict[str, float]:
    """Tokens a second of each way, on real activations: which scores are close to the threshold decides what selecting costs."""
    prompts = tokenize(load_texts("boolq", options.steps * options.batch_tokens // 64), model.tokenizer, max_length=256)
    stream = _stream(model, prompts, options, options.batch_tokens)
    batches = [next(stream)[Site(options.layer)] for _ in range(options.steps)]
    recipe = Recipe(d_sae=options.d_sae, k=options.k)
    ours = {
        f"ours, {name}": SAETraining(named(name), recipe, batches[0], steps=1000) for name in ("standard", "cosine")
    }
    ways: dict[str, Callable[[torch.Tensor], object]] = {name: training.step for name, training in ours.items()}
    lens = _sae_lens_step(options, model.d_model)
    if lens is not None:
        ways["SAELens SAETrainer"] = lens
    W_enc, scores = torch.randn(model.d_model, options.d_sae), torch.empty(options.batch_tokens, options.d_sae)
    ways["limit: the encoder's product alone"] = lambda x: torch.mm(x, W_enc, out=scores)
    best = dict.fromkeys(ways, 0.0)
    for _ in range(options.repeats):
        for name, step in ways.items():
            step(batches[0])
            start = time.perf_counter()
            for batch in batches:
                step(batch)
            best[name] = max(best[name], options.steps * options.batch_tokens / (time.perf_counter() - start))
    return best


def _sae_lens_step(options: BenchOptions, d_model: int) -> Callable[[torch.Tensor], object] | None:
    try:
        lens: Any = importlib.import_module("sae_lens")
        config_module: Any = importlib.import_module("sae_lens.config")
        trainer_module: Any = importlib.import_module("sae_lens.training.sae_trainer")
    except ImportError:
        options.say("sae-lens is not installed here, so it is left out; run this in .venv-tl3 (make tl3)")
        return None
    sae = lens.BatchTopKTrainingSAE(lens.BatchTopKTrainingSAEConfig(d_in=d_model, d_sae=options.d_sae, k=options.k))
    many = 10**9 * options.batch_tokens
    config = config_module.SAETrainerConfig(
        total_training_samples=many, train_batch_size_samples=options.batch_tokens, lr=1e-4, lr_end=1e-5
    )
    trainer = trainer_module.SAETrainer(config, sae, data_provider=_nothing())

    def step(x: torch.Tensor) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    return step


def _nothing() -> Iterator[torch.Tensor]:
    yield from ()


def from_text(options: BenchOptions, model: CausalModel) -> dict[str, float]:
    """Tokens of text a second until all variants have been trained on them, and of the model's pass alone."""
    prompts = tokenize(load_texts("boolq", 4 * options.text_tokens // 128), model.tokenizer, max_length=256)
    site, recipe = Site(options.layer), Recipe(d_sae=4 * model.d_model, k=options.k)
    wanted = {name: SAESpec(site, named(name), recipe) for name in VARIANTS}

    def trained(which: dict[str, SAESpec]) -> None:
        train_saes(model, prompts, which, tokens=options.text_tokens, buffer_tokens=options.text_tokens)

    def apart() -> None:
        for name, one in wanted.items():
            trained({name: one})

    def alone() -> None:
        stream = _stream(model, prompts, options, 1024)
        for _ in range(options.text_tokens // 1024):
            next(stream)

    ways: dict[str, Callable[[], None]] = {
        "one pass": lambda: trained(wanted),
        "six passes": apart,
        "limit: the model's pass alone": alone,
    }
    found = {}
    for name, way in ways.items():
        start = time.perf_counter()
        way()
        found[name] = options.text_tokens / (time.perf_counter() - start)
    return found


def _stream(model: CausalModel, prompts: Prompts, options: BenchOptions, batch_tokens: int) -> ActivationStream:
    return ActivationStream(
        model,
        prompts,
        [Site(options.layer)],
        batch_tokens=batch_tokens,
        buffer_tokens=max(batch_tokens, options.text_tokens),
        skip_first=1,
    )


def _table(title: str, found: dict[str, float], reference: str) -> str:
    base = found.get(reference)
    lines = [f"\n{title:40} tokens/s   ratio to {reference}"]
    lines += [f"{name:40} {rate:8.0f}" + (f"   {rate / base:5.2f}" if base else "") for name, rate in found.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    command.run(BenchOptions, main)

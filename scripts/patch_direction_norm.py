#!/usr/bin/env python
"""Direction-vs-norm patching by depth, in context and in a one-token context, beside matched placebos."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from diagnostics import command
from diagnostics.direction_patching import direction_norm
from diagnostics.results import claim_folder, save_tokens, write_frame, write_json, write_whole
from interventions.errors import MechdiagError
from interventions.models import load_model, resolve_device, resolve_dtype
from interventions.texts import load_texts, tokenize

FILES = ("direction_norm.parquet", "direction_norm.json", "tokens.npy", "direction_norm.png", "direction_norm.svg")


@dataclass(frozen=True)
class Settings:
    """Does the model read an activation's direction or its norm?

    Takes tokens B and A of different prompts, gives B's residual vector A's direction, or A's norm, and measures
    KL(clean || intervened) of the next-token distribution at B, in nats, by depth. Beside each patch: its dose and a
    random edit of the same norm and angle. Writes a table (Parquet), its tokens, a summary with provenance (JSON) and the
    figure into --out.

    Example: scripts/patch_direction_norm.py --layers 7 22 --pairs 200 --out results/mine
    """

    out: Path
    """folder for the results"""
    model: str = "smollm2-135m"
    """smollm2-135m (packaged), a folder, or a Hugging Face hub id"""
    layers: tuple[int, ...] = ()
    """blocks whose output is patched, 0-based (default: six, from the first to the last)"""
    pairs: int = 500
    """token pairs of each pair set, the same at every depth"""
    context: str = "both"
    """in_place (B's own prompt and position), single_token (the vector as the only token, id 0), or both"""
    prompts: str = "boolq"
    """boolq (packaged Wikipedia paragraphs), a .txt, .jsonl or .csv file, or hf:owner/name[:split:column]"""
    n_prompts: int = 100
    """prompts drawn from the text"""
    max_length: int = 128
    """tokens a prompt is cut at"""
    chat_template: bool = False
    """put each prompt into the tokenizer's chat template, as a user's turn"""
    sink_filter: float = 10.0
    """drop tokens with ||x|| above this many times the layer's median (0: keep them)"""
    dtype: str = "float32"
    """float32, bfloat16 or float16"""
    device: str | None = None
    """cpu, cuda, cuda:1 (default: cuda where there is one)"""
    batch_rows: int | None = None
    """rows in one forward pass (default: 512 on the CPU, 4096 elsewhere); halved when memory runs out"""
    path: str = "auto"
    """auto (replay, checked against full forward passes), replay, or hooks (full forward passes)"""
    seed: int = 0
    """of prompts, pairs and placebos"""
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """replace the results of another run in --out"""


def main(settings: Settings) -> None:
    """Everything that can be wrong with the input is looked at before the model runs."""
    if settings.path not in ("auto", "replay", "hooks"):
        raise MechdiagError(f"unknown path {settings.path!r}; known: auto, replay, hooks")
    resolve_dtype(settings.dtype)
    device = resolve_device(settings.device)
    out = claim_folder(settings.out, FILES, settings.overwrite)
    texts = load_texts(settings.prompts)
    model = load_model(settings.model, dtype=settings.dtype, device=device)
    if model.tokenizer is None:
        raise MechdiagError(f"model {settings.model!r} has no tokenizer, so it cannot read text; name another")
    prompts = tokenize(
        texts,
        model.tokenizer,
        max_length=settings.max_length,
        n_prompts=settings.n_prompts,
        chat_template=settings.chat_template,
        seed=settings.seed,
    )
    with command.Progress("patching") as progress:
        result = direction_norm(
            model,
            prompts,
            layers=settings.layers or None,
            pairs=settings.pairs,
            context=settings.context,
            sink_filter=settings.sink_filter or None,
            seed=settings.seed,
            batch_rows=settings.batch_rows,
            path=settings.path,
            progress=progress,
        )
    write_frame(out / "direction_norm.parquet", result.frame)
    save_tokens(out / "tokens.npy", result.tokens)
    write_json(out / "direction_norm.json", result.as_dict())
    print(result.table())
    figure = result.plot()
    write_whole(out / "direction_norm.png", lambda path: figure.savefig(path, dpi=200))
    write_whole(out / "direction_norm.svg", lambda path: figure.savefig(path, metadata={"Date": None}))
    print(f"wrote {', '.join(FILES)} into {out}")


if __name__ == "__main__":
    command.run(Settings, main)

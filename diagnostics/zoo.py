"""The zoo: real SAEs of the packaged model, trained on the packaged text, for every other command to use."""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from diagnostics.held_out import split
from diagnostics.sae_training import Wanted, train_saes
from interventions.errors import MechdiagError
from interventions.models import DEFAULT_MODEL, cache_folder, load_model
from interventions.sites import Site
from interventions.texts import load_texts, tokenize
from sae_models.architectures import named
from sae_models.runs import Progress
from sae_models.saving import CONFIG, own_sae, save_sae, stored
from sae_models.training import Recipe

LAYERS = (7, 15, 22)
PACKAGED = tuple(f"{layer}/{name}" for name in ("standard", "cosine") for layer in LAYERS)
"""in half precision in the package itself"""
ZOO = (
    *PACKAGED,
    *(f"15/{name}-seed{seed}" for seed in (1, 2) for name in ("standard", "cosine")),
    *(f"{layer}/{name}" for name in ("aligned", "bypass", "cosine-global") for layer in LAYERS),
)
"""Names of all SAEs, in the order of need: layer, architecture (see `named`), and the seed where it is not 0."""
TOKENS, BATCH, MAX_LENGTH, HELD_OUT = 1_048_576, 1024, 256, 0.1
RECIPE = Recipe(d_sae=4 * 576, k=32)


def zoo_folder() -> Path:
    """Where the SAEs of the zoo are: under the cache folder."""
    return cache_folder() / "zoo" / DEFAULT_MODEL


def chosen(only: Sequence[str]) -> list[str]:
    """The names in `ZOO` that are named, or of a layer or architecture that is. Raises `MechdiagError` for what is in none.

    `15/cosine`, `15`, `cosine` (with its seeds); nothing: all.
    """
    parts = {name: {name, *name.split("/"), name.split("/")[1].split("-seed")[0]} for name in ZOO}
    if unknown := [word for word in only if not any(word in of for of in parts.values())]:
        raise MechdiagError(f"nothing in the zoo is called {', '.join(unknown)}; known: {', '.join(ZOO)}")
    return [name for name in ZOO if not only or any(word in parts[name] for word in only)]


def train_zoo(
    only: Sequence[str] = (), *, tokens: int = TOKENS, device: str | None = None, progress: Progress | None = None
) -> list[str]:
    """Train those of the zoo that are not there yet, from one pass over the text, and return the names of all asked for.

    An SAE sees the same batches whichever others are trained with it. Interrupted, the same call goes on. What is there with other settings is trained again and replaced once that is done.
    """
    names = chosen(only)
    text, _ = split(load_texts("boolq"), HELD_OUT)
    about = {"text": text.sha256, "tokens": tokens // BATCH * BATCH, "recipe": repr(RECIPE)}
    missing = [name for name in names if _label(zoo_folder() / name) != about]
    if missing:
        model = load_model(DEFAULT_MODEL, device=device)
        assert model.tokenizer is not None
        prompts = tokenize(text, model.tokenizer, max_length=MAX_LENGTH)
        digest = hashlib.sha256(json.dumps([missing, about, model.weights_hash]).encode()).hexdigest()[:16]
        run = cache_folder() / "zoo" / "runs" / digest
        train_saes(
            model,
            prompts,
            {name: _wanted(name) for name in missing},
            tokens=tokens,
            batch_tokens=BATCH,
            skip_first=0,  # position 0 is a sink at blocks 15 and 22, which the filter leaves out at all sites
            also_sites=[Site(layer) for layer in LAYERS],
            folder=run,
            progress=progress,
        )
        for name in missing:
            (run / name / "zoo.json").write_text(json.dumps(about), encoding="utf-8")
            _put(run / name, zoo_folder() / name)
            for file in ("run.json", "manifest.json", "metrics.jsonl"):
                shutil.copy(run / file, zoo_folder() / name / file)
        shutil.rmtree(run)
    return names


def package_zoo(folder: Path) -> list[str]:
    """Write the SAEs of `PACKAGED` into `folder`, their matrices in half precision."""
    for name in PACKAGED:
        save_sae(own_sae(*stored(zoo_folder() / name)), folder / DEFAULT_MODEL / name, dtype=torch.float16)
    return list(PACKAGED)


def _wanted(name: str) -> Wanted:
    layer, what = name.split("/")
    architecture, _, seed = what.partition("-seed")
    recipe = Recipe(**{**vars(RECIPE), "seed": int(seed or 0)})
    return Wanted(Site(int(layer)), named(architecture), recipe)


def _label(folder: Path) -> dict[str, object] | None:
    """What a finished SAE of the zoo was trained with."""
    path = folder / "zoo.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() and (folder / CONFIG).exists() else None


def _put(source: Path, target: Path) -> None:
    """Move a folder into the place of another."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(source, target)

"""The zoo: real SAEs of the packaged model, trained on the packaged text, for every other command to use."""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from interventions.cache import cache_folder
from interventions.errors import MechdiagError
from interventions.models.loading import load_model
from interventions.models.names import DEFAULT_MODEL
from interventions.progress import Progressing
from interventions.sites import Site
from interventions.texts.held_out import split
from interventions.texts.prompts import load_texts, tokenize
from sae_models.architectures import named
from sae_models.loading import saved_sae
from sae_models.saving import save_sae
from sae_models.training.from_model import SAESpec, train_saes
from sae_models.training.recipe import Recipe

LAYERS = (7, 15, 22)
PACKAGED = tuple(f"{layer}/{name}" for name in ("standard", "cosine") for layer in LAYERS)
"""in half precision in the package itself"""
ZOO = (
    *PACKAGED,
    *(f"15/{name}-seed{seed}" for seed in (1, 2) for name in ("standard", "cosine")),
    *(f"{layer}/{name}" for name in ("aligned", "bypass", "cosine-global") for layer in LAYERS),
)
"""Names of all SAEs, in the order of need: layer, architecture (see `named`), and the seed where it is not 0."""
TOKENS, BATCH, MAX_LENGTH, HELD_OUT, SINK_FILTER = 1_048_576, 1024, 256, 0.1, 10.0
LABEL = "zoo.json"
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
    only: Sequence[str] = (), *, tokens: int = TOKENS, device: str | None = None, progress: Progressing = None
) -> list[str]:
    """Train those of the zoo that are not there yet, from one pass over the text, and return the names of all asked for.

    An SAE sees the same batches whichever others are trained with it. Interrupted, the same call goes on; so does one for a part
    of what was asked for then. What is there with other settings is trained again and replaced once that is done. Raises
    `MechdiagError` for a folder of that name that this did not write.
    """
    names = chosen(only)
    text, _ = split(load_texts("boolq"), HELD_OUT)
    label = _label(text.sha256, tokens)
    missing = [name for name in names if _read(zoo_folder() / name / LABEL) != label]
    if not missing:
        return names
    run, missing = _run_for(missing, label)
    model = load_model(DEFAULT_MODEL, device=device)
    assert model.tokenizer is not None
    train_saes(
        model,
        tokenize(text, model.tokenizer, max_length=MAX_LENGTH),
        {name: _wanted(name) for name in missing},
        tokens=tokens,
        batch_tokens=BATCH,
        sink_filter=SINK_FILTER,
        skip_first=0,  # position 0 is a sink at blocks 15 and 22, which the filter leaves out at all sites
        also_sites=[Site(layer) for layer in LAYERS],
        folder=run,
        progress=progress,
    )
    for name in missing:
        for file in ("run.json", "manifest.json", "metrics.jsonl"):
            shutil.copy(run / file, run / name / file)
        (run / name / LABEL).write_text(json.dumps(label), encoding="utf-8")
        _put(run / name, zoo_folder() / name)
    shutil.rmtree(run)
    return names


def _label(text_sha256: str, tokens: int) -> dict[str, object]:
    """What an SAE of the zoo depends on, as JSON gives it back."""
    return {
        "text": text_sha256,
        "tokens": tokens // BATCH * BATCH,
        "batch": BATCH,
        "max_length": MAX_LENGTH,
        "sink_filter": SINK_FILTER,
        "layers": list(LAYERS),
        "recipe": repr(RECIPE),
    }


def _run_for(missing: list[str], label: dict[str, object]) -> tuple[Path, list[str]]:
    """The folder of an interrupted run that trains all of `missing` (and what it trains), or a new one."""
    runs = cache_folder() / "zoo" / "runs"
    for other in sorted(runs.glob(f"*/{LABEL}")):
        found = _read(other) or {}
        if found.get("label") == label and set(found.get("names", ())) >= set(missing):
            return other.parent, found["names"]
    digest = hashlib.sha256(json.dumps([missing, label]).encode()).hexdigest()[:16]
    run = runs / digest
    run.mkdir(parents=True, exist_ok=True)
    (run / LABEL).write_text(json.dumps({"label": label, "names": missing}), encoding="utf-8")
    return run, missing


def package_zoo(folder: Path) -> list[str]:
    """Write the SAEs of `PACKAGED` into `folder`, their matrices in half precision."""
    if absent := [name for name in PACKAGED if not (zoo_folder() / name / LABEL).exists()]:
        raise MechdiagError(f"{', '.join(absent)} are not trained yet; run this without --only")
    for name in PACKAGED:
        save_sae(saved_sae(zoo_folder() / name), folder / DEFAULT_MODEL / name, dtype=torch.float16)
    return list(PACKAGED)


def _wanted(name: str) -> SAESpec:
    layer, what = name.split("/")
    architecture, _, seed = what.partition("-seed")
    return SAESpec(Site(int(layer)), named(architecture), replace(RECIPE, seed=int(seed or 0)))


def _read(path: Path) -> dict[str, Any] | None:
    """What a label says; nothing where there is no folder. Raises `MechdiagError` where it is not one of ours."""
    if not path.parent.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    except (OSError, ValueError, RecursionError):
        pass
    raise MechdiagError(
        f"{path.parent} has no {LABEL} that can be read: it was not written by this, and is left as it is; move it away"
    )


def _put(source: Path, target: Path) -> None:
    """A copy of a folder in the place of another, which is there whole or not at all; the source stays until all are in place."""
    partial, former = (target.with_name(f"{target.name}.{what}") for what in ("partial", "former"))
    for left in (partial, former):
        shutil.rmtree(left, ignore_errors=True)
    shutil.copytree(source, partial)
    if target.exists():
        os.replace(target, former)
    os.replace(partial, target)
    shutil.rmtree(former, ignore_errors=True)

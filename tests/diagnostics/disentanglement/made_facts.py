"""Facts that a tiny random model knows: the values are its own answers."""

import functools
from pathlib import Path

import torch

from diagnostics.disentanglement.facts import Facts, load_facts
from interventions import CausalModel, wrap
from tests.tiny import tiny_model, tokenizer

QUESTIONS = {"a": "w5 w9 {} w11 w12", "b": "w5 w9 {} w13 w14 w15"}


@functools.cache
def model() -> CausalModel:
    return wrap(tiny_model("llama"), tokenizer(), "owner/tiny")


def _answers(entity: str) -> dict[str, int]:
    """The model's own most likely token after each question."""
    asked = {name: [int(word[1:]) for word in template.format(entity).split()] for name, template in QUESTIONS.items()}
    return {name: int(tiny_model("llama")(torch.tensor([ids])).logits[0, -1].argmax()) for name, ids in asked.items()}


@functools.cache
def answers() -> dict[str, dict[str, int]]:
    """Of entities; without answers that begin with the special token w2, also within w20."""
    found = {entity: _answers(entity) for entity in (f"w{i}" for i in range(30, 90))}
    return {entity: own for entity, own in found.items() if not any(str(v).startswith("2") for v in own.values())}


def files(folder: Path, wrong: set[tuple[str, str]] = frozenset()) -> tuple[Path, Path]:  # type: ignore[assignment]
    """Two CSV files. wrong: entities and attributes whose value is another than the model's answer."""
    lines = ["entity," + ",".join(QUESTIONS)]
    for entity, own in answers().items():
        said = [f"w{(top + 1) % 97 if (entity, name) in wrong else top}" for name, top in own.items()]
        lines.append(",".join([entity, *said]))
    asked = ["context,attribute,template", *(f"only,{name},{template}" for name, template in QUESTIONS.items())]
    for name, some in (("facts.csv", lines), ("questions.csv", asked)):
        (folder / name).write_text("\n".join(some) + "\n")
    return folder / "facts.csv", folder / "questions.csv"


def answered(folder: Path, wrong: set[tuple[str, str]] = frozenset()) -> Facts:  # type: ignore[assignment]
    return load_facts(*files(folder, wrong))

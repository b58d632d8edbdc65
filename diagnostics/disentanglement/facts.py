"""A table of facts and its questions, and which facts a model knows."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray

from diagnostics.pairs.tasks import checked_tokenizer, continuation
from interventions.errors import ResultError, TextError
from interventions.models.causal_model import CausalModel
from interventions.recording import record
from interventions.replaying.replay import unembed
from interventions.texts.inputs import check_prompts, encode
from interventions.texts.tables import csv_rows, read_text

SLOT = "{}"
_BATCH = 128
"""prompts in one pass"""


@dataclass(frozen=True)
class Facts:
    """Entities, the value of each attribute of each, and questions that end where the value stands."""

    entities: tuple[str, ...]
    values: dict[str, tuple[str, ...]]
    """attribute -> value of each entity"""
    questions: dict[str, dict[str, str]]
    """context -> attribute -> text with `{}` for the entity; all of one context are the same up to the entity"""
    source: str
    """names of the files"""

    @property
    def attributes(self) -> tuple[str, ...]:
        """Names of the attributes."""
        return tuple(self.values)

    def only(self, names: Sequence[str]) -> "Facts":
        """The facts of some entities. Raises `TextError` for one that is not there."""
        if unknown := [name for name in names if name not in self.entities]:
            raise TextError(f"no entity {unknown[0]!r} in {self.source}; known: {', '.join(self.entities)}")
        some = [self.entities.index(name) for name in names]
        return replace(
            self, entities=tuple(names), values={a: tuple(own[i] for i in some) for a, own in self.values.items()}
        )

    @property
    def sha256(self) -> str:
        """Of all facts and questions, in hexadecimal."""
        return hashlib.sha256(repr((self.entities, self.values, self.questions)).encode()).hexdigest()


def load_facts(facts: str | Path | None = None, questions: str | Path | None = None) -> Facts:
    """Facts and questions from two CSV files; by default the packaged ones (countries: capital, continent, language; ours).

    facts: a column `entity` and one for each attribute. questions: columns context, attribute, template; a template holds `{}` once,
    for the entity, and ends before the value. All templates of a context are the same up to the entity, so that the entity's
    activation is one for all attributes. Raises `TextError` for files that are not so, and for fewer than two attributes.
    """
    own = files("diagnostics.disentanglement") / "templates"
    where = [Path(str(own / name)) if path is None else Path(path) for name, path in (("countries.csv", facts), ("questions.csv", questions))]  # fmt: skip
    table, asked = ([row for _, row in csv_rows(path, read_text(path))] for path in where)
    if not table or "entity" not in table[0] or len(table[0]) < 3:
        seen = ", ".join(map(repr, table[0])) if table else "no rows"
        raise TextError(
            f"{where[0]}: {seen}; expected columns entity and two attributes or more, and a row each entity"
        )
    entities = tuple(row["entity"].strip() for row in table)
    if twice := [name for name, n in Counter(entities).items() if n > 1]:
        raise TextError(f"{where[0]}: {twice[0]!r} stands in two rows; give each entity once")
    values = {name: tuple(row[name].strip() for row in table) for name in table[0] if name != "entity"}
    if empty := [(name, entities[i]) for name, own in values.items() for i, v in enumerate((*own, *entities)) if not v]:
        raise TextError(f"{where[0]}: no {empty[0][0]} of {empty[0][1]!r}; expected a value in each column")
    return Facts(entities, values, _questions(where[1], asked, tuple(values)), " and ".join(p.name for p in where))


def _questions(path: Path, rows: list[dict[str, str]], attributes: tuple[str, ...]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        if missing := {"context", "attribute", "template"} - set(row):
            raise TextError(f"{path} has no column {min(missing)!r}; expected context, attribute, template")
        if row["template"].count(SLOT) != 1:
            raise TextError(f"{path}: template {row['template']!r}; expected {SLOT} once, for the entity")
        found.setdefault(row["context"], {})[row["attribute"]] = row["template"].rstrip()
    for context, own in found.items():
        if set(own) != set(attributes):
            raise TextError(
                f"{path}: context {context!r} asks for {', '.join(own)}; expected one template for each of {', '.join(attributes)}"
            )
        if len({template.split(SLOT)[0] for template in own.values()}) > 1:
            raise TextError(
                f"{path}: templates of context {context!r} differ before the entity; make them the same up to {SLOT}"
            )
    if not found:
        raise TextError(f"{path} holds no template; expected one for each of {', '.join(attributes)}")
    return {context: {name: own[name] for name in attributes} for context, own in found.items()}


@dataclass(frozen=True)
class Known:
    """Entities in contexts of which the model knows every attribute, with their prompts: one for each attribute, side by side."""

    facts: Facts
    entity: Int[ndarray, "unit"]
    context: Int[ndarray, "unit"]
    position: Int[ndarray, "unit"]
    """of the entity's last token, the same in the prompts of all attributes"""
    tokens: list[list[int]]
    """prompt `unit · attributes + attribute`"""
    answer: Int[ndarray, "unit attribute"]
    """first token of the value"""
    count: dict[str, Any] = field(default_factory=dict)
    """for the provenance: entities asked about, and known, by attribute; what was left out"""

    def prompt(self, unit: Int[ndarray, "row"], attribute: int) -> Int[torch.Tensor, "row"]:
        """The prompt that asks for an attribute of units."""
        return torch.from_numpy(np.asarray(unit) * len(self.facts.attributes) + attribute)


@torch.no_grad()
def known_facts(model: CausalModel, facts: Facts) -> Known:
    """The entities, context by context, for which the first token of every attribute's value is the model's most likely next token.

    Left out and counted: entities whose tokens are not the same in the questions of all attributes, values that are glued to the
    question's last word, and what the model does not know. Raises `TextError` for a model without a tokenizer that knows character
    offsets, `ResultError` where nothing is known.
    """
    tokenizer = checked_tokenizer(model.tokenizer)
    left_out: Counter[str] = Counter()
    prompts: list[list[int]] = []
    units: list[tuple[int, int, int]] = []
    answers: list[list[int]] = []
    for c, questions in enumerate(facts.questions.values()):
        for e, name in enumerate(facts.entities):
            own = [_asked(t, name, facts.values[a][e], tokenizer) for a, t in questions.items()]
            if any(one is None for one in own):
                left_out["value glued to the question, or an entity without a token of its own"] += 1
            elif len({(tuple(ids[: at + 1]), at) for ids, at, _ in own if own}) > 1:  # type: ignore[misc]
                left_out["tokens up to the entity differ between attributes"] += 1
            else:
                units.append((c, e, own[0][1]))  # type: ignore[index]
                prompts += [one[0] for one in own]  # type: ignore[index]
                answers.append([one[2] for one in own])  # type: ignore[index]
    if not units:
        raise TextError(f"no question of {facts.source} can be asked: {dict(left_out)}")
    check_prompts(model, prompts)
    answer = np.array(answers)
    right = (_top(model, prompts) == answer.reshape(-1)).reshape(answer.shape)
    keep = np.flatnonzero(right.all(1))
    contexts, names, attributes = list(facts.questions), np.array(units), facts.attributes
    count = {
        "entities": len(facts.entities), "asked": len(units),
        "known": {name: int(right[:, i].sum()) for i, name in enumerate(attributes)} | {"all": len(keep)},
        "by_context": {context: int((names[keep, 0] == c).sum()) for c, context in enumerate(contexts)},
        "left_out": dict(left_out),
    }  # fmt: skip
    if not len(keep):
        raise ResultError(
            f"of {len(units)} entities in contexts the model knows {count['known']}; expected some of which it knows every attribute: "
            "give facts that it knows, or questions that it understands"
        )
    n = len(attributes)
    return Known(
        facts, names[keep, 1], names[keep, 0], names[keep, 2], [prompts[u * n + a] for u in keep for a in range(n)],
        answer[keep], count | {"names": [facts.entities[e] for e in sorted(set(names[keep, 1].tolist()))]},
    )  # fmt: skip


def _asked(template: str, entity: str, value: str, tokenizer: Any) -> tuple[list[int], int, int] | None:
    """Token ids, the position of the entity's last token, the first token of the value; None where a word glues to another."""
    before, _ = template.split(SLOT)
    text, end = template.replace(SLOT, entity), len(before) + len(entity)
    encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
    ids = encode(text, tokenizer)
    ends = [i for i, (start, stop) in enumerate(encoded["offset_mapping"]) if stop == end and start < stop]
    said = continuation(text, f" {value}", ids, tokenizer)
    return (ids, ends[-1], said[0]) if ends and said else None


def _top(model: CausalModel, prompts: list[list[int]]) -> Float[ndarray, "prompt"]:
    """The most likely token after each prompt."""
    found = []
    for start in range(0, len(prompts), _BATCH):
        recording = record(model, prompts[start : start + _BATCH], keep_cache=False)
        rows = torch.arange(len(recording.length), device=model.device)
        last = recording.final_hidden[rows, (recording.length - 1).to(model.device)]
        found.append(unembed(recording, last).argmax(-1).cpu().numpy())
    return np.concatenate(found)

"""Concepts: texts with and without a concept, and its target tokens."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from interventions.direct_logits import token_text
from interventions.errors import TextError
from interventions.texts.groups import first_of_group, held_groups
from interventions.texts.labelled import in_turn
from interventions.texts.prompts import Prompts, tokenize

N_TARGETS = 10
"""number of target tokens where none are given"""
MIN_OWN_TEXTS = 3
"""smallest number of a concept's ranking texts with a token that may become a target"""
_FEW = 2  # smallest number of groups of texts with, and without, a concept in each half


class LabelledTexts(Protocol):
    """Texts with the class and the group of each, as from `load_labelled`."""

    @property
    def texts(self) -> list[str]: ...
    @property
    def labels(self) -> list[str]: ...
    @property
    def groups(self) -> list[str]: ...


@dataclass(frozen=True)
class Concept:
    """One concept of `ConceptTexts`; texts are given by their index."""

    name: str
    own: tuple[int, ...]
    """texts with the concept"""
    others: tuple[int, ...]
    """texts without it"""
    targets: tuple[int, ...] = ()
    """ids of its target tokens"""
    positions: Mapping[int, tuple[int, ...]] | None = None
    """positions of the concept in its own texts; None: every token"""


@dataclass(frozen=True)
class ConceptTexts:
    """Texts and their concepts. Raises `TextError` for invalid concepts.

    Half of the texts of each class (or of each set of concepts) rank latents and train probes; effects are measured on the other half.
    Groups of texts are not split.
    """

    name: str
    tokens: list[list[int]]
    """token ids, `[text, pos]`, ragged"""
    special: list[list[bool]]
    """true for special tokens, which are neither edited nor counted"""
    ranking: tuple[bool, ...]
    """true for texts of the ranking half, false for the measuring half"""
    concepts: tuple[Concept, ...]
    labels: tuple[str, ...] | None = None
    """the class of each text, where every text has one: the name of a concept"""
    provenance: dict[str, Any] = field(default_factory=dict)
    groups: tuple[int, ...] = ()
    """the group of each text, as the index of its first text; the jackknife deletes groups; by default each text is its own"""

    def __post_init__(self) -> None:
        n = len(self.tokens)
        object.__setattr__(self, "groups", tuple(map(int, first_of_group(self.groups or range(n)))))
        if {len(self.special), len(self.ranking), len(self.groups)} != {n} or not self.concepts:
            raise TextError(
                f"{self.name}: {n} texts, {len(self.special)} lists of special tokens, {len(self.ranking)} sides, "
                f"{len(self.groups)} groups, {len(self.concepts)} concepts; expected as many of each text, and a concept"
            )
        if torn := [i for i, first in enumerate(self.groups) if self.ranking[i] is not self.ranking[first]]:
            raise TextError(
                f"{self.name}: texts {self.groups[torn[0]]} and {torn[0]} are of one group, and one ranks, one measures; "
                "expected whole groups on one side"
            )
        if self.labels is not None and (len(self.labels) != n or {c.name for c in self.concepts} - set(self.labels)):
            raise TextError(
                f"{self.name}: labels {sorted(set(self.labels))} of {len(self.labels)} texts; expected one a text"
            )
        if len({c.name for c in self.concepts}) < len(self.concepts):
            raise TextError(f"{self.name}: concepts {[c.name for c in self.concepts]}; give each a name of its own")
        for concept in self.concepts:
            self._check(concept)

    def _check(self, concept: Concept) -> None:
        own, others = set(concept.own), set(concept.others)
        if wrong := [i for i in own | others if not 0 <= i < len(self.tokens)]:
            raise TextError(f"{concept.name}: text {wrong[0]} does not exist; there are {len(self.tokens)}, from 0")
        if own & others:
            raise TextError(f"{concept.name}: text {min(own & others)} both has the concept and has not")
        for which, some in (("with", own), ("without", others)):
            for what, side in (("rank", True), ("measure", False)):
                if len({self.groups[i] for i in some if self.ranking[i] is side}) < _FEW:
                    raise TextError(
                        f"{concept.name}: fewer than {_FEW} texts (or groups of texts) {which} the concept to {what} on, of "
                        f"{len(some)}; give more texts, in more groups"
                    )
        for text, where in (concept.positions or {}).items():
            if text not in own or any(not 0 <= p < len(self.tokens[text]) for p in where):
                raise TextError(
                    f"{concept.name}: positions {list(where)} of text {text}, which has no such token of it"
                )

    def side(self, texts: Sequence[int], ranking: bool) -> list[int]:
        """Those of `texts` in the ranking half, or in the measuring half."""
        return [i for i in texts if self.ranking[i] is ranking]

    @property
    def sha256(self) -> str:
        """Of texts, sides, concepts and groups."""
        parts = [[c.name, c.own, c.others, c.targets, sorted((c.positions or {}).items())] for c in self.concepts]
        said = json.dumps([self.tokens, self.special, self.ranking, parts, self.labels, self.groups])
        return hashlib.sha256(said.encode()).hexdigest()


def labelled_concepts(
    labelled: LabelledTexts,
    tokenizer: Any,
    *,
    classes: Sequence[str] | None = None,
    per_class: int = 48,
    max_length: int = 48,
    min_length: int = 8,
    n_targets: int = N_TARGETS,
    seed: int = 0,
) -> ConceptTexts:
    """A concept for each class: its own texts, and as many texts of the other classes in equal shares.

    per_class: texts of each class, cut at `max_length` tokens, one of each group in turn; about half of them rank, whole groups (`held_groups`).
    classes: the concepts (default: all); texts of the other classes are still used as texts without it. Of texts that begin with
    the same `max_length` tokens one is used. Target tokens are `telling_tokens` of the ranking half. Raises `TextError` for fewer
    than two classes and too few texts or groups. Source: ours.
    """
    known = sorted(set(labelled.labels))
    wanted = known if classes is None else list(classes)
    if len(known) < 2 or not wanted or not set(wanted) <= set(known):
        raise TextError(f"classes {known}, asked for {wanted}; expected two or more, and those asked for among them")
    tokens: list[list[int]] = []
    special: list[list[bool]] = []
    labels: list[str] = []
    groups: list[str] = []
    group_of = dict(zip(labelled.texts, labelled.groups, strict=True))
    dropped: Counter[str] = Counter()
    for name in known:
        texts = [text for text, label in zip(labelled.texts, labelled.labels, strict=True) if label == name]
        some = tokenize(texts, tokenizer, max_length=max_length, min_length=min_length, seed=seed)
        dropped.update({f"{name}: {why}": n for why, n in some.dropped.items()})
        kept, seen = [], {tuple(ids) for ids in tokens}
        for i in in_turn([group_of[text] for text in some.texts]):
            ids = some.tokens[i]
            if len(kept) == per_class:
                break
            if tuple(ids) in seen:
                dropped[f"{name}: begins as a text of another class"] += 1
            else:
                seen.add(tuple(ids))
                kept.append(i)
        if len(kept) < per_class:
            dropped[f"{name}: fewer texts than asked for"] = per_class - len(kept)
        tokens += [some.tokens[i] for i in kept]
        special += [some.special[i] for i in kept]
        labels += [name] * len(kept)
        groups += [group_of[some.texts[i]] for i in kept]
    rank = held_groups(labels, groups, 0.5, seed)
    ranking = tuple(group in rank for group in groups)
    concepts = []
    for name in wanted:
        own = [i for i, label in enumerate(labels) if label == name]
        others = [i for side in (True, False) for i in _without(name, labels, ranking, side)]
        concepts.append(Concept(name, tuple(own), tuple(sorted(others))))
    origin = {k: getattr(labelled, k) for k in ("sha256", "licence", "source", "dropped") if hasattr(labelled, k)}
    provenance = {**origin, "max_length": max_length, "texts_dropped": dict(dropped), "seed": seed}
    found = ConceptTexts(
        getattr(labelled, "name", "labelled"),
        tokens,
        special,
        ranking,
        tuple(concepts),
        tuple(labels),
        provenance,
        tuple(first_of_group(groups).tolist()),
    )
    return with_targets(found, n_targets)


def _without(name: str, labels: Sequence[str], ranking: Sequence[bool], side: bool) -> list[int]:
    """As many texts of other classes as of this one in a half, one of each class in turn."""
    here = [i for i, ranks in enumerate(ranking) if ranks is side]
    queues = [[i for i in here if labels[i] == other] for other in dict.fromkeys(labels) if other != name]
    order = [queue[turn] for turn in range(max(map(len, queues))) for queue in queues if turn < len(queue)]
    return order[: sum(labels[i] == name for i in here)]


def token_concepts(
    prompts: Prompts, targets: Mapping[str, Sequence[int]], *, n_texts: int = 48, seed: int = 0
) -> ConceptTexts:
    """A concept for each set of target tokens, present where one of them comes next.

    Position p of a text has the concept where token p + 1 is a target. Uses the first `n_texts` prompts with, and without, a target;
    concepts may share texts. Raises `TextError` where there are too few of either. Source: ours.
    """
    concepts, used = [], Counter()
    for name, ids in targets.items():
        wanted = {int(i) for i in ids}
        where = {
            i: tuple(p for p in range(1, len(row) - 1) if row[p + 1] in wanted) for i, row in enumerate(prompts.tokens)
        }
        own = [i for i, found in where.items() if found][:n_texts]
        others = [i for i, row in enumerate(prompts.tokens) if not wanted & set(row)][: len(own)]
        used.update((*own, *others))
        concepts.append(Concept(name, tuple(own), tuple(others), tuple(sorted(wanted)), {i: where[i] for i in own}))
    provenance = {**prompts.provenance, "seed": seed}
    sides = _sides(prompts.tokens, concepts, seed)
    return ConceptTexts("tokens", prompts.tokens, prompts.special, sides, tuple(concepts), None, provenance)


def given_concepts(
    name: str,
    texts: Mapping[str, tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]]],
    *,
    targets: Mapping[str, Sequence[int]] | None = None,
    special: Sequence[int] = (),
    n_targets: int = N_TARGETS,
    seed: int = 0,
) -> ConceptTexts:
    """Concepts by name, each from token ids of texts with and without it; equal texts are merged.

    targets: token ids of each concept (default: `telling_tokens`). special: ids that are neither edited nor counted.
    """
    place: dict[tuple[int, ...], int] = {}
    concepts = []
    for concept, sides in texts.items():
        own, others = (
            tuple(dict.fromkeys(place.setdefault(tuple(map(int, ids)), len(place)) for ids in some)) for some in sides
        )
        concepts.append(Concept(concept, own, others, tuple(map(int, (targets or {}).get(concept, ())))))
    tokens = [list(ids) for ids in place]
    flags = [[token in set(special) for token in ids] for ids in tokens]
    found = ConceptTexts(name, tokens, flags, _sides(tokens, concepts, seed), tuple(concepts), None, {"seed": seed})
    return with_targets(found, n_targets)


def _sides(tokens: Sequence[Sequence[int]], concepts: Sequence[Concept], seed: int) -> tuple[bool, ...]:
    """Every second text with the same concepts is in the ranking half, in an order from the seed and the texts."""
    own, others = ([set(some) for some in part] for part in ([c.own for c in concepts], [c.others for c in concepts]))
    kinds = [tuple((i in a) - (i in b) for a, b in zip(own, others, strict=True)) for i in range(len(tokens))]
    key = [hashlib.blake2b(f"{seed}:{list(ids)}".encode(), digest_size=8).digest() for ids in tokens]
    ranking = [False] * len(tokens)
    for kind in dict.fromkeys(kinds):
        some = sorted((i for i, other in enumerate(kinds) if other == kind), key=lambda i: key[i])
        for i in some[::2]:
            ranking[i] = True
    return tuple(ranking)


def with_targets(texts: ConceptTexts, n: int = N_TARGETS) -> ConceptTexts:
    """With `telling_tokens` as targets of concepts without any."""
    return replace(
        texts,
        concepts=tuple(c if c.targets else replace(c, targets=telling_tokens(texts, c, n)) for c in texts.concepts),
    )


def telling_tokens(texts: ConceptTexts, concept: Concept, n: int = N_TARGETS) -> tuple[int, ...]:
    """The tokens whose presence distinguishes a concept's texts from the others, on the ranking half.

        log((a + ½)/(A − a + ½)) − log((b + ½)/(B − b + ½)),     a of A texts with the concept have the token, b of B without

    The n tokens with the largest positive log-odds among those in `MIN_OWN_TEXTS` texts with the concept or more, without special
    tokens. Raises `TextError` where there is none. Source: ours.
    """
    own, others = (texts.side(some, True) for some in (concept.own, concept.others))
    with_it, without = (
        Counter(
            token
            for i in some
            for token in {t for t, special in zip(texts.tokens[i], texts.special[i], strict=True) if not special}
        )
        for some in (own, others)
    )
    odds = {
        token: float(_log_odds(n_own, len(own)) - _log_odds(without[token], len(others)))
        for token, n_own in with_it.items()
        if n_own >= min(MIN_OWN_TEXTS, len(own))
    }
    best = sorted((token for token, value in odds.items() if value > 0), key=lambda t: (-odds[t], -with_it[t], t))[:n]
    if not best:
        raise TextError(
            f"{concept.name}: no token occurs more often in its {len(own)} texts than in the {len(others)} others; give targets"
        )
    return tuple(best)


def _log_odds(n: int, of: int) -> float:
    return float(np.log((n + 0.5) / (of - n + 0.5)))


def mask(texts: ConceptTexts) -> Bool[ndarray, "text pos"]:
    """Table of special tokens, right-padded with False."""
    table = np.zeros((len(texts.tokens), max(map(len, texts.tokens))), dtype=bool)
    for row, flags in zip(table, texts.special, strict=True):
        row[: len(flags)] = flags
    return table


def described_texts(texts: ConceptTexts, tokenizer: Any) -> dict[str, Any]:
    """Provenance of a data set: numbers of texts and groups in each half, and each concept's target tokens."""

    def n_groups(some: Sequence[int], ranking: bool) -> int:
        return len({texts.groups[i] for i in texts.side(some, ranking)})

    def words(ids: Sequence[int]) -> list[str]:
        return [str(i) if tokenizer is None else token_text(i, tokenizer) for i in ids]

    concepts = {
        c.name: {
            "ranking": [len(texts.side(c.own, True)), len(texts.side(c.others, True))],
            "measuring": [len(texts.side(c.own, False)), len(texts.side(c.others, False))],
            "ranking_groups": [n_groups(c.own, True), n_groups(c.others, True)],
            "measuring_groups": [n_groups(c.own, False), n_groups(c.others, False)],
            "targets": words(c.targets),
        }
        for c in texts.concepts
    }
    measured = {i for c in texts.concepts for i in texts.side((*c.own, *c.others), False)}
    return {
        **texts.provenance,
        "name": texts.name,
        "texts": len(texts.tokens),
        "groups": len(set(texts.groups)),
        "measured": {"texts": len(measured), "groups": len({texts.groups[i] for i in measured})},
        "concepts": concepts,
        "sha256": texts.sha256,
    }

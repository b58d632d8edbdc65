"""Training and held-out texts of each task: one class against the rest, balanced, groups not split."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy import ndarray

from interventions.errors import ResultError
from interventions.texts.groups import first_of_group, held_groups
from interventions.texts.labelled import MIN_GROUPS, in_turn, text_key


@dataclass(frozen=True)
class Task:
    """Training and held-out texts, half of each from the class and half from the others."""

    train: Int[ndarray, "train"]
    """texts for fitting"""
    test: Int[ndarray, "test"]
    """held-out texts; `train` has no text of their groups"""
    y_train: Bool[ndarray, "train"]
    """true for the class"""
    y_test: Bool[ndarray, "test"]
    group_test: Int[ndarray, "test"]
    """the group of each held-out text, as the index of the group's first text"""


def tasks(
    texts: Sequence[str],
    labels: Sequence[str],
    usable: Bool[ndarray, "text"],
    *,
    groups: Sequence[str] | None = None,
    test_share: float = 0.3,
    seed: int = 0,
) -> dict[str, Task]:
    """A task for each class against the rest; two classes give one task, for the later one by name.

    groups: of each text (None: each its own). Whole groups are held out, as close to `test_share` of each class' texts as possible
    (`held_groups`), the same for every task and SAE. Each part has as many texts of the class as of the others, these in equal numbers
    by class, as many as possible; a class gives one text of each group in turn, in the order of blake2b(seed, text). Raises
    `ResultError` for a share outside (0, 1), a class of fewer than `MIN_GROUPS` groups, and a part without texts of both kinds.
    """
    if not 0 < test_share < 1:
        raise ResultError(f"a held-out share of {test_share}; expected a number between 0 and 1, such as 0.3")
    own = list(texts if groups is None else groups)
    left: list[int] = np.flatnonzero(usable).tolist()
    held = held_groups([labels[i] for i in left], [own[i] for i in left], test_share, seed)
    named, number = sorted(set(labels)), first_of_group(own)
    members: dict[str, list[int]] = {}
    for name in named:
        some = sorted((i for i in left if labels[i] == name), key=lambda i: text_key(seed, "task", texts[i]))
        members[name] = [some[i] for i in in_turn([own[i] for i in some])]
        if (n := len({own[i] for i in some})) < MIN_GROUPS:
            raise ResultError(
                f"class {name!r} has {len(some)} usable texts in {n} groups; a split into training and held-out groups needs "
                f"{MIN_GROUPS} or more: give more, or leave the class out"
            )
    found = {}
    for name in named[1:] if len(named) == 2 else named:
        parts = []
        for out in (False, True):
            side = {label: [i for i in some if (own[i] in held) == out] for label, some in members.items()}
            # Round after round through the other classes: equal numbers, whatever n is.
            others = sorted((k, label, i) for label in named if label != name for k, i in enumerate(side[label]))
            n = min(len(side[name]), len(others))
            if n < 1:
                raise ResultError(
                    f"class {name!r}: {len(side[name])} texts of it and {len(others)} of others are "
                    f"{'held out' if out else 'left to train on'}; a probe needs both: give groups of more equal size"
                )
            parts.append(np.array(side[name][:n] + [i for *_, i in others[:n]]))
        truth = [np.repeat([True, False], len(part) // 2) for part in parts]
        found[name] = Task(parts[0], parts[1], truth[0], truth[1], number[parts[1]])
    return found


def shuffled_labels(
    labels: Sequence[str], groups: Sequence[str], usable: Bool[ndarray, "text"], stream: torch.Generator
) -> list[str]:
    """Labels exchanged so that those of usable texts say nothing of the texts, while groups stay as they are.

    Texts of one group are alike, so single labels are not exchangeable: groups of one class exchange their labels as wholes, and the texts
    of a group of several classes exchange theirs within it. Each class keeps its number of groups, and each text without a group is one.
    Source: ours (restricted permutation, as in Winkler et al. 2015).
    """
    found, own = np.array(labels, dtype=object), np.array(groups, dtype=object)
    members: dict[str, list[int]] = {}
    for i in np.flatnonzero(usable):
        members.setdefault(own[i], []).append(int(i))
    pure = [some for some in members.values() if len({labels[i] for i in some}) == 1]
    order = torch.randperm(len(pure), generator=stream).tolist()
    for some, other in zip(pure, order, strict=True):
        found[some] = labels[pure[other][0]]
    for some in members.values():
        if len({labels[i] for i in some}) > 1:
            turned = torch.randperm(len(some), generator=stream).tolist()
            found[some] = [labels[some[i]] for i in turned]
    return found.tolist()


def split_seed(seed: int, number: int) -> int:
    """The seed of a run's `number`-th split: runs of different seeds share none."""
    return int.from_bytes(hashlib.blake2b(f"split/{seed}/{number}".encode(), digest_size=6).digest(), "little")

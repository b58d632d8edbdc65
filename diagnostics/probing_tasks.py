"""Which texts probes are fitted on and which they are judged on: one class against the rest, balanced."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray

from interventions.errors import ResultError
from interventions.labelled import text_key


@dataclass(frozen=True)
class Task:
    """Texts of one class and as many of the others, in training and held-out ones, both half of the class."""

    train: Int[ndarray, "train"]
    """which texts probes are fitted on"""
    test: Int[ndarray, "test"]
    """which they are judged on"""
    y_train: Bool[ndarray, "train"]
    """true for the class"""
    y_test: Bool[ndarray, "test"]


def tasks(
    texts: Sequence[str],
    labels: Sequence[str],
    usable: Bool[ndarray, "text"],
    *,
    test_share: float = 0.3,
    seed: int = 0,
) -> dict[str, Task]:
    """One class against the rest, for each class; two classes are one task, of the later one by name.

    n texts of the class, n of the others in equal numbers by class, n as large as both allow; the same share of both, rounded
    up, is held out. Which texts is decided by blake2b of seed and text, the same for every SAE.
    Raises `ResultError` for a share outside (0, 1), and where a side has fewer than two texts.
    """
    if not 0 < test_share < 1:
        raise ResultError(f"a held-out share of {test_share}; expected a number between 0 and 1, such as 0.3")
    named = sorted(set(labels))
    members = {name: [i for i, label in enumerate(labels) if label == name and usable[i]] for name in named}
    for some in members.values():
        some.sort(key=lambda i: text_key(seed, "task", texts[i]))
    found = {}
    for name in named[1:] if len(named) == 2 else named:
        # Round after round through the other classes: equal numbers, whatever n is.
        ranked = sorted((place, other, i) for other in named if other != name for place, i in enumerate(members[other]))
        sides = [members[name], [i for *_, i in ranked]]
        n = min(map(len, sides))
        held = math.ceil(test_share * n)
        if not 1 <= held < n:
            raise ResultError(
                f"class {name!r} has {len(sides[0])} usable texts, the others {len(sides[1])}; a probe needs two of each or more"
            )
        parts: list[list[int]] = [[], []]
        for side in sides:
            order = sorted(side[:n], key=lambda i: text_key(seed, "test", texts[i]))
            parts[0] += order[held:]
            parts[1] += order[:held]
        truth = [np.repeat([True, False], len(part) // 2) for part in parts]
        found[name] = Task(np.array(parts[0]), np.array(parts[1]), truth[0], truth[1])
    return found

"""Two binary attributes of texts, crossed: training texts on which they agree, balanced ones, and balanced held-out texts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray

from interventions.errors import ResultError
from interventions.texts.groups import held_groups
from interventions.texts.labelled import Labelled, text_key

BETWEEN = "/"
"""between the values of the two attributes in a label: english/question"""


def attributes_of(labelled: Labelled) -> tuple[tuple[str, str], tuple[str, str]]:
    """The two values of the first attribute and of the second, sorted. Raises `ResultError` for labels that are not two by two."""
    parts = [label.split(BETWEEN) for label in labelled.classes]
    first, second = (sorted({part[i] for part in parts if len(part) == 2}) for i in (0, 1))
    if len(parts) != 4 or any(len(part) != 2 for part in parts) or len(first) != 2 or len(second) != 2:
        raise ResultError(
            f"{labelled.name}: classes {', '.join(labelled.classes)}; expected four, each of two values of two attributes, such as "
            "english/question, english/statement, dutch/question, dutch/statement"
        )
    return (first[0], first[1]), (second[0], second[1])


@dataclass(frozen=True)
class Crossed:
    """One split of crossed texts; each side has as many texts of each of the four kinds."""

    train: Int[ndarray, "train"]
    test: Int[ndarray, "test"]
    values: Bool[ndarray, "text 2"]
    """of every text, whether it has the later value of the first and of the second attribute"""

    @property
    def agreeing(self) -> Int[ndarray, "some"]:
        """Training texts that have both later values or neither: on these one attribute tells the other."""
        return self.train[self.values[self.train, 0] == self.values[self.train, 1]]


def crossed_split(
    texts: Sequence[str], labels: Sequence[str], groups: Sequence[str], usable: Bool[ndarray, "text"],
    attributes: tuple[tuple[str, str], tuple[str, str]], test_share: float, seed: int,
) -> Crossed:  # fmt: skip
    """Whole groups held out, about `test_share` of each kind; then equal numbers of each kind, first by blake2b(seed, text).

    Raises `ResultError` where a side has no text of a kind.
    """
    left: list[int] = np.flatnonzero(usable).tolist()
    held = held_groups([labels[i] for i in left], [groups[i] for i in left], test_share, seed)
    sides = []
    for out in (False, True):
        cells: dict[str, list[int]] = {label: [] for label in sorted(set(labels))}
        for i in sorted(left, key=lambda i: text_key(seed, "crossed", texts[i])):
            if (groups[i] in held) == out:
                cells[labels[i]].append(i)
        n = min(len(some) for some in cells.values())
        if not n:
            raise ResultError(
                f"no text of {min(cells, key=lambda label: len(cells[label]))!r} is {'held out' if out else 'left to train on'}; give more"
            )
        sides.append(np.array([i for some in cells.values() for i in some[:n]]))
    parts = [label.split(BETWEEN) for label in labels]
    values = np.array([[part[i] == attributes[i][1] for i in (0, 1)] for part in parts])
    return Crossed(sides[0], sides[1], values)

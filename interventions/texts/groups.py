"""Groups of texts: whole groups on one side of a split, and sums without each of them."""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from interventions.texts.labelled import text_key


def held_groups(labels: Sequence[str], groups: Sequence[str], share: float, seed: int) -> set[str]:
    """Groups that are held out together: of each class as close to `share` of its texts as whole groups come.

    A group counts for the class of most of its texts. Those of a class are taken in the order of blake2b(seed, group) while that
    brings their texts no further from share · texts, and at least one is taken and one left, where there are two. Groups of a text each:
    the nearest whole number of texts. Source: ours.
    """
    size = Counter(groups)
    most: dict[str, Counter[str]] = {}
    for label, group in zip(labels, groups, strict=True):
        most.setdefault(group, Counter())[label] += 1
    of: dict[str, list[str]] = {}
    for group, counts in most.items():
        of.setdefault(min(counts, key=lambda label: (-counts[label], label)), []).append(group)
    held: set[str] = set()
    for own in of.values():
        own.sort(key=lambda group: text_key(seed, "held out", group))
        wanted, n = share * sum(size[group] for group in own), 0
        for place, group in enumerate(own[:-1]):
            if place and abs(n + size[group] - wanted) > abs(n - wanted):
                break
            held.add(group)
            n += size[group]
    return held


def first_of_group(groups: Iterable[Hashable]) -> Int[ndarray, "text"]:
    """Each text's group as the place of its first text."""
    place: dict[Hashable, int] = {}
    return np.array([place.setdefault(group, i) for i, group in enumerate(groups)], dtype=int)

"""Token patterns, the reversed trie that holds them, and where in a text they match."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray

ANY, END, NONE = -1, -2, -3
"""In place of a token: any token; the end of a pattern; no token, beside a text's prompts."""
Pattern = tuple[int, ...]
"""Tokens from the last, at which the latent fires, back to the first; `ANY` for any token."""
Trie = dict[int, Any]
"""A node: children by token or `ANY`, and `END` where a pattern ends."""


def trie_of(patterns: Iterable[Pattern]) -> Trie:
    """The reversed trie of some patterns."""
    root: Trie = {}
    for pattern in patterns:
        node = root
        for token in pattern:
            node = node.setdefault(token, {})
        node[END] = {}
    return root


def padded(tokens: Sequence[Sequence[int]]) -> Int[ndarray, "prompt pos"]:
    """Prompts as one array, `NONE` past their ends."""
    found = np.full((len(tokens), max(map(len, tokens))), NONE)
    for row, some in zip(found, tokens, strict=True):
        row[: len(some)] = some
    return found


def matches(trie: Trie, tokens: Int[ndarray, "prompt pos"]) -> Bool[ndarray, "prompt pos"]:
    """At which tokens some pattern ends. A pattern, with its wildcards, must lie within its prompt.

    Every branch is followed. Published code goes the way of the exact token alone where there is one, and so misses patterns that
    match by a wildcard beside it.
    """
    found = np.zeros(tokens.shape, dtype=bool)

    def walk(node: Trie, depth: int, here: ndarray) -> None:
        nonlocal found
        if END in node:  # a longer pattern matches nowhere else
            found |= here
            return
        back = np.full_like(tokens, NONE)
        back[:, depth:] = tokens[:, : tokens.shape[1] - depth]
        for token, child in node.items():
            now = here & (back != NONE if token == ANY else back == token)
            if now.any():
                walk(child, depth + 1, now)

    walk(trie, 0, tokens != NONE)
    return found


def best_tokens(
    hits: Int[ndarray, "token"], seen: Int[ndarray, "token"], active: int, most: int
) -> Int[ndarray, "chosen"]:
    """At most so many of the tokens, the set of largest F1 = 2 Σ hits / (active + Σ seen); exact.

    hits, seen: occurrences of each token at which the latent is active, and all. active: number of all tokens at which it is.
    For a given λ the best set holds the tokens of largest 2·hits − λ·seen above 0; λ, the F1 of that set, rises to the largest
    (Dinkelbach 1967).
    """
    chosen, value = np.zeros(0, dtype=int), 0.0
    while True:
        gain = 2 * hits - value * seen
        order = np.argsort(-gain, kind="stable")[:most]
        order = order[gain[order] > 0]
        now = 2 * hits[order].sum() / max(1, active + seen[order].sum())
        if now <= value:
            return chosen
        chosen, value = order, float(now)

"""Tries against patterns tried one by one at each token; the best set of tokens against every set."""

import itertools

import numpy as np

from diagnostics.token_patterns.tries import ANY, END, best_tokens, matches, padded, trie_of


def ends(pattern: tuple[int, ...], prompt: list[int], at: int) -> bool:
    """Whether a pattern, last token first, ends at a position."""
    return at + 1 >= len(pattern) and all(t in (ANY, prompt[at - i]) for i, t in enumerate(pattern))


def test_trie_matches_like_its_single_patterns():
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 3, n).tolist() for n in (1, 2, 7, 12, 12)]
    for _ in range(60):
        patterns = [tuple(rng.integers(-1, 3, rng.integers(1, 5)).tolist()) for _ in range(rng.integers(1, 6))]
        found = matches(trie_of(patterns), padded(prompts))
        for row, prompt in zip(found, prompts, strict=True):
            by_hand = [any(ends(p, prompt, i) for p in patterns) for i in range(len(prompt))]
            assert row.tolist() == by_hand + [False] * (12 - len(prompt)), patterns


def test_wildcard_is_followed_beside_an_exact_token():
    trie = trie_of([(1, 2, 3), (1, ANY, 4)])
    assert set(trie[1]) == {2, ANY} and END in trie[1][2][3]
    assert matches(trie, padded([[4, 2, 1]])).tolist() == [[False, False, True]]  # the branch of token 2 ends in 3 only


def test_best_tokens_have_the_largest_f1_of_all_sets():
    rng = np.random.default_rng(1)
    for _ in range(40):
        seen = rng.integers(1, 20, 6)
        hits = rng.binomial(seen, rng.random(6))
        active, most = int(hits.sum()) + int(rng.integers(0, 10)), int(rng.integers(1, 5))

        def f1(some, hits=hits, seen=seen, active=active):
            some = list(some)
            return 2 * hits[some].sum() / max(1, active + seen[some].sum())

        every = [c for n in range(most + 1) for c in itertools.combinations(range(6), n)]
        chosen = best_tokens(hits, seen, active, most)
        assert len(chosen) <= most and np.isclose(f1(chosen), max(map(f1, every)))

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from diagnostics.sampling.tokens import (
    Pairs,
    cross_prompt_pairs,
    generator,
    hash_keys,
    matching_pairs,
    ranked_tokens,
    token_filter,
)
from interventions.errors import ResultError, TextError

LENGTH = np.array([12, 3, 30, 7, 12, 1, 25])


def targets(pairs: Pairs) -> list[tuple[int, int]]:
    return list(zip(pairs.target_prompt.tolist(), pairs.target_position.tolist(), strict=True))


def sources(pairs: Pairs) -> list[tuple[int, int]]:
    return list(zip(pairs.source_prompt.tolist(), pairs.source_position.tolist(), strict=True))


# Random streams


def test_a_generator_depends_on_its_labels_alone():
    def first(*labels):
        return torch.randn(4, generator=generator(*labels)).tolist()

    once = first(0, "direction_norm", 3)
    first(0, "direction_norm", 4)  # what is drawn elsewhere changes nothing
    assert first(0, "direction_norm", 3) == once
    others = [first(1, "direction_norm", 3), first(0, "other", 3), first(0, "direction_norm", 4)]
    assert len({tuple(x) for x in [once, *others]}) == 4
    assert generator(0, "a").device.type == "cpu"


def test_adding_rows_changes_no_key():
    prompt, position = np.repeat(np.arange(50), 40), np.tile(np.arange(40), 50)
    all_keys = hash_keys(3, "x", prompt, position)
    some = np.random.default_rng(0).permutation(len(prompt))[:77]
    assert (hash_keys(3, "x", prompt[some], position[some]) == all_keys[some]).all()
    assert len(np.unique(all_keys)) == len(all_keys)
    for other in (hash_keys(4, "x", prompt, position), hash_keys(3, "y", prompt, position)):
        assert (other != all_keys).all()
    swapped = hash_keys(3, "x", position, prompt)
    assert (swapped == all_keys)[prompt != position].sum() == 0  # the columns do not commute


def test_keys_are_uniform_bit_by_bit():
    keys = hash_keys(0, "x", np.arange(4000))
    ones = np.array([((keys >> np.uint64(bit)) & np.uint64(1)).mean() for bit in range(64)])
    assert (np.abs(ones - 0.5) < 5 * 0.5 / np.sqrt(4000)).all()  # 5 standard deviations of a fair coin


def test_ranked_tokens_are_a_seeded_permutation():
    prompt, position = ranked_tokens(LENGTH, 0, "target")
    every = [(p, q) for p, n in enumerate(LENGTH) for q in range(n)]
    assert sorted(zip(prompt.tolist(), position.tolist(), strict=True)) == every
    assert list(zip(prompt.tolist(), position.tolist(), strict=True)) != every
    other, _ = ranked_tokens(LENGTH, 1, "target")
    assert not (other == prompt).all()


# Random pairs


@given(
    st.lists(st.integers(1, 30), min_size=2, max_size=12), st.integers(1, 60), st.integers(1, 40), st.integers(0, 10**6)
)
def test_pairs_join_tokens_of_different_prompts_each_used_once(lengths, n, fewer, seed):
    length = np.array(lengths)
    try:
        pairs = cross_prompt_pairs(length, n, seed)
    except TextError:
        assert length.sum() - length.max() < 2 * n  # there is no such error with tokens enough in other prompts
        assume(False)
        return
    assert len(pairs) == n
    assert (pairs.target_prompt != pairs.source_prompt).all()
    assert len(set(targets(pairs))) == len(set(sources(pairs))) == n
    for prompt, position in (*targets(pairs), *sources(pairs)):
        assert 0 <= prompt < len(length)
        assert 0 <= position < length[prompt]
    again, start = cross_prompt_pairs(length, n, seed), cross_prompt_pairs(length, min(fewer, n), seed)
    assert (targets(again), sources(again)) == (targets(pairs), sources(pairs))
    assert (targets(start), sources(start)) == (targets(pairs)[: len(start)], sources(pairs)[: len(start)])
    if n > 20:
        other = cross_prompt_pairs(length, n, seed + 1)
        assert targets(other) != targets(pairs) and sources(other) != sources(pairs)


def test_take_keeps_targets_and_sources_together():
    pairs = cross_prompt_pairs(LENGTH, 20, 0)
    mask = np.arange(20) % 3 == 0
    for some in (pairs.take(mask), pairs.take(np.flatnonzero(mask))):
        assert targets(some) == targets(pairs)[::3]
        assert sources(some) == sources(pairs)[::3]


@pytest.mark.parametrize(
    ("length", "n", "message"),
    [
        ([40], 3, "1 prompt; .*give two or more"),
        ([3, 3], 4, "6 tokens for 4 pairs; give more text or ask for fewer"),
        ([100, 1], 50, "no source left for pair .* of 50; give more prompts"),
    ],
)
def test_too_little_text_raises(length, n, message):
    with pytest.raises(TextError, match=message):
        cross_prompt_pairs(np.array(length), n, 0)


# Unusable tokens


def planted(seed: int = 0):
    """Two layers, three prompts of 6, 5 and 4 tokens; norms near 1, one token for each reason, rubbish in the padding."""
    x = torch.nn.functional.normalize(torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)
    x = x * (1 + 0.01 * torch.arange(6)[:, None])
    special = np.zeros((3, 6), dtype=bool)
    special[0, 1] = special[1, 4] = True
    x[0, 0, 2, 3] = float("nan")
    x[1, 0, 3, 0] = float("inf")
    x[1, 0, 4] = 0
    x[1, 1, 2] *= 30  # a sink at the second layer only
    x[0, 1, 4] = 0  # special too
    x[:, 1, 5:], x[:, 2, 4:] = 1e6, float("nan")
    special[1, 5] = True
    return [x[0], x[1]], np.array([6, 5, 4]), special


REASONS = {
    "position 0": [(0, 0), (1, 0), (2, 0)],
    "special token": [(0, 1), (1, 4)],
    "non-finite activation": [(0, 2), (0, 3)],
    "zero norm": [(0, 4), (1, 4)],
    "sink": [(1, 2)],
    "padding": [(1, 5), (2, 4), (2, 5)],
}


def test_each_reason_is_found_where_it_was_planted():
    found = token_filter(*planted(), 10.0)
    assert list(found.reasons) == list(REASONS)
    for reason, where in REASONS.items():
        assert list(map(tuple, np.argwhere(found.reasons[reason]).tolist())) == where, reason
    assert list(map(tuple, np.argwhere(found.usable).tolist())) == [(0, 5), (1, 1), (1, 3), (2, 1), (2, 2), (2, 3)]


def test_sinks_exceed_their_own_layers_median_norm():
    activations, length, special = planted()
    for factor, sinks in ((31.0, 0), (29.0, 1)):  # the planted one is 30 times a norm near the median
        assert token_filter(activations, length, special, factor).reasons["sink"].sum() == sinks
    assert token_filter([activations[0], activations[1] * 1000], length, special, 10.0).reasons["sink"].sum() == 1
    none = token_filter(activations, length, special, None)
    assert not none.reasons["sink"].any()
    assert none.reasons["zero norm"].sum() == 2  # nothing else is left out with it


def test_pairs_are_dropped_for_the_first_reason_and_counted_once():
    good, sink, both = (2, 1), (1, 2), (1, 4)  # `both`: special and of norm 0
    target = [good, sink, good, (0, 0), both, (0, 4), (0, 2), (1, 1)]
    source = [(1, 3), good, sink, sink, good, good, (0, 4), (0, 5)]
    pairs = Pairs(*(np.array(x) for x in (*zip(*target, strict=True), *zip(*source, strict=True))))
    keep, dropped = token_filter(*planted(), 10.0).keep(pairs)
    assert keep.tolist() == [True, False, False, False, False, False, False, True]
    assert dropped == {
        "position 0": 1,
        "special token": 1,
        "non-finite activation": 1,
        "zero norm": 1,
        "sink": 2,
        "padding": 0,
    }


# Pairs that meet a condition


def clustered():
    """Five prompts of up to 14 tokens around three directions, norms from 1 to 4; some tokens not usable."""
    rng = np.random.default_rng(0)
    length = np.array([14, 9, 12, 14, 5])
    centre = rng.normal(size=(3, 6))
    x = centre[rng.integers(3, size=(5, 14))] + 0.5 * rng.normal(size=(5, 14, 6))
    x *= (rng.uniform(1, 4, size=(5, 14)) / np.linalg.norm(x, axis=-1))[..., None]
    usable = (np.arange(14) < length[:, None]) & (rng.random((5, 14)) < 0.8)
    x[~usable & (rng.random((5, 14)) < 0.5)] = np.nan
    return x, usable, length


def fits(kind, a, b):
    """Whether A may be the source of B, in float64."""
    ratio = np.linalg.norm(a) / np.linalg.norm(b)
    cos = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    return abs(ratio - 1) < 0.1 and cos < 0.5 if kind == "same_norm" else cos > 0.7 and max(ratio, 1 / ratio) > 1.5


@pytest.mark.parametrize("kind", ["same_norm", "high_cosine"])
@pytest.mark.parametrize("seed", [0, 1])
def test_matching_pairs_fit_and_cover_all_possible_targets(kind, seed):
    x, usable, length = clustered()
    tokens = list(map(tuple, np.argwhere(usable).tolist()))
    exist = sum(any(a[0] != b[0] and fits(kind, x[a], x[b]) for a in tokens) for b in tokens)
    assert 10 < exist < len(tokens)  # the example tells some targets from others
    pairs, found = matching_pairs(torch.tensor(x), usable, length, 1000, seed, kind)
    assert found == len(pairs) == exist
    assert len(set(targets(pairs))) == exist
    for b, a in zip(targets(pairs), sources(pairs), strict=True):
        assert usable[b] and usable[a]
        assert a[0] != b[0]
        assert fits(kind, x[a], x[b])
    fewer, found = matching_pairs(torch.tensor(x), usable, length, 5, seed, kind)
    assert found == exist
    assert (targets(fewer), sources(fewer)) == (targets(pairs)[:5], sources(pairs)[:5])
    again, _ = matching_pairs(torch.tensor(x), usable, length, 1000, seed, kind)
    assert (targets(again), sources(again)) == (targets(pairs), sources(pairs))
    other, _ = matching_pairs(torch.tensor(x), usable, length, 1000, seed + 7, kind)
    assert sources(other) != sources(pairs)


def test_sources_are_drawn_from_all_that_fit():
    """One direction, two norms: every other token of the other norm fits, and none is preferred to all others."""
    x = torch.ones(20, 10, 4) * (1 + torch.arange(10) % 2)[:, None]
    usable = np.ones((20, 10), dtype=bool)
    pairs, n = matching_pairs(x, usable, np.full(20, 10), 200, 0, "high_cosine")
    assert n == len(pairs) == 200
    counts = np.unique(np.array(sources(pairs)), axis=0, return_counts=True)[1]
    assert len(counts) > 100  # of 200 draws from 200: 126 expected
    assert counts.max() < 10


@pytest.mark.parametrize("kind", ["same_norm", "high_cosine"])
def test_no_pairs_where_none_exist(kind):
    ones = torch.ones(3, 4, 5)  # cosine 1, norm ratio 1
    usable = np.ones((3, 4), dtype=bool)
    for some in (usable, usable & False, usable & (np.arange(3) == 0)[:, None]):
        pairs, found = matching_pairs(ones, some, np.full(3, 4), 10, 0, kind)
        assert (len(pairs), found) == (0, 0)


def test_pairs_come_from_the_pool():
    x, usable, length = clustered()
    pairs, found = matching_pairs(torch.tensor(x), usable, length, 1000, 0, "same_norm", pool=20)
    prompt, position = ranked_tokens(length, 0, "target")
    first = [t for t in zip(prompt.tolist(), position.tolist(), strict=True) if usable[t]][:20]
    assert set(targets(pairs)) | set(sources(pairs)) <= set(first)
    assert 0 < found == len(pairs) < 20
    with pytest.raises(ResultError, match="no kind of pairs 'samenorm'; known: same_norm, high_cosine"):
        matching_pairs(torch.tensor(x), usable, length, 5, 0, "samenorm")


def test_dropped_tokens_count_once_under_their_first_reason():
    activations, length, special, *_ = planted()
    found = token_filter(activations, length, special, 10.0)
    inside = int(np.asarray(length).sum())
    counted = found.left_out()
    assert sum(counted.values()) + int(found.usable.sum()) == inside and "padding" not in counted
    assert counted["position 0"] == len(length)
    some = found.left_out(np.array([0, 2]))
    assert sum(some.values()) + int(found.usable[[0, 2]].sum()) == int(np.asarray(length)[[0, 2]].sum())

"""Whole groups held out, and sums without each, against loops."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.statistics.jackknife import sums_without
from interventions.texts.groups import first_of_group, held_groups


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 9)), min_size=2, max_size=12), st.floats(0.1, 0.9))
def test_each_class_is_split_by_groups_at_about_the_share(sizes, share):
    rows = [(label, f"{label}{i}") for i, (label, n) in enumerate(sizes) for _ in range(n)]
    labels, groups = [label for label, _ in rows], [group for _, group in rows]
    held, size = held_groups(labels, groups, share, 0), Counter(groups)
    for label in set(labels):
        own = {group for other, group in rows if other == label}
        assert 0 < len(held & own) < len(own) or len(own) == 1
        out, whole = (sum(size[g] for g in some) for some in (held & own, own))
        assert abs(out - share * whole) <= max(size[g] for g in own)
    other = dict.fromkeys(groups)
    assert held == held_groups(labels[::-1], groups[::-1], share, 0) <= set(other)


def test_group_belongs_to_the_class_of_most_of_its_texts():
    labels = [*"aaab", *"aaaa", *"bbbb", *"bbbb"]
    groups = [f"g{i // 4}" for i in range(16)]
    for seed in range(8):
        held = held_groups(labels, groups, 0.5, seed)
        assert len(held & {"g0", "g1"}) == len(held & {"g2", "g3"}) == 1


def test_leave_one_group_out_sums():
    assert first_of_group(["x", "y", "x", "z"]).tolist() == [0, 1, 0, 3]
    values, group = np.random.default_rng(0).normal(size=(2, 3, 20)), np.arange(20) * 7 % 5
    by_hand = np.stack([values[..., group != g].sum(-1) for g in range(5)], axis=-1)
    np.testing.assert_allclose(sums_without(values, group), by_hand, atol=1e-12)

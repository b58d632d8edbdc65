"""Balanced tasks: which texts are held out, whole groups, and independence of the order of texts."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.sparse_probing.tasks import split_seed, tasks
from interventions import ResultError
from interventions.texts.groups import held_groups


def named(counts: dict[str, int]) -> tuple[list[str], list[str]]:
    labels = [name for name, n in counts.items() for _ in range(n)]
    return [f"text {i} of {label}" for i, label in enumerate(labels)], labels


@given(
    st.dictionaries(st.sampled_from("abcd"), st.integers(6, 12), min_size=2),
    st.floats(0.1, 0.6),
    st.integers(0, 3),
    st.data(),
)
def test_tasks_are_balanced_and_disjoint(counts, share, seed, data):
    texts, labels = named(counts)
    usable = np.array([data.draw(st.booleans()) if i % 4 == 3 else True for i in range(len(texts))])
    found = tasks(texts, labels, usable, test_share=share, seed=seed)
    assert list(found) == (sorted(counts)[1:] if len(counts) == 2 else sorted(counts))
    own = Counter(label for label, good in zip(labels, usable, strict=True) if good)
    for name, task in found.items():
        held = {label: max(1, int(np.floor(share * k + 0.5))) for label, k in own.items()}  # the nearest whole number
        for y, of in ((task.y_test, held), (task.y_train, {label: own[label] - k for label, k in held.items()})):
            assert y.sum() == (~y).sum() == min(of[name], sum(of.values()) - of[name])
        every = np.r_[task.train, task.test]
        assert len(set(every)) == len(every) and usable[every].all()
        assert task.group_test.tolist() == task.test.tolist()  # each text its own group
        assert [labels[i] == name for i in every] == np.r_[task.y_train, task.y_test].tolist()
        for part in (task.train, task.test):
            others = Counter(labels[i] for i in part if labels[i] != name)
            most = max(others.values())
            whole = {label: (held[label] if part is task.test else own[label] - held[label]) for label in others}
            assert all(k in (most, most - 1) or k == whole[label] for label, k in others.items())


def grouped(sizes: dict[str, tuple[int, ...]]) -> tuple[list[str], list[str], list[str]]:
    """Texts of each class in groups of these sizes."""
    rows = [(label, f"{label}{g}") for label, some in sizes.items() for g, n in enumerate(some) for _ in range(n)]
    return [f"text {i}" for i in range(len(rows))], [label for label, _ in rows], [group for _, group in rows]


@given(
    st.dictionaries(st.sampled_from("abc"), st.lists(st.integers(1, 9), min_size=4, max_size=9).map(tuple), min_size=2),
    st.floats(0.2, 0.5),
    st.integers(0, 3),
)
def test_groups_are_not_split(sizes, share, seed):
    texts, labels, groups = grouped(sizes)
    found = tasks(texts, labels, np.ones(len(texts), dtype=bool), groups=groups, test_share=share, seed=seed)
    held = held_groups(labels, groups, share, seed)
    for name, task in found.items():
        assert not {groups[i] for i in task.train} & held  # one split for every task
        assert {groups[i] for i in task.test} <= held
        assert [groups[i] for i in task.group_test] == [groups[i] for i in task.test]
        assert all(groups.index(groups[i]) == i for i in task.group_test)
        for part, y in ((task.train, task.y_train), (task.test, task.y_test)):
            assert 2 * y.sum() == len(y) > 0 and [labels[i] == name for i in part] == y.tolist()
            took = Counter(groups[i] for i in part[y])
            of_class = {g for g, label in zip(groups, labels, strict=True) if label == name}
            there = {g for g in of_class if (g in held) == (part is task.test)}
            # Groups take turns: none gives two texts more than another that has one left.
            assert all(took[g] >= min(max(took.values()) - 1, groups.count(g)) for g in there)


def test_held_out_groups_are_close_to_the_requested_share():
    texts, labels, groups = grouped({"a": (5,) * 30, "b": (15,) * 10})
    for number in range(3):
        task = tasks(texts, labels, np.ones(300, dtype=bool), groups=groups, seed=split_seed(0, number))["b"]
        assert len(task.test) == 90 and len(set(task.group_test)) == 9 + 3
    assert len({split_seed(seed, number) for seed in range(20) for number in range(20)}) == 400


def test_a_group_of_two_classes_is_not_split():
    texts, labels, groups = grouped({"a": (4,) * 8, "b": (4,) * 8})
    groups = [group.replace("b", "a") if group in ("b0", "b1") else group for group in groups]
    task = tasks(texts, labels, np.ones(64, dtype=bool), groups=groups)["b"]
    assert not {groups[i] for i in task.train} & {groups[i] for i in task.test}


def test_splits_depend_on_the_seed_and_not_on_the_order_of_texts():
    texts, labels = named({"a": 20, "b": 30, "c": 25})
    usable, turned = np.ones(75, dtype=bool), list(range(75))[::-1]
    there = tasks(texts, labels, usable)
    back = tasks([texts[i] for i in turned], [labels[i] for i in turned], usable)
    for name, task in there.items():
        assert {texts[i] for i in task.test} == {texts[turned[i]] for i in back[name].test}
        assert {texts[i] for i in task.train} == {texts[turned[i]] for i in back[name].train}
    other = tasks(texts, labels, usable, seed=1)
    assert set(other["a"].test) != set(there["a"].test)


def test_too_few_groups_and_shares_out_of_range_raise():
    texts, labels, groups = grouped({"a": (9, 9, 9), "b": (2,) * 9})
    with pytest.raises(ResultError, match=r"class 'a' has 27 usable texts in 3 groups; .* needs 4 or more"):
        tasks(texts, labels, np.ones(45, dtype=bool), groups=groups)
    for share in (0, 1):
        with pytest.raises(ResultError, match="held-out share"):
            tasks(*named({"a": 4, "b": 4}), np.ones(8, dtype=bool), test_share=share)

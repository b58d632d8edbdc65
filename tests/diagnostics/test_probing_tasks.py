"""Balanced tasks: who is held out, and that nothing but seed and text decides."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.probing_tasks import tasks
from interventions import ResultError


def named(counts: dict[str, int]) -> tuple[list[str], list[str]]:
    labels = [name for name, n in counts.items() for _ in range(n)]
    return [f"text {i} of {label}" for i, label in enumerate(labels)], labels


@given(
    st.dictionaries(st.sampled_from("abcd"), st.integers(4, 12), min_size=2),
    st.floats(0.1, 0.6),
    st.integers(0, 3),
    st.data(),
)
def test_tasks_are_balanced_disjoint_and_of_usable_texts(counts, share, seed, data):
    texts, labels = named(counts)
    usable = np.array([data.draw(st.booleans()) if i % 4 == 3 else True for i in range(len(texts))])
    found = tasks(texts, labels, usable, test_share=share, seed=seed)
    assert list(found) == (sorted(counts)[1:] if len(counts) == 2 else sorted(counts))
    own = Counter(label for label, good in zip(labels, usable, strict=True) if good)
    for name, task in found.items():
        n = min(own[name], sum(own.values()) - own[name])
        assert len(task.train) + len(task.test) == 2 * n
        held = int(np.ceil(share * n))
        assert task.y_test.sum() == held == (~task.y_test).sum() and task.y_train.sum() == n - held
        every = np.r_[task.train, task.test]
        assert len(set(every)) == 2 * n and usable[every].all()
        assert [labels[i] == name for i in every] == np.r_[task.y_train, task.y_test].tolist()
        others = Counter(labels[i] for i in every if labels[i] != name)
        least = min(own[label] for label in own if label != name)
        assert all(
            k in (max(others.values()), max(others.values()) - 1) or k == own[label] for label, k in others.items()
        )
        assert min(others.get(label, 0) for label in own if label != name) >= min(least, n // (len(own) - 1))


def test_the_order_of_texts_decides_nothing_and_seeds_differ():
    texts, labels = named({"a": 20, "b": 30, "c": 25})
    usable, turned = np.ones(75, dtype=bool), list(range(75))[::-1]
    there = tasks(texts, labels, usable)
    back = tasks([texts[i] for i in turned], [labels[i] for i in turned], usable)
    for name, task in there.items():
        assert {texts[i] for i in task.test} == {texts[turned[i]] for i in back[name].test}
        assert {texts[i] for i in task.train} == {texts[turned[i]] for i in back[name].train}
    other = tasks(texts, labels, usable, seed=1)
    assert set(other["a"].test) != set(there["a"].test)


def test_too_few_texts_and_shares_out_of_range_are_errors():
    texts, labels = named({"a": 1, "b": 5})
    with pytest.raises(ResultError, match="class 'b' has 5 usable texts, the others 1"):
        tasks(texts, labels, np.ones(6, dtype=bool))
    for share in (0, 1):
        with pytest.raises(ResultError, match="held-out share"):
            tasks(*named({"a": 4, "b": 4}), np.ones(8, dtype=bool), test_share=share)

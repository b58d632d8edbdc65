from collections import Counter
from itertools import islice

import pytest

from diagnostics.pairs import words as lists
from diagnostics.pairs.pair import Pair, labels
from diagnostics.pairs.tasks import make_pairs, tokenized
from diagnostics.pairs.templates import TASKS, drafts
from interventions import load_model, wrap
from interventions.errors import TextError
from tests import tiny
from tests.diagnostics.pairs import words


def at(pair: Pair, role: str, which: str = "clean") -> int:
    return getattr(pair, which)[labels(pair).index(role)]


@pytest.mark.parametrize("task", TASKS)
def test_kept_pairs_are_those_full_passes_get_right(task):
    model = words.model()
    found = make_pairs(model, task, 5, seed=3)
    kept, why = [], Counter()
    for draft in islice(drafts(task, 3), found.origin["drawn"]):
        pair = tokenized(task, draft, model.tokenizer)
        clean, corrupt = (words.alone(ids, pair.right, pair.wrong) for ids in (pair.clean, pair.corrupt))
        why[(clean > 0, corrupt < 0, clean - corrupt >= 0.5)] += 1
        if clean > 0 > corrupt and clean - corrupt >= 0.5:
            kept.append(pair)
            assert abs(found.m_clean[len(kept) - 1] - clean) < tiny.TOLERANCE
            assert abs(found.m_corrupt[len(kept) - 1] - corrupt) < tiny.TOLERANCE
    assert list(found) == kept
    left = found.left_out
    assert left.get("right answer not ahead after the clean prompt", 0) == sum(
        n for key, n in why.items() if not key[0]
    )
    assert (
        left.get("wrong answer not ahead after the corrupt prompt", 0)
        == why[True, False, True] + why[True, False, False]
    )
    assert sum(left.values()) == why.total() - 5


@pytest.mark.parametrize("task", TASKS)
def test_every_token_has_a_role_and_only_one_word_differs(task):
    tokenizer, changed = words.tokenizer(), {"ioi": "S2", "agreement": "subject", "capitals": "country"}
    changed |= {"greater_than": "decade", "pronouns": "person"}
    for draft in islice(drafts(task, 0), 40):
        pair = tokenized(task, draft, tokenizer)
        assert pair.pool == "roles" and pair.texts == draft.texts and labels(pair)[-1] == "END"
        assert [labels(pair)[i] for i in pair.differing] == [changed[task]]
        for role, token in zip(labels(pair), pair.clean, strict=True):
            assert tokenizer.decode([token]) == draft.clean[role].strip()


@pytest.mark.parametrize("task", TASKS)
def test_drafts_are_distinct_without_mirror_images(task):
    found = [draft.texts for draft in islice(drafts(task, 0), 600)]
    assert len({frozenset(both) for both in found}) == 600
    assert found[:9] == [draft.texts for draft in islice(drafts(task, 0), 9)]
    assert found[:9] != [draft.texts for draft in islice(drafts(task, 1), 9)]


def test_ioi_flips_the_answer_in_both_orders():
    orders, tokenizer = set(), words.tokenizer()
    for draft in islice(drafts("ioi", 0), 60):
        pair = tokenized("ioi", draft, tokenizer)
        assert at(pair, "S1") == at(pair, "S2") == pair.wrong and at(pair, "IO") == pair.right
        assert at(pair, "S2", "corrupt") == pair.right
        orders.add(labels(pair).index("IO") - labels(pair).index("S1"))
    assert orders == {2, -2}


def test_answers_follow_from_the_templates_words():
    men = {both.split(":")[0] for both in lists.MALE_FEMALE}
    attractors = set()
    for draft in islice(drafts("agreement", 0), 60):
        plural = draft.clean["subject"].endswith("s")
        assert (draft.right.strip() in ("are", "were", "have")) is plural
        assert draft.corrupt["subject"].endswith("s") is not plural
        attractors.add(draft.clean["attractor"].endswith("s") is plural)
    assert attractors == {True, False}
    for draft in islice(drafts("capitals", 0), 60):
        assert lists.CAPITALS[draft.clean["country"].strip()] == draft.right.strip()
        assert lists.CAPITALS[draft.corrupt["country"].strip()] == draft.wrong.strip()
    for draft in islice(drafts("pronouns", 0), 60):
        assert (draft.right == " he") is (draft.clean["person"].strip() in men) is (draft.wrong == " she")
        assert (draft.corrupt["person"].strip() in men) is not (draft.right == " he")
    for draft in islice(drafts("greater_than", 0), 60):
        start, early = (draft.clean["decade"] + draft.clean["unit"], draft.corrupt["decade"] + draft.corrupt["unit"])
        assert draft.wrong + "9" < start < draft.right + "0" and early < draft.wrong + "0"
        assert draft.clean["Y1"] + draft.clean["Y2"] == draft.clean["Y1again"] + draft.clean["END"]


def test_larger_n_extends_the_pairs():
    model = words.model()
    few, more = make_pairs(model, "pronouns", 3), make_pairs(model, "pronouns", 6)
    assert list(few) == list(more)[:3] and few.origin["drawn"] < more.origin["drawn"]
    assert list(make_pairs(model, "pronouns", 3, seed=1)) != list(few)


def test_words_of_several_tokens():
    split = words.tokenizer(pieces={"Mary": ("Ma", "ry"), "store": ("sto", "re")})
    names = set()
    for draft in islice(drafts("ioi", 0), 1000):
        found, used = tokenized("ioi", draft, split), {draft.clean["IO"], draft.clean["S1"]}
        assert (found == "a main word that is not one token") is (" Mary" in used)
        if isinstance(found, Pair):
            assert ("place:2" in labels(found)) is (draft.clean["place"] == " store")
            assert found.pool == "roles"
            names |= used
    assert len(names) > 50
    unknown = words.tokenizer(without=("Mary",))
    for draft in islice(drafts("ioi", 0), 200):
        found = tokenized("ioi", draft, unknown)
        assert (found == "a word that the tokenizer does not know") is any("Mary" in text for text in draft.texts)
    answers = words.tokenizer(pieces={"Paris": ("Par", "is")})
    for draft in islice(drafts("capitals", 0), 100):
        found = tokenized("capitals", draft, answers)
        assert (found == "an answer that is not one token") is (" Paris" in (draft.right, draft.wrong))


def test_added_bos_token_is_a_separate_position():
    draft = next(drafts("ioi", 0))
    plain, added = (tokenized("ioi", draft, words.tokenizer(bos=bos)) for bos in (False, True))
    assert labels(added) == ["BOS", *labels(plain)] and added.clean == (1, *plain.clean)
    assert (added.right, added.wrong) == (plain.right, plain.wrong)


def test_too_few_pairs_raise_with_the_counts():
    # Nothing of 40 logits: every draw is left out, and counted.
    with pytest.raises(
        TextError, match=r"pronouns: 0 pairs could be made of 1000 drawn, expected 2; left out: .*less than 40 apart"
    ):
        make_pairs(words.model(), "pronouns", 2, floor=40)


@pytest.mark.long
@pytest.mark.model
def test_packaged_model_solves_every_task():
    model = load_model("smollm2-135m")
    for task in TASKS:
        found = make_pairs(model, task, 4, seed=5)
        assert set(found.left_out) <= {  # no word of several tokens
            "right answer not ahead after the clean prompt",
            "wrong answer not ahead after the corrupt prompt",
        }
        assert found.origin["drawn"] <= 8  # 200 draws of seed 0: 97, 85, 100, 96, 97 % kept


@pytest.mark.parametrize(
    ("task", "n", "said"),
    [("iol", 5, "no task 'iol'; known: ioi, agreement"), ("ioi", 0, "0 pairs asked for")],
)
def test_invalid_arguments_raise(task, n, said):
    with pytest.raises(TextError, match=said):
        make_pairs(words.model(), task, n)


def test_a_model_without_a_tokenizer_raises():
    with pytest.raises(TextError, match="the model has no tokenizer; wrap"):
        make_pairs(wrap(tiny.tiny_model("llama", vocab=words.SIZE)), "ioi", 2)

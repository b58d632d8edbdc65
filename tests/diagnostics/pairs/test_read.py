import copy
import math
import warnings

import pytest
import torch

from diagnostics.pairs.pair import Pairs, labels
from diagnostics.pairs.read import pairs_from
from diagnostics.pairs.tasks import make_pairs
from interventions import wrap
from interventions.errors import TextError
from tests import tiny
from tests.diagnostics.pairs import words

ROWS = [
    ("When Mary and John went", "When Mary and Mary went", " he", " she"),
    ("The king was tired because", "The queen was tired because", " he", " she"),
    ("The war lasted from", "The siege lasted from", " the", " a"),
]
ROLES = ["start IO - S1 END", "start person was adjective END", ""]
ANY = {"floor": 0.0}


@pytest.fixture(autouse=True)
def _answers_may_be_exchanged():
    """A random model favours either answer."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*exchanged")
        yield


@pytest.fixture(scope="module")
def model():
    return words.model(pieces={"festival": ("fest", "iv", "al"), "sick": ("si", "ck")})


def csv_of(folder, rows=ROWS, roles=ROLES, header="clean,corrupt,right,wrong,roles"):
    path = folder / "pairs.csv"
    lines = [",".join(f'"{field}"' for field in (*row, role)) for row, role in zip(rows, roles, strict=True)]
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path


def ids(model, text):
    return model.tokenizer(text)["input_ids"]


def test_texts_ids_and_files_give_the_same_pairs(model, tmp_path):
    texts = pairs_from(model, ROWS, **ANY)
    as_ids = [(ids(model, a), ids(model, b), ids(model, c)[0], ids(model, d)[0]) for a, b, c, d in ROWS]
    numbers, file = pairs_from(model, as_ids, **ANY), pairs_from(model, str(csv_of(tmp_path, roles=[""] * 3)), **ANY)
    assert list(texts) == list(file) and [pair.texts for pair in texts] == [row[:2] for row in ROWS]
    for found in (texts, numbers, file):
        assert [(list(p.clean), list(p.corrupt), p.right, p.wrong) for p in found] == as_ids
        for pair, clean, corrupt in zip(found, found.m_clean, found.m_corrupt, strict=True):
            assert abs(clean - words.alone(pair.clean, pair.right, pair.wrong)) < tiny.TOLERANCE
            assert abs(corrupt - words.alone(pair.corrupt, pair.right, pair.wrong)) < tiny.TOLERANCE
    assert file.origin["source"] == "pairs.csv"
    assert list(pairs_from(model, iter(ROWS), n=2, **ANY)) == list(texts)[:2]
    assert list(pairs_from(model, ROWS[0], **ANY)) == list(pairs_from(model, texts[0], **ANY)) == list(texts)[:1]


def test_roles_of_a_file_and_of_a_list(model, tmp_path):
    found = pairs_from(model, csv_of(tmp_path), **ANY)
    assert labels(found[0]) == ["start", "IO", "2", "S1", "END"] and labels(found[2]) == ["0", "1", "2", "3"]
    assert found[1].pool == "roles" != found[0].pool
    listed = [(*row, role.split() or None) for row, role in zip(ROWS, ROLES, strict=True)]
    assert list(pairs_from(model, listed, **ANY)) == list(found)


def test_pairs_below_the_floor_are_left_out_and_counted(model):
    every = pairs_from(model, ROWS, **ANY)
    apart = abs(every.m_clean - every.m_corrupt)
    floor = float(sorted(apart)[1])  # the middle one stays
    found = pairs_from(model, ROWS, floor=floor)
    assert list(found) == [pair for pair, size in zip(every, apart, strict=True) if size >= floor] and len(found) == 2
    assert found.left_out == {f"clean and corrupt logit difference less than {floor:g} apart": 1}
    assert found.m_clean.tolist() == every.m_clean[apart >= floor].tolist()
    again = pairs_from(model, found, floor=math.nextafter(float(apart.max()), 0) - 1e-6)
    assert len(again) == 1 and again.left_out[f"clean and corrupt logit difference less than {floor:g} apart"] == 1
    with pytest.raises(TextError, match=r"0 of 3 pairs left, expected 1; left out: .*lower floor"):
        pairs_from(model, ROWS, floor=1e3)
    with pytest.raises(TextError, match="2 of 3 pairs left, expected 3"):
        pairs_from(model, ROWS, n=3, floor=floor)


def test_a_difference_that_is_not_finite_is_left_out(model):
    hf = copy.deepcopy(model.hf)
    token = ids(model, "siege")[0]
    hf.get_input_embeddings().weight = torch.nn.Parameter(
        hf.get_input_embeddings().weight.index_fill(0, torch.tensor([token]), torch.nan), requires_grad=False
    )
    found = pairs_from(wrap(hf, model.tokenizer), ROWS, **ANY)
    assert len(found) == 2 and found.left_out == {"a logit difference that is not finite": 1}


def test_a_task_by_name(model):
    found = pairs_from(model, "pronouns", n=3, seed=2)
    assert isinstance(found, Pairs) and list(found) == list(make_pairs(model, "pronouns", 3, seed=2))


def test_first_token_answers_must_be_requested(model):
    row = ("The king was", "The queen was", " festival", " sick")
    with pytest.raises(
        TextError, match=r"pair 0: the right answer ' festival' is 3 tokens, 'fest' '##iv' '##al'; .*first token"
    ):
        pairs_from(model, [row])
    [pair] = pairs_from(model, [row], answer="first token", **ANY)
    assert [pair.right, pair.wrong] == model.tokenizer.convert_tokens_to_ids(["fest", "si"])


def test_warnings(model):
    [pair] = pairs_from(model, ROWS[:1], **ANY)
    low = words.alone(pair.clean, pair.right, pair.wrong) < words.alone(pair.corrupt, pair.right, pair.wrong)
    turned = [ROWS[0] if low else (ROWS[0][1], ROWS[0][0], *ROWS[0][2:])]
    with pytest.warns(UserWarning, match="in 1 of 1 pairs the right answer is further ahead .* exchanged"):
        pairs_from(model, turned, **ANY)
    joined = words.model(pieces={"kingdom": ("king", "dom"), "kinglike": ("king", "like")})
    with pytest.warns(UserWarning, match="2 answers go on with the prompt's last word, as in 'kingdom'"):
        pairs_from(joined, [("The king", "My king", "dom", "like")], **ANY)


GOOD = ROWS[0]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ([("The king was", "The festival was", " he", " she")], r"pair 0: the clean prompt has 3 tokens, the corrupt prompt 5: 'king' against 'fest' '##iv' '##al'"),
        ([("The king was", "The king was sick", " he", " she")], r"3 tokens, the corrupt prompt 5: nothing against 'si' '##ck'"),
        ([GOOD, (GOOD[0], GOOD[0], " he", " she")], "pair 1: clean and corrupt prompt are the same"),
        ([GOOD, ROWS[1], GOOD], "pair 2: the prompts of pair 0 again"),
        ([(*GOOD[:2], " he", " he")], "pair 0: both answers are token"),
        ([(*GOOD[:2], "", " he")], "the right answer '' does not begin with a new token after"),
        ([(*GOOD, "IO S1")], r"pair 0: 2 roles for 5 tokens, 'When' 'Mary'.*; expected one a token, - for none"),
        ([(*GOOD[:2], 5, 6)], "the right answer is 5, the prompts are texts; give both alike"),
        ([([5, 6], [5, 7], " he", " she")], "the right answer is ' he', the prompts are token ids"),
        ([([5, 6], [5, 7], True, 3)], "the right answer is True"),
        ([([5, 6], [5, 9999], 3, 4)], "pair 0: token id 9999 is outside the vocabulary of 512"),
        ([([5, 6], [5, 7], 3, 512)], "pair 0: answer 512 is outside the vocabulary of 512"),
        ([([5, 6], [5], 3, 4)], r"the clean prompt has 2 tokens, the corrupt prompt 1"),
        (GOOD[:3], r"pair 0: list of 3; expected \(clean, corrupt, right, wrong\)"),
        ([GOOD[:3]], "pair 0: list of 3; expected"),
        ([], "no pairs in an empty list"),
        ({"clean": "x"}, "pairs are dict; expected a task"),
        (7, "pairs are int; expected a task"),
        ("iol", r"no task 'iol'; known: ioi, agreement, capitals, greater_than, pronouns; or give the path of a .csv"),
        ("absent.csv", "cannot read absent.csv"),
    ],
)  # fmt: skip
def test_invalid_sources_raise(model, source, said):
    with pytest.raises(TextError, match=said):
        pairs_from(model, source)


def test_an_answer_that_changes_the_prompts_tokens_raises():
    joined = words.model(pieces={"kingdom": ("kingdo", "m")})
    with pytest.raises(
        TextError, match=r"the right answer 'dom' does not begin with a new token after 'The king'; leave no space"
    ):
        pairs_from(joined, [("The king", "My king", "dom", " he")])


def test_invalid_files_raise(model, tmp_path):
    path = csv_of(tmp_path, header="clean,corrupt,right,answer,roles")
    with pytest.raises(
        TextError, match=r"pairs.csv has no column 'wrong', but 'clean', .*'answer', 'roles'; expected clean, corrupt"
    ):
        pairs_from(model, path)
    path = csv_of(tmp_path, roles=["", "a b", ""])
    with pytest.raises(TextError, match=r"pairs.csv, line 3: 2 roles for 5 tokens"):
        pairs_from(model, path)
    path.write_text("clean,corrupt,right,wrong\n")
    with pytest.raises(TextError, match=r"no pairs in pairs.csv"):
        pairs_from(model, path)


def test_invalid_options_and_texts_without_a_tokenizer_raise(model):
    with pytest.raises(TextError, match="answer 'first'; expected 'whole' or 'first token'"):
        pairs_from(model, ROWS, answer="first")
    for source in (ROWS, "ioi"):
        with pytest.raises(TextError, match="floor nan; expected a number of logits"):
            pairs_from(model, source, floor=math.nan)
    with pytest.raises(TextError, match="0 pairs asked for"):
        pairs_from(model, ROWS, n=0)
    with pytest.raises(TextError, match="pair 0: texts were given, but the model has no tokenizer"):
        pairs_from(wrap(tiny.tiny_model("llama", vocab=words.SIZE)), ROWS)

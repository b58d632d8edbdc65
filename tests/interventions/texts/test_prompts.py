import importlib.util
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from interventions.errors import TextError
from interventions.texts.prompts import as_prompts, load_texts, tokenize

TEXTS = [f"paragraph {i} says {'one two three ' * (i % 5)}and ends" for i in range(40)]
TEMPLATE = (
    "{% for message in messages %}<|turn|>{{ message.role }} says {{ message.content | trim }}<|end|>"
    "{% endfor %}and ends"
)


def word_tokenizer(bos=False, chat_template=TEMPLATE):
    """A token for each word and for each mark; every other word is `<unk>`, which is special too."""
    words = [*" ".join(TEXTS).split(), "user", "onetwo", "twothree"]
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "<|turn|>", "<|end|>", *dict.fromkeys(words)])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", additional_special_tokens=["<|turn|>", "<|end|>"]
    )
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture
def tokenizer():
    return word_tokenizer()


# Reading


def written(folder, name, content):
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return str(path)


def test_every_format_reads_the_same_paragraphs(tmp_path):
    texts = ["First, with\na line break.", 'Second "quoted", naïve ‖x‖.', "Third\u2028with a separator"]
    jsonl = "\n\n".join(json.dumps({"text": t, "id": 3}, ensure_ascii=False) for t in texts)
    passages = "\n".join(json.dumps({"passage": t}) for t in texts) + "\n"
    table = "id,text\n" + "".join('1,"{}"\n'.format(t.replace('"', '""')) for t in texts)
    files = {"a.txt": "\n \n\n".join(texts) + "\n", "a.jsonl": jsonl, "b.jsonl": passages, "a.csv": table}
    loaded = [load_texts(written(tmp_path, name, content)) for name, content in files.items()]
    assert [text.name for text in loaded] == list(files)
    for text in loaded:
        assert text.texts == texts
        assert text.sha256 == loaded[0].sha256
        assert text.dropped == {}


def test_text_field_wins_over_passage_and_bom_is_dropped(tmp_path):
    both = json.dumps({"passage": "no", "text": "yes"})
    assert load_texts(written(tmp_path, "a.jsonl", "\ufeff" + both)).texts == ["yes"]


def test_dropped_texts_are_counted(tmp_path):
    path = written(tmp_path, "a.txt", "long enough\n\nno\n\n  long enough \n\nalso long\n\n\n\nlong enough\n\n\n")
    loaded = load_texts(path, min_chars=3)
    assert loaded.texts == ["long enough", "also long"]
    assert loaded.dropped["duplicate"] == 2
    assert loaded.dropped["shorter than 3 characters"] >= 1


def test_n_takes_the_first_texts_and_hashes_differ(tmp_path):
    path = written(tmp_path, "a.txt", "\n\n".join(TEXTS))
    some = load_texts(path, n=7)
    assert some.texts == TEXTS[:7]
    assert some.sha256 == load_texts(path, n=7).sha256
    assert some.sha256 != load_texts(path, n=8).sha256
    joined = load_texts(written(tmp_path, "b.txt", " ".join(TEXTS[:7])))
    assert joined.sha256 != some.sha256


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "fine"}\n\n{"text": oops}\n', r"a\.jsonl, line 3: not JSON"),
        (
            "a.jsonl",
            '{"text": "fine"}\n{"body": "x", "id": 1}\n',
            r"line 2: no string 'text' or 'passage'; seen: 'body', 'id'",
        ),
        ("a.jsonl", '"only a string"\n', r"line 1: .*seen: a str"),
        ("a.jsonl", '{"text": 5}\n', r"line 1: no string 'text'"),
        ("a.csv", "id,body\n1,x\n", r"line 2: no string 'text'; seen: 'id', 'body'"),
        ("a.csv", 'text\n"never closed\n', r"not CSV"),
        ("a.txt", " \n\n \n", r"no text in .*a\.txt"),
        ("a.txt", "", r"no text in .*a\.txt"),
        ("a.jsonl", "", r"no text in .*a\.jsonl"),
        ("a.csv", "", r"no text in .*a\.csv"),
        ("a.pdf", "x", r"ends in '\.pdf'; known: \.txt, \.jsonl, \.csv"),
    ],
)
def test_invalid_files_raise_with_the_line(tmp_path, name, content, message):
    with pytest.raises(TextError, match=message):
        load_texts(written(tmp_path, name, content))


def test_unreadable_and_missing_files_raise(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(TextError, match="not UTF-8 at byte 3"):
        load_texts(str(tmp_path / "a.txt"))
    with pytest.raises(TextError, match=r"no file 'boolqq'; expected 'boolq', 'sotu', a \.txt"):
        load_texts("boolqq")
    with pytest.raises(TextError, match="no file"):
        load_texts(str(tmp_path))


def test_a_missing_package_raises_with_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TextError, match="'boolq' is not installed; run: mechdiag data"):
        load_texts("boolq")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TextError, match="pip install datasets"):
        load_texts("hf:owner/name")


def fake_hub(monkeypatch, rows):
    """Stands in for the package datasets; returns what load_dataset was asked for."""
    asked = []

    class Datasets:
        @staticmethod
        def load_dataset(name, *, split, streaming):
            if rows is None:
                raise ConnectionError("no network")
            asked.append((name, split, streaming))
            return iter(rows)

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    return asked


def test_hub_names_give_name_split_and_column(monkeypatch):
    asked = fake_hub(monkeypatch, [{"text": "a", "body": "b"}, {"text": "c", "body": "d"}])
    assert load_texts("hf:owner/name").texts == ["a", "c"]
    assert load_texts("hf:owner/name:test:body", n=1).texts == ["b"]
    assert asked == [("owner/name", "train", False), ("owner/name", "test", True)]
    with pytest.raises(TextError, match="row 0: no string 'label'; seen: 'text', 'body'"):
        load_texts("hf:owner/name:test:label")
    for wrong in ("hf:", "hf:owner/name:test", "hf:a:b:c:d"):
        with pytest.raises(TextError, match="expected hf:owner/name"):
            load_texts(wrong)
    fake_hub(monkeypatch, None)
    with pytest.raises(TextError, match="cannot load hf:owner/name: no network"):
        load_texts("hf:owner/name")


# Tokens


@given(seed=st.integers(0, 1000), few=st.integers(1, 20), more=st.integers(20, 40))
def test_asking_for_more_prompts_extends_the_list(seed, few, more):
    tokenizer = word_tokenizer()
    short, long = (tokenize(TEXTS, tokenizer, max_length=6, n_prompts=n, seed=seed) for n in (few, more))
    assert len(short.tokens) == few
    assert len(long.tokens) == more
    assert (long.tokens[:few], long.texts[:few]) == (short.tokens, short.texts)


def test_the_order_depends_on_the_seed(tokenizer):
    one, again, other = (tokenize(TEXTS, tokenizer, max_length=6, seed=seed) for seed in (0, 0, 1))
    assert one == again
    assert one.texts != other.texts
    assert sorted(one.texts) == sorted(other.texts) == sorted(TEXTS)
    assert one.texts != TEXTS


def test_prompts_are_truncated_tokens_of_the_tokenizer(tokenizer):
    prompts = tokenize(TEXTS, tokenizer, max_length=6)
    for ids, special, text in zip(prompts.tokens, prompts.special, prompts.texts, strict=True):
        assert ids == tokenizer(text)["input_ids"][:6]
        assert len(special) == len(ids) <= 6
        assert special == [i in tokenizer.all_special_ids for i in ids]
    assert max(map(len, prompts.tokens)) == 6
    assert min(map(len, prompts.tokens)) == 5


@pytest.mark.parametrize("bos", [False, True])
def test_bos_is_added_only_by_a_tokenizer_that_adds_it(bos):
    prompts = tokenize(TEXTS, word_tokenizer(bos), max_length=6)
    for ids, special in zip(prompts.tokens, prompts.special, strict=True):
        assert (ids[0] == 1) == special[0] == bos
        assert 1 not in ids[1:]


def test_short_texts_are_dropped_and_counted(tokenizer):
    prompts = tokenize(["", "ends", "one two", "one two three", "? ?"], tokenizer, max_length=8)
    assert sorted(prompts.texts) == ["one two", "one two three"]
    assert prompts.dropped == {"shorter than 2 tokens": 2, "only special tokens in the first 8": 1}
    longer = tokenize(["one two", "one two three"], tokenizer, max_length=8, min_length=3)
    assert (longer.texts, longer.dropped) == (["one two three"], {"shorter than 3 tokens": 1})


def test_too_few_prompts_raise_with_the_counts(tokenizer):
    with pytest.raises(
        TextError, match=r"texts left as prompts: 2 of 3; expected 3; dropped: 1 \(shorter than 2 tokens\); give more"
    ):
        tokenize(["one", "one two", "two three"], tokenizer, max_length=4, n_prompts=3)
    with pytest.raises(TextError, match="left as prompts: 0 of 0; expected 1; dropped: none"):
        tokenize([], tokenizer, max_length=4)
    with pytest.raises(TextError, match="max_length 1"):
        tokenize(TEXTS, tokenizer, max_length=1)
    for n in (0, -1):
        with pytest.raises(TextError, match=f"n_prompts {n}; expected 1 or more"):
            tokenize(TEXTS, tokenizer, max_length=4, n_prompts=n)


def test_all_chat_template_tokens_are_special(tokenizer):
    """Paragraphs contain words of the template (`says`, `and ends`): positions decide, not ids."""
    prompts = tokenize(TEXTS, tokenizer, max_length=99, chat_template=True)
    assert sorted(prompts.texts) == sorted(TEXTS)
    for ids, special, text in zip(prompts.tokens, prompts.special, prompts.texts, strict=True):
        own = tokenizer(text)["input_ids"]
        assert special == [True] * 3 + [i in tokenizer.all_special_ids for i in own] + [True] * 3
        assert ids[3:-3] == own
        assert tokenizer.convert_ids_to_tokens(ids[:3]) == ["<|turn|>", "user", "says"]
        assert tokenizer.convert_ids_to_tokens(ids[-3:]) == ["<|end|>", "and", "ends"]


def test_paragraph_equal_to_template_text_is_marked_correctly(tokenizer):
    prompts = tokenize(["and ends"], tokenizer, max_length=99, chat_template=True)
    assert prompts.special == [[True, True, True, False, False, True, True, True]]


def test_a_token_shared_with_the_template_is_special():
    glued = word_tokenizer(chat_template="one{{ messages[0].content }}three")
    prompts = tokenize(["two two", " two "], glued, max_length=9, chat_template=True)
    tokens = dict(zip(prompts.texts, zip(prompts.tokens, prompts.special, strict=True), strict=True))
    assert tokens[" two "][1] == [True, False, True]
    assert "two two" not in tokens  # `onetwo twothree`: no token is wholly the paragraph's
    assert prompts.dropped == {"only special tokens in the first 9": 1}


def test_a_template_longer_than_the_prompt_raises(tokenizer):
    with pytest.raises(TextError, match=r"dropped: 40 \(only special tokens in the first 3\)"):
        tokenize(TEXTS, tokenizer, max_length=3, chat_template=True)


def test_missing_and_rewriting_chat_templates_raise():
    with pytest.raises(TextError, match="no chat template"):
        tokenize(TEXTS, word_tokenizer(chat_template=None), max_length=9, chat_template=True)
    with pytest.raises(TextError, match="changes the text"):
        tokenize(
            TEXTS, word_tokenizer(chat_template="{{ messages[0].content | upper }}"), max_length=9, chat_template=True
        )


# Prompts from what a caller has


def test_given_texts_are_not_truncated_or_reordered():
    tokenizer = word_tokenizer(bos=True)
    prompts = as_prompts(TEXTS, tokenizer)
    assert prompts.tokens == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert prompts.texts == TEXTS
    assert prompts.special == [[i in tokenizer.all_special_ids for i in ids] for ids in prompts.tokens]
    assert all(flags[0] for flags in prompts.special)
    assert prompts.dropped == {}


def test_token_ids_are_taken_as_given_and_special_ones_marked(tokenizer):
    ids = tokenizer(TEXTS[3])["input_ids"]
    given = [ids, [1, *ids, 0], [3]]
    prompts = as_prompts(given, tokenizer)
    assert prompts.tokens == given
    assert prompts.special == [[False] * len(ids), [True, *[False] * len(ids), True], [True]]
    assert prompts.texts == [""] * 3
    assert as_prompts(given, None).special == [[False] * len(p) for p in given]
    assert as_prompts(prompts, tokenizer) is prompts


def test_provenance_of_prompts(tmp_path, tokenizer):
    texts = load_texts(written(tmp_path, "a.txt", "\n\n".join([*TEXTS, TEXTS[0], "ends"])))
    prompts = tokenize(texts, tokenizer, max_length=6, n_prompts=30)
    found = prompts.provenance
    assert (found["name"], found["source"], found["licence"]) == (texts.name, texts.source, texts.licence)
    assert (found["max_length"], found["chat_template"]) == (6, False)
    assert found["texts_dropped"] == {"duplicate": 1}
    assert found["prompts_dropped"] == prompts.dropped
    assert texts.sha256 in found.values()  # the text's own hash: it tells a changed source from a changed tokenizer
    assert tokenize(texts, tokenizer, max_length=6, chat_template=True).provenance["chat_template"] is True
    json.dumps(found, allow_nan=False)


def test_the_hash_of_tokens_depends_on_tokens_alone(tokenizer):
    prompts = tokenize(TEXTS, tokenizer, max_length=6)
    digest = prompts.provenance["tokens_sha256"]
    assert len(digest) == 64
    assert prompts.provenance["name"] == "given"
    assert as_prompts(prompts.tokens, None).provenance == {"name": "given", "tokens_sha256": digest}
    changed = [list(ids) for ids in prompts.tokens]
    changed[3][2] += 1
    assert as_prompts(changed, None).provenance["tokens_sha256"] != digest
    # Where one prompt ends and the next begins counts too.
    joined = [prompts.tokens[0] + prompts.tokens[1], *prompts.tokens[2:]]
    assert as_prompts(joined, None).provenance["tokens_sha256"] != digest


def test_paragraphs_that_begin_alike_count_once(tokenizer):
    prompts = tokenize(["one two three", "one two ends", "two three"], tokenizer, max_length=2)
    assert len(prompts.tokens) == 2 and prompts.dropped == {"the first 2 tokens of another prompt": 1}

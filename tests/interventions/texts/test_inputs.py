"""Every form in which prompts come, against plain forward passes of each prompt alone."""

import warnings

import numpy as np
import pytest
import torch
import transformers
from transformers import BatchEncoding

from interventions import Site, TextError, record, wrap
from interventions.activations import ActivationStream
from interventions.texts.inputs import check_prompts, read_prompts
from interventions.texts.prompts import Texts, as_prompts
from tests import tiny
from tests.tiny import TOLERANCE, prompts, tiny_model

TOKENS = prompts((5, 9, 1))
SITE = Site(1)


def padded(side, tokens=TOKENS, filler=11):
    """Ids and mask, as lists."""
    width = max(map(len, tokens))
    ids, mask = [], []
    for row in tokens:
        gap, ones = [filler] * (width - len(row)), [1] * len(row)
        zeros = [0] * len(gap)
        ids.append([*gap, *row] if side == "left" else [*row, *gap])
        mask.append([*zeros, *ones] if side == "left" else [*ones, *zeros])
    return ids, mask


_IDS, _MASK = padded("left")
_RIGHT, _RIGHT_MASK = padded("right")
FORMS = {
    "lists": (TOKENS, None),
    "tuples": (tuple(map(tuple, TOKENS)), None),
    "a tensor a prompt": ([torch.tensor(row) for row in TOKENS], None),
    "an array a prompt": ([np.array(row, dtype=np.int32) for row in TOKENS], None),
    "an array of lists": (np.array(TOKENS, dtype=object), None),
    "scalars of arrays": ([list(np.array(row)) for row in TOKENS], None),
    "an iterator": (iter(TOKENS), None),
    "lists with a list mask": (_IDS, _MASK),
    "lists with a tensor mask": (_IDS, torch.tensor(_MASK)),
    "lists with an array mask": (_RIGHT, np.array(_RIGHT_MASK)),
    "array with a mask of booleans": (np.array(_IDS), np.array(_MASK, dtype=bool)),
    "array with a mask of floats": (np.array(_RIGHT), np.array(_RIGHT_MASK, dtype=np.float32)),
    "tensor with a mask of floats": (torch.tensor(_IDS), torch.tensor(_MASK).double()),
    "tensor with a list mask": (torch.tensor(_IDS), _MASK),
    "ragged lists with a mask of their own": (TOKENS, [[1] * len(row) for row in TOKENS]),
    "a mapping": ({"input_ids": _IDS, "attention_mask": _MASK}, None),
    "a mapping of ragged lists": ({"attention_mask": None, "input_ids": TOKENS}, None),
    "a tokenizer's output": (
        BatchEncoding({"input_ids": torch.tensor(_IDS), "attention_mask": torch.tensor(_MASK), "token_type_ids": None}),
        None,
    ),
    "a mapping with its mask beside it": ({"input_ids": _RIGHT}, _RIGHT_MASK),
    "a mapping a prompt": ([{"input_ids": i, "attention_mask": m} for i, m in zip(_IDS, _MASK, strict=True)], None),
    "texts": ([" ".join(f"w{i}" for i in row) for row in TOKENS], None),
    "an array of texts": (np.array([" ".join(f"w{i}" for i in row) for row in TOKENS]), None),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_prompts(form):
    given, mask = FORMS[form]
    if form == "an iterator":
        given = iter(TOKENS)
    found, texts = read_prompts(given, tiny.tokenizer(), mask)
    assert found == TOKENS and all(type(token) is int for row in found for token in row)
    assert texts == (list(FORMS[form][0]) if "texts" in form else [""] * 3)


@pytest.mark.parametrize(
    "given",
    [
        *("w5 w6 w7", [5, 6, 7], (5, 6, 7), np.array([5, 6, 7]), torch.tensor([5, 6, 7])),
        {"input_ids": [5, 6, 7, 0], "attention_mask": [1, 1, 1, 0]},
    ],
)
def test_one_prompt_needs_no_list(given):
    assert read_prompts(given, tiny.tokenizer())[0] == [[5, 6, 7]]


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("lists with a list mask", "gpt2"),
        ("lists with an array mask", "llama"),
        ("a tokenizer's output", "llama"),
        ("texts", "gpt2"),
    ],
)
def test_padding_changes_no_activation(form, name, device):
    """For learned and rotary positions, within `TOLERANCE`, as between batches of other shapes."""
    given, mask = FORMS[form]
    hf = tiny_model(name, device)
    model = wrap(hf, tiny.tokenizer())
    recording = record(model, given, [SITE], attention_mask=mask)
    for i, ids in enumerate(TOKENS):
        seen = []
        handle = tiny.blocks(name, hf)[SITE.layer].register_forward_hook(
            lambda _, __, out, seen=seen: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        with torch.no_grad():
            hf(input_ids=torch.tensor([ids], device=device))
        handle.remove()
        own = recording.activations[SITE][i, : len(ids)]
        assert torch.allclose(own, seen[0].view(own.shape), atol=TOLERANCE, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_reader_removes_a_tokenizers_padding(side):
    tokenizer, texts = tiny.tokenizer(), ["w5 w6 w7", "w8", "w9 w2 w0 w4"]
    given = tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")
    alone = [tokenizer(text)["input_ids"] for text in texts]
    assert given["input_ids"].shape == (3, 4)
    assert as_prompts(given, tokenizer).tokens == alone
    model = wrap(tiny_model("llama"), tokenizer)
    recording = record(model, given)
    assert [row[:n].tolist() for row, n in zip(recording.tokens, recording.length, strict=True)] == alone
    stream = ActivationStream(model, given, [SITE], batch_tokens=4, buffer_tokens=4)
    assert stream.prompts.tokens == alone


@pytest.mark.parametrize(
    ("given", "mask", "message"),
    [
        (b"ab", None, "prompts are bytes of length 2"),
        ([b"ab"], None, "prompt 0 is bytes; expected a list of token ids"),
        (["w1", [1]], None, "some prompts are texts and others are token ids"),
        (["w1"], [[1]], "attention mask was given with texts"),
        (["w1", ""], None, "prompt 1 has no tokens"),
        ([1, [2, 3]], None, "prompt 0 is 1; expected a list of token ids; for one prompt, a list of one"),
        ([True, False], None, "prompt 0 is True"),
        (np.zeros((1, 1, 2), int), None, r"shape \(1, 1, 2\)"),
        (torch.tensor(3), None, r"shape \(\)"),
        ({"input_ids": [1, 2], "attention_mask": [[1, 1]]}, None, "attention mask of prompt 0"),
        ({"ids": [[1]]}, None, "a mapping of 'ids'; expected 'input_ids' in it"),
        ({"input_ids": [[1]], "position_ids": [[4]]}, None, "prompts hold 'position_ids' beside 'input_ids'"),
        ({"input_ids": [[1]], "attention_mask": [[1]]}, [[1]], "given twice"),
        ({(1, 2), (3, 4)}, None, "prompts are set"),
        (5, None, "prompts are int"),
        (None, None, "prompts are NoneType"),
        ([[1.0, 2.0]], None, "prompt 0 holds 1.0, float; expected token ids"),
        ([[1], torch.tensor([1.5])], None, "prompt 1 holds 1.5, float"),
        (torch.tensor([[True, False]]), None, "prompt 0 holds True, bool"),
        ([[1, None]], None, "prompt 0 holds None"),
        ([["w1", "w2"]], None, "prompt 0 holds 'w1', str"),
        (torch.zeros(0, 4, dtype=torch.long), None, "length 0"),
        (torch.zeros(2, 0, dtype=torch.long), None, "prompt 0 has no tokens"),
        ([[1, 2]], [[1]], "prompt 0 has 1 entries from 1 to 1 for 2 tokens"),
        ([[1, 2], [3]], torch.ones(2, 2), "prompt 1 has 2 entries from 1 to 1 for 1 tokens"),
        ([[1, 2]], [[1, 1], [1, 1]], "an attention mask of 2 rows for 1 prompts"),
        ([[1, 2]], [1, 1], "attention mask of 2 rows|attention mask of prompt 0 is 1"),
        ([[1, 2, 3]], [[1, 0, 1]], "prompt 0 has a hole"),
        ([[1, 2, 3]], [[0, 1, 0]], "or padding on both sides"),
        ([[1, 2], [3, 4]], [[1, 1], [0, 0]], "prompt 1 has no tokens"),
        ([[1, 2]], [[0.0, -float("inf")]], "holds -inf"),
        ([[1, 2]], [[0, -1]], "2 entries from -1 to 0"),
        ([[1, 2]], [[0.5, 1]], "holds 0.5, float; expected zeros and ones"),
        (torch.ones(1, 2, dtype=torch.long), torch.ones(1, 1, 2, 2), r"attention mask of shape \(1, 1, 2, 2\)"),
    ],
    ids=str,
)
def test_invalid_prompts_raise(given, mask, message):
    with pytest.raises(TextError, match=message):
        read_prompts(given, tiny.tokenizer(), mask)


def test_texts_that_cannot_be_tokenized_raise():
    with pytest.raises(TextError, match=r"no tokenizer; pass wrap\(model, tokenizer\) in its place"):
        record(tiny_model("llama"), ["w1 w2"])
    with pytest.raises(TextError, match="cannot read"):
        as_prompts(["w1 \ud800"], tiny.tokenizer())
    with pytest.raises(TextError, match="tokenize"):
        as_prompts(Texts(["w1"], "mine", "0", "mine", "by hand"), tiny.tokenizer())


# What the model can read


def built(config_class, **settings):
    config = getattr(transformers, config_class)(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return wrap(transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False))


_SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = {**_SMALL, "intermediate_size": 64}
_GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4}
TABLES = {
    "gpt2": ("GPT2Config", {**_GPT2, "n_positions": 12}, 12),
    "opt": ("OPTConfig", {**_SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 12}, 12),
    "gpt_bigcode": ("GPTBigCodeConfig", {**_GPT2, "n_positions": 12}, 12),
    "biogpt": ("BioGptConfig", {**_LLAMA, "max_position_embeddings": 12}, 12),
    "gptj": ("GPTJConfig", {**_GPT2, "n_positions": 12, "rotary_dim": 4}, 12),
    "codegen": ("CodeGenConfig", {**_GPT2, "n_positions": 12, "rotary_dim": 4}, 12),
    "mpt": ("MptConfig", {"vocab_size": 97, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 12}, 12),
}


@pytest.mark.parametrize("name", TABLES)
def test_prompts_longer_than_the_positions_raise(name):
    """The limit is the model's own: its forward pass fails with one token more."""
    config_class, settings, most = TABLES[name]
    model = built(config_class, **settings)
    ids = torch.arange(most + 1)[None]
    model.hf(input_ids=ids[:, :most])
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        model.hf(input_ids=ids)
    assert record(model, ids[:, :most]).length.tolist() == [most]
    with pytest.raises(
        TextError, match=rf"prompt 1 has {most + 1} tokens, .* positions for {most}; .*--max-length {most}"
    ):
        record(model, [[1, 2], ids[0]])
    with pytest.raises(TextError, match="--max-length"):
        ActivationStream(model, ids, [Site(0)], batch_tokens=2, buffer_tokens=2)


def scaled(rope_type, **settings):
    return {"rope_type": rope_type, "factor": 2.0, "rope_theta": 1e4, **settings}


@pytest.mark.parametrize(
    ("config_class", "settings", "most"),
    [
        ("LlamaConfig", {"max_position_embeddings": 12}, 12),
        ("Gemma2Config", {"max_position_embeddings": 12, "head_dim": 8}, 12),
        ("LlamaConfig", {"max_position_embeddings": 12, "rope_parameters": scaled("linear")}, 24),
        ("LlamaConfig", {"max_position_embeddings": 12, "rope_parameters": scaled("dynamic")}, 24),
        (
            "LlamaConfig",
            {"max_position_embeddings": 20, "rope_parameters": scaled("yarn", original_max_position_embeddings=10)},
            20,
        ),
    ],
    ids=["llama", "gemma2", "linear", "dynamic", "yarn"],
)
def test_rotary_prompts_beyond_the_stated_context_warn_once(config_class, settings, most):
    model = built(config_class, **_LLAMA, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record(model, [list(range(most))])
    with pytest.warns(
        UserWarning, match=rf"up to {most + 1} tokens .* states {most} positions.*--max-length {most}"
    ) as seen:
        record(model, [list(range(most + 1))])
        record(model, [list(range(most + 2))])
    assert len(seen) == 1


def test_models_without_a_stated_context_take_any_length():
    config = {"vocab_size": 97, "hidden_size": 32}
    for model in (
        built("BloomConfig", **config, n_layer=2, n_head=4),
        built("MambaConfig", **config, num_hidden_layers=2),
    ):
        check_prompts(model, [[1] * 100_000])

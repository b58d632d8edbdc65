"""A tokenizer that knows the templates' words, and a tiny random model that reads it."""

import functools
import re
from itertools import islice

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from diagnostics.pairs.templates import TASKS, drafts
from interventions import wrap
from tests import tiny

SIZE = 512


def tokenizer(pieces: dict[str, tuple[str, ...]] | None = None, without: tuple[str, ...] = (), bos: bool = False):
    """A token for each word, digit and mark. pieces: words that are read as several tokens; without: words it does not know."""
    pieces = pieces or {}
    known = [word for word in _known() if word not in (*without, *pieces)]
    known += [("##" * (i > 0)) + part for parts in pieces.values() for i, part in enumerate(parts)]
    names = ["<unk>", "<s>", *dict.fromkeys(known)]
    assert len(names) <= SIZE
    core = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[0-9]|,"), "isolated")]
    )
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>")


@functools.cache
def _known() -> list[str]:
    found: dict[str, None] = {}
    for task in TASKS:
        for draft in islice(drafts(task, 0), 1500):
            for part in (*draft.texts, draft.right, draft.wrong):
                found |= dict.fromkeys(re.findall(r"[A-Za-z]+|[0-9]|,", part))
    return list(found)


def model(**settings):
    """A random Llama: right by chance, so that what fails is most of it."""
    return wrap(tiny.tiny_model("llama", vocab=SIZE), tokenizer(**settings))


@torch.no_grad()
def alone(prompt, right: int, wrong: int) -> float:
    """The logit difference after one prompt, by a plain forward pass."""
    logits = tiny.tiny_model("llama", vocab=SIZE)(input_ids=torch.tensor([list(prompt)])).logits[0, -1]
    return float(logits[right] - logits[wrong])

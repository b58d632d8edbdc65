"""Prompts in every form that is accepted: texts, lists of token ids, arrays, a tokenizer's output, padded or not."""

import math
import warnings
import weakref
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from interventions.errors import TextError, one_line
from interventions.models.causal_model import CausalModel
from interventions.models.weights import n_embedded

_EXPECTED = "expected texts, lists of token ids, or a tokenizer's output"
_BESIDE_IDS = {"attention_mask", "token_type_ids", "special_tokens_mask", "offset_mapping", "length", "labels"} | {
    "overflow_to_sample_mapping",
    "num_truncated_tokens",
    "overflowing_tokens",
}
"""what a tokenizer may return beside ids; none but the mask changes which tokens a prompt has"""
_UNORDERED = (Mapping, Set)
_WARNED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer gives for a whole text. Raises `TextError` for text that it cannot read."""
    try:
        return list(tokenizer(text, verbose=False)["input_ids"])
    except (TypeError, UnicodeEncodeError) as error:  # half of a surrogate pair, which no UTF-8 holds
        raise TextError(f"{type(tokenizer).__name__} cannot read {text[:40]!r}: {one_line(error)}") from error


def read_prompts(
    prompts: Any, tokenizer: PreTrainedTokenizerBase | None, attention_mask: Any = None
) -> tuple[list[list[int]], list[str]]:
    """The token ids of each prompt, without the padding that a mask marks; and its text, empty where ids were given.

    prompts: texts; or token ids as lists, arrays or a tensor `[prompt, pos]`; or a mapping with `input_ids` and perhaps
    `attention_mask`, as a tokenizer gives for texts; or a list of such mappings, one a prompt. A single text, and the ids of a single
    prompt, need no list around them.
    attention_mask: ones for tokens and zeros for padding on the left or the right, of the ids' shape. Ids without a mask are
    whole prompts: which of them are padding cannot be known.
    Raises `TextError` for anything else: an empty prompt, ids that are not whole numbers,
    a mask of another shape or with holes, texts without a tokenizer.
    """
    if isinstance(prompts, Mapping):
        prompts, attention_mask = _unpacked(prompts, attention_mask)
    if _is_one(prompts):
        prompts, attention_mask = [prompts], None if attention_mask is None else [attention_mask]
    rows = _rows(prompts, "prompts")
    if not rows:
        raise TextError(f"prompts are {type(prompts).__name__} of length 0, which is empty; {_EXPECTED}")
    masks = [None] * len(rows) if attention_mask is None else _rows(attention_mask, "attention mask")
    if len(masks) != len(rows):
        raise TextError(f"an attention mask of {len(masks)} rows for {len(rows)} prompts; expected a row a prompt")
    texts = [row if isinstance(row, str) else "" for row in rows]
    if any(isinstance(row, str) for row in rows):
        if not all(isinstance(row, str) for row in rows):
            raise TextError("some prompts are texts and others are token ids; give all of one kind")
        if attention_mask is not None:
            raise TextError("an attention mask was given with texts; expected it with token ids, for their padding")
        if tokenizer is None:
            raise TextError(
                "texts were given, but the model has no tokenizer; pass wrap(model, tokenizer) in its place, or give token ids"
            )
        tokens = [encode(text, tokenizer) for text in texts]
    else:
        tokens = [_prompt(row, mask, i) for i, (row, mask) in enumerate(zip(rows, masks, strict=True))]
    if not all(tokens):
        empty = [len(ids) for ids in tokens].index(0)
        raise TextError(f"prompt {empty} has no tokens, it is empty; leave empty prompts out")
    return tokens, texts


def _unpacked(given: Mapping[Any, Any], attention_mask: Any) -> tuple[Any, Any]:
    if "input_ids" not in given:
        raise TextError(
            f"prompts are a mapping of {', '.join(map(repr, given)) or 'nothing'}; expected 'input_ids' in it"
        )
    if unknown := [key for key in given if key != "input_ids" and key not in _BESIDE_IDS]:
        raise TextError(
            f"prompts hold {', '.join(map(repr, unknown))} beside 'input_ids'; expected a text's ids and attention mask alone"
        )
    own = given.get("attention_mask")
    if own is not None and attention_mask is not None:
        raise TextError("an attention mask is given twice, within the prompts and beside them; give it once")
    return given["input_ids"], attention_mask if own is None else own


def _is_one(given: Any) -> bool:
    """Whether this is one prompt: a text, or token ids without a list around them."""
    if isinstance(given, Tensor | np.ndarray):
        return given.ndim == 1 and (isinstance(given, Tensor) or given.dtype.kind not in "OU")
    if isinstance(given, list | tuple):
        return bool(given) and all(isinstance(one, int | np.integer) and not isinstance(one, bool) for one in given)
    return isinstance(given, str)


def _rows(given: Any, what: str) -> list[Any]:
    """The rows of a table or list, one a prompt."""
    if isinstance(given, bytes):
        raise TextError(f"{what} are bytes of length {len(given)}; {_EXPECTED}")
    if isinstance(given, Tensor) or (isinstance(given, np.ndarray) and given.dtype.kind not in "OU"):
        if given.ndim != 2:
            raise TextError(f"{what} of shape {tuple(given.shape)}; expected [prompt, pos], or [pos] of one prompt")
        return list(given)
    try:
        if not isinstance(given, _UNORDERED):
            return list(given)
    except TypeError:
        pass
    raise TextError(f"{what} are {type(given).__name__}; {_EXPECTED}")


def _prompt(row: Any, mask: Any, i: int) -> list[int]:
    """The ids of one prompt, without its padding."""
    if isinstance(row, Mapping):
        row, mask = _unpacked(row, mask)
    ids = _integers(row, f"prompt {i}", "token ids", (int, np.integer))
    if mask is None:
        return ids
    marks = _integers(mask, f"the attention mask of prompt {i}", "zeros and ones", (int, float, np.number, np.bool_))
    n = sum(marks)
    if len(marks) != len(ids) or not set(marks) <= {0, 1}:
        raise TextError(
            f"the attention mask of prompt {i} has {len(marks)} entries from {min(marks, default=0)} to {max(marks, default=0)} for "
            f"{len(ids)} tokens; expected a 1 for each token and a 0 for each padding"
        )
    if marks == [1] * n + [0] * (len(ids) - n):
        return ids[:n]
    if marks == [0] * (len(ids) - n) + [1] * n:
        return ids[len(ids) - n :]
    raise TextError(
        f"the attention mask of prompt {i} has a hole, or padding on both sides; expected each prompt's tokens side by side, "
        "padded on one side"
    )


def _integers(row: Any, what: str, expected: str, kinds: tuple[type, ...]) -> list[int]:
    """A list, an array or a tensor of whole numbers, each of one of `kinds` (Python's booleans only where floats are allowed)."""
    if isinstance(row, (str, bytes, *_UNORDERED)):
        raise TextError(f"{what} is {type(row).__name__}; expected a list of {expected}")
    try:
        values = list(row.tolist() if hasattr(row, "tolist") else row)
    except TypeError:
        raise TextError(f"{what} is {row!r}; expected a list of {expected}; for one prompt, a list of one") from None
    if set(map(type, values)) <= {int}:
        return values
    values = [value.item() if isinstance(value, Tensor) and value.ndim == 0 else value for value in values]
    for value in values:
        known = isinstance(value, kinds) and (float in kinds or not isinstance(value, bool))
        if not known or not math.isfinite(value) or value != int(value):
            raise TextError(f"{what} holds {value!r}, {type(value).__name__}; expected {expected}")
    return list(map(int, values))


def check_prompts(model: CausalModel, prompts: Sequence[Sequence[int]]) -> None:
    """Whether the model can read these prompts: ids in its vocabulary, and no more tokens than it has positions.

    Raises `TextError` for an id outside and for a prompt that is longer than a table of positions. Where positions are computed
    (rotary, ALiBi) it warns, once for each model, of prompts longer than the configuration states: the model runs on them, but
    was not made for them.
    """
    n_embed = n_embedded(model.hf)
    for i, ids in enumerate(prompts):
        outside = min(ids) if min(ids, default=0) < 0 else max(ids, default=0)
        if not 0 <= outside < n_embed:
            raise TextError(
                f"token id {outside} is outside the vocabulary of {n_embed}, in prompt {i}; was it another tokenizer's?"
            )
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]), default=0)
    n = max(map(len, prompts), default=0)
    table, stated = _table(model), _stated(model)
    if table is not None and n > table:
        raise TextError(
            f"prompt {longest} has {n} tokens, but {model.name} has positions for {table}; cut prompts there: --max-length {table}, "
            f"or tokenize(…, max_length={table})"
        )
    if table is None and stated is not None and n > stated and model.hf not in _WARNED:
        _WARNED.add(model.hf)
        warnings.warn(
            f"prompts of up to {n} tokens for {model.name}, whose configuration states {stated} positions: it runs beyond what it "
            f"was made for, and effects there may not be those of a working model; --max-length {stated} cuts prompts",
            stacklevel=3,
        )


def _table(model: CausalModel) -> int | None:
    """The number of positions in the model's table, beyond which it cannot read; None where positions are computed."""
    given = model.hf.get_input_embeddings()
    others = tuple(  # towers for images or sounds
        f"{name}."
        for name, module in model.base.named_modules()
        if name and isinstance(module, PreTrainedModel) and module.main_input_name != "input_ids"
    )
    sizes = [
        module.num_embeddings - getattr(module, "offset", 0 if module.padding_idx is None else module.padding_idx + 1)
        for name, module in model.base.named_modules()
        if not name.startswith(others)
        and isinstance(module, nn.Embedding)
        and module is not given
        and ("wpe" in name or "pos" in name)
    ]
    config = model.config
    most = getattr(config, "max_position_embeddings", None)
    for name, buffer in model.base.named_buffers():  # sines kept as a table
        if (
            not name.startswith(others)
            and "pos" in name.rsplit(".", 1)[-1]
            and buffer.ndim == 2
            and buffer.shape[0] == most
        ):
            sizes.append(buffer.shape[0])
    if config.model_type == "mpt":  # ALiBi, but formed for so many positions
        sizes.append(config.max_seq_len)
    return min(sizes, default=None)


def _stated(model: CausalModel) -> int | None:
    """The number of positions that the configuration states, scaled as its rotary frequencies are; None where it states none."""
    most = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(most, int) or most < 1:
        return None
    scaling = getattr(model.config, "rope_parameters", None) or getattr(model.config, "rope_scaling", None) or {}
    kinds = [v for v in scaling.values() if isinstance(v, Mapping)] or [scaling]  # one a type of layer, or one for all
    return min(
        max(most, int((kind.get("original_max_position_embeddings") or most) * (kind.get("factor") or 1)))
        for kind in kinds
    )

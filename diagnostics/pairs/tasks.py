"""Pairs of a task: drafts as tokens, each checked on the model, and what fails counted."""

from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from diagnostics.pairs.differences import FLOOR, check_floor, differences
from diagnostics.pairs.pair import Pair, Pairs
from diagnostics.pairs.templates import TASKS, Draft, drafts
from interventions.errors import TextError
from interventions.models.wrapping import wrap
from interventions.texts.inputs import encode

_BATCH = 64
_DRAWS = 1000, 20
"""draws before a task is given up: so many, or so many a pair asked for"""


def make_pairs(model: Any, task: str, n: int = 100, seed: int = 0, floor: float = FLOOR) -> Pairs:
    """The first n pairs of a task, in an order that `seed` fixes, that the model gets right: asking for more extends the list.

    Kept are pairs with prompts of equal length, one token for each of the template's main words and for each answer,
    m_clean > 0 > m_corrupt and m_clean − m_corrupt ≥ `floor` logits, m = logit(right) − logit(wrong) at the last position. Others are
    counted by reason in `left_out`. No pair comes twice, nor with clean and corrupt exchanged. Every position has a role; a word that is
    not one of the main ones and has several tokens takes role, role:2, …; tokens that the tokenizer adds are called BOS.
    Raises `TextError` for an unknown task, n below 1, a model without a tokenizer that knows character offsets, and fewer than n pairs
    in 1,000 draws, or in 20 n where that is more.
    """
    if task not in TASKS:
        raise TextError(f"no task {task!r}; known: {', '.join(TASKS)}")
    if n < 1:
        raise TextError(f"{n} pairs asked for; expected 1 or more")
    check_floor(floor)
    model = wrap(model)
    tokenizer = checked_tokenizer(model.tokenizer)
    left_out: Counter[str] = Counter()
    kept: list[tuple[Pair, float, float]] = []
    candidates, draws = islice(drafts(task, seed), max(_DRAWS[0], _DRAWS[1] * n)), 0
    while len(kept) < n:
        batch = [tokenized(task, draft, tokenizer) for draft in islice(candidates, _BATCH)]
        if not batch:
            raise TextError(
                f"{task}: {len(kept)} pairs could be made of {draws} drawn, expected {n}; left out: {dict(left_out)}; ask for "
                f"fewer, or use a model that can do the task"
            )
        said = iter(zip(*differences(model, [p for p in batch if isinstance(p, Pair)]), strict=True))
        for found in batch:
            draws += 1
            if isinstance(found, str):
                left_out[found] += 1
                continue
            m_clean, m_corrupt = next(said)
            if why := failure(m_clean, m_corrupt, floor, right_first=True):
                left_out[why] += 1
            else:
                kept.append((found, m_clean, m_corrupt))
            if len(kept) == n:
                break
    pairs, m_clean, m_corrupt = zip(*kept, strict=True)
    origin = {"task": task, "seed": seed, "floor": floor, "drawn": draws}
    return Pairs(pairs, np.array(m_clean), np.array(m_corrupt), dict(left_out), origin)


def failure(m_clean: float, m_corrupt: float, floor: float, *, right_first: bool) -> str | None:
    """Why a pair is left out, or None. right_first: the right answer must lead after the clean prompt, and the wrong one after the other."""
    if not np.isfinite(m_clean - m_corrupt):
        return "a logit difference that is not finite"
    if right_first and m_clean <= 0:
        return "right answer not ahead after the clean prompt"
    if right_first and m_corrupt >= 0:
        return "wrong answer not ahead after the corrupt prompt"
    if abs(m_clean - m_corrupt) < floor:
        return f"clean and corrupt logit difference less than {floor:g} apart"
    return None


def checked_tokenizer(tokenizer: Any) -> PreTrainedTokenizerBase:
    """The tokenizer, if it tells which characters a token stands for. Raises `TextError` for none, and for one that does not."""
    if tokenizer is None:
        raise TextError(
            "tasks are texts, but the model has no tokenizer; wrap(model, tokenizer), or give pairs of token ids"
        )
    if not tokenizer.is_fast:
        raise TextError(
            f"{type(tokenizer).__name__} gives no character offsets; use a fast tokenizer, or give pairs of token ids"
        )
    return tokenizer


def tokenized(task: str, draft: Draft, tokenizer: PreTrainedTokenizerBase) -> Pair | str:
    """The pair, or why it is none."""
    clean, corrupt = (_with_roles(parts, tokenizer) for parts in (draft.clean, draft.corrupt))
    for ids, roles in (clean, corrupt):
        if tokenizer.unk_token_id in ids:
            return "a word that the tokenizer does not know"
        if {f"{role}:2" for role in TASKS[task].single} & set(roles) or set(TASKS[task].single) - set(roles):
            return "a main word that is not one token"
    if clean[1] != corrupt[1]:
        return "prompts of unequal length"
    answers: list[int] = []
    for answer in (draft.right, draft.wrong):
        found = {
            continuation(text, answer, ids, tokenizer)
            for text, (ids, _) in zip(draft.texts, (clean, corrupt), strict=True)
        }
        if len(found) != 1 or len(one := found.pop() or ()) != 1:
            return "an answer that is not one token"
        answers.append(one[0])
    return Pair(tuple(clean[0]), tuple(corrupt[0]), answers[0], answers[1], tuple(clean[1]), draft.texts, task)


def _with_roles(parts: dict[str, str], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[str]]:
    """Token ids of the parts as one text, and each token's role: that of the part in which it ends."""
    encoded = tokenizer("".join(parts.values()), return_offsets_mapping=True, verbose=False)
    ends = np.cumsum([len(text) for text in parts.values()])
    names, seen, roles = list(parts), Counter(), []
    for start, end in encoded["offset_mapping"]:
        role = "BOS" if start == end else names[int(np.searchsorted(ends, end))]
        seen[role] += 1
        roles.append(role if seen[role] == 1 else f"{role}:{seen[role]}")
    return list(encoded["input_ids"]), roles


def continuation(
    prompt: str, answer: str, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...] | None:
    """The tokens that the answer adds to a prompt of these `ids`; None where it changes the prompt's own tokens."""
    whole = encode(prompt + answer, tokenizer)
    return tuple(whole[len(ids) :]) if whole[: len(ids)] == list(ids) else None

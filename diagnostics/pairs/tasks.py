"""Tasks: templates that give pairs, a role for each of their tokens, and the check of each pair on the model. All templates are ours.

| task | clean prompt (right, wrong) | changed in the corrupt prompt |
|---|---|---|
| ioi | When Mary and John went to the store, John gave a drink to (Mary, John); also with the first two names exchanged | the second John: Mary |
| agreement | The teacher near the doctors certainly (is, are) | the subject's number |
| capitals | The beautiful capital of France is the city of (Paris, Rome) | the country |
| greater_than | The war lasted from the year 1761 to the year 17 (7, 3) | the first year's decade: 1721 |
| pronouns | The uncle was tired because (he, she) | the person |

agreement: the attractor (doctors) has either number, so it agrees with the subject of one of the two prompts and not of the other.
greater_than: of the years that the two answers begin, the wrong one (1730s) is over before the clean prompt's war begins (1761). After the
corrupt prompt (1721) both are possible, and the nearer one is the expected answer. Source: the question of arXiv:2305.00586, as one pair of
tokens for tokenizers that read years digit by digit.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from diagnostics.pairs import words
from diagnostics.pairs.differences import FLOOR, differences
from diagnostics.pairs.pair import Pair, Pairs
from diagnostics.sampling.tokens import generator
from interventions.errors import TextError
from interventions.models.wrapping import wrap
from interventions.texts.inputs import encode

_MOST_DRAWS = 20_000
_BATCH = 64


class Draft(NamedTuple):
    """A pair before tokenisation."""

    clean: dict[str, str]
    """role -> its text, spaces included, in the order of the prompt"""
    changed: dict[str, str]
    """role -> its text in the corrupt prompt"""
    right: str
    wrong: str


@dataclass(frozen=True)
class Task:
    """A template and its choices of words."""

    choices: tuple[Sequence[Any], ...]
    """what each argument of `draft` is chosen from"""
    draft: Callable[..., Draft | None]
    """a pair of these choices, or None where they do not go together"""
    single: tuple[str, ...]
    """roles that must be one token"""


def _ioi(io: str, s: str, io_first: bool, start: str, moved: str, place: str, gave: str, thing: str) -> Draft | None:
    if io == s:
        return None
    one, two = (("IO", io), ("S1", s)) if io_first else (("S1", s), ("IO", io))
    clean = {
        "start": start,
        one[0]: f" {one[1]}",
        f"{one[0]}+1": " and",
        two[0]: f" {two[1]}",
        f"{two[0]}+1": f" {moved}",
    }
    clean |= {"to": " to", "the": " the", "place": f" {place}", "comma": ",", "S2": f" {s}", "S2+1": f" {gave}"}
    clean |= {"a": " a", "object": f" {thing}", "END": " to"}
    return Draft(clean, {"S2": f" {io}"}, f" {io}", f" {s}")


def _agreement(
    subject: str, plural: bool, where: str, attractor: str, plurals: bool, adverb: str, verbs: str
) -> Draft | None:
    if subject == attractor:
        return None
    numbers = (f" {subject}", f" {subject}s")
    one, many = (f" {verb}" for verb in verbs.split())
    clean = {"start": "The", "subject": numbers[plural], "preposition": f" {where}", "the": " the"}
    clean |= {"attractor": f" {attractor}{'s' * plurals}", "END": f" {adverb}"}
    return Draft(clean, {"subject": numbers[not plural]}, *((many, one) if plural else (one, many)))


def _capitals(country: str, other: str, adjective: str) -> Draft | None:
    if country == other:
        return None
    clean = {"start": "The", "adjective": f" {adjective}", "capital": " capital", "of": " of", "country": f" {country}"}
    clean |= {"is": " is", "the": " the", "city": " city", "END": " of"}
    return Draft(clean, {"country": f" {other}"}, f" {words.CAPITALS[country]}", f" {words.CAPITALS[other]}")


def _greater_than(event: str, lasted: str, century: str, late: int, early: int, year: int) -> Draft | None:
    if early + 2 > late:
        return None
    clean = {
        "start": "The",
        "event": f" {event}",
        "verb": f" {lasted}",
        "from": " from",
        "the": " the",
        "year": " year",
    }
    clean |= {"space": " ", "Y1": century[0], "Y2": century[1], "decade": str(late), "unit": str(year), "to": " to"}
    clean |= {"the2": " the", "year2": " year", "space2": " ", "Y1again": century[0], "END": century[1]}
    return Draft(clean, {"decade": str(early)}, str(late + 1), str(early + 1))


def _pronouns(both: str, female: bool, start: str, adjective: str, end: str) -> Draft:
    people, answers = both.split(":"), (" he", " she")
    clean = {
        "start": start,
        "person": f" {people[female]}",
        "was": " was",
        "adjective": f" {adjective}",
        "END": f" {end}",
    }
    return Draft(clean, {"person": f" {people[not female]}"}, answers[female], answers[not female])


_EITHER = (False, True)
TASKS = {
    "ioi": Task(
        (
            *(words.NAMES, words.NAMES, _EITHER, ("When", "While", "After", "As"), ("went", "came", "walked", "returned")),
            *(words.PLACES, ("gave", "handed", "offered", "passed", "brought"), words.OBJECTS),
        ),
        _ioi,
        ("IO", "S1", "S2"),
    ),
    "agreement": Task(
        (
            *(words.SINGULAR, _EITHER, ("near", "beside", "behind", "with"), words.SINGULAR, _EITHER),
            *(("certainly", "probably", "really", "clearly", "always", "now"), ("is are", "was were", "has have")),
        ),
        _agreement,
        ("subject", "attractor"),
    ),
    "capitals": Task(
        (list(words.CAPITALS), list(words.CAPITALS), ("beautiful", "famous", "old", "great", "modern")),
        _capitals,
        ("country",),
    ),
    "greater_than": Task(
        (words.EVENTS, ("lasted", "ran", "continued", "went"), ("15", "16", "17", "18", "19"), range(3, 9), range(1, 8), range(1, 9)),
        _greater_than,
        ("Y1", "Y2", "decade", "unit", "END"),
    ),
    "pronouns": Task(
        (words.MALE_FEMALE, _EITHER, ("The", "My", "Our", "His", "Her"), words.ADJECTIVES, ("because", "when", "until")),
        _pronouns,
        ("person",),
    ),
}  # fmt: skip
"""name -> `Task`"""


def make_pairs(model: Any, task: str, n: int = 100, seed: int = 0, floor: float = FLOOR) -> Pairs:
    """The first n pairs of a task, in an order that `seed` fixes, that the model gets right: asking for more extends the list.

    Kept are pairs with prompts of equal length, one token for each of the template's main words and for each answer,
    m_clean > 0 > m_corrupt and m_clean − m_corrupt ≥ `floor` logits, m = logit(right) − logit(wrong) at the last position. Others are
    counted by reason in `left_out`. No pair comes twice, nor with clean and corrupt exchanged. Every position has a role; a word that is
    not one of the main ones and has several tokens takes role, role:2, …; tokens that the tokenizer adds are called BOS.
    Raises `TextError` for an unknown task, n below 1, a model without a tokenizer that knows character offsets, and fewer than n pairs.
    """
    if task not in TASKS:
        raise TextError(f"no task {task!r}; known: {', '.join(TASKS)}")
    if n < 1:
        raise TextError(f"{n} pairs asked for; expected 1 or more")
    model = wrap(model)
    tokenizer = checked_tokenizer(model.tokenizer)
    left_out: Counter[str] = Counter()
    kept: list[tuple[Pair, float, float]] = []
    candidates, draws = drafts(task, seed), 0
    while len(kept) < n:
        batch = [tokenized(task, draft, tokenizer) for draft in islice(candidates, _BATCH)]
        if not batch:
            raise TextError(
                f"{task}: {len(kept)} pairs could be made of {draws} drawn, expected {n}; left out: {dict(left_out) or 'none'}; ask for "
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


def drafts(task: str, seed: int) -> Iterator[Draft]:
    """Different pairs of a task in random order, at most 20,000 draws: neither a pair nor its mirror image comes twice."""
    template, stream, seen = TASKS[task], generator(seed, "pairs", task), set()
    sizes = [len(choice) for choice in template.choices]
    size = int(np.prod(sizes))
    if size <= _MOST_DRAWS:
        drawn = torch.randperm(size, generator=stream)
    else:
        drawn = torch.randint(size, (_MOST_DRAWS,), generator=stream)
    for chosen in zip(*np.unravel_index(drawn.numpy(), sizes), strict=True):
        draft = template.draft(*(choice[i] for choice, i in zip(template.choices, chosen, strict=True)))
        if draft is None:
            continue
        both = frozenset({"".join(draft.clean.values()), "".join((draft.clean | draft.changed).values())})
        if both not in seen:
            seen.add(both)
            yield draft


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
    clean, corrupt = (_with_roles(words, tokenizer) for words in (draft.clean, draft.clean | draft.changed))
    for _, roles in (clean, corrupt):
        if {f"{role}:2" for role in TASKS[task].single} & set(roles) or set(TASKS[task].single) - set(roles):
            return "a main word that is not one token"
    if clean[1] != corrupt[1]:
        return "prompts of unequal length"
    texts = "".join(draft.clean.values()), "".join((draft.clean | draft.changed).values())
    answers: list[int] = []
    for answer in (draft.right, draft.wrong):
        found = {
            continuation(text, answer, ids, tokenizer) for text, (ids, _) in zip(texts, (clean, corrupt), strict=True)
        }
        if len(found) != 1 or len(one := found.pop() or ()) != 1:
            return "an answer that is not one token"
        answers.append(one[0])
    return Pair(tuple(clean[0]), tuple(corrupt[0]), answers[0], answers[1], tuple(clean[1]), texts, task)


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

"""The tasks' templates, and their pairs of prompts in random order, a role for each word. All templates are ours.

    task          clean prompt (right, wrong)                                              changed in the corrupt prompt
    ioi           When Mary and John went to the store, John gave a drink to (Mary, John)  the second John: Mary
    agreement     The teacher near the doctors certainly (is, are)                         the subject's number
    capitals      The beautiful capital of France is the city of (Paris, Rome)             the country
    greater_than  The war lasted from the year 1761 to the year 17 (7, 3)                  the first year's decade: 1721
    pronouns      The uncle was tired because (he, she)                                    the person

ioi: also with the first two names exchanged.

agreement: the attractor (doctors) has either number, so it agrees with the subject of one of the two prompts and not of the other.

greater_than: of the years that the two answers begin, the wrong one (1730s) is over before the clean prompt's war begins (1761). After the
corrupt prompt (1721) both are possible, and the nearer one is the expected answer. Source: the question of arXiv:2305.00586, as one pair of
tokens for tokenizers that read years digit by digit.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from diagnostics.pairs import words
from diagnostics.sampling.tokens import generator

_MOST_DRAWS = 20_000


class Draft(NamedTuple):
    """A pair before tokenisation."""

    clean: dict[str, str]
    """role -> its text, spaces included, in the order of the prompt"""
    changed: dict[str, str]
    """role -> its text in the corrupt prompt"""
    right: str
    wrong: str

    @property
    def corrupt(self) -> dict[str, str]:
        """As `clean`."""
        return self.clean | self.changed

    @property
    def texts(self) -> tuple[str, str]:
        """Clean and corrupt prompt."""
        return "".join(self.clean.values()), "".join(self.corrupt.values())


@dataclass(frozen=True)
class Task:
    """A template and its choices of words."""

    choices: tuple[Sequence[Any], ...]
    """what each argument of `draft` is chosen from"""
    draft: Callable[..., Draft | None]
    """a pair of these choices, or None where they do not go together"""
    single: tuple[str, ...]
    """roles that must be one token: those that change, and those that answer"""


def _words(roles: str, text: str) -> dict[str, str]:
    """role -> word, with the space before it. ~ glues a word to the one before; of two spaces the second is a word of its own."""
    said = [word[1:] if word.startswith("~") else f" {word}" for word in text.split(" ")]
    return dict(zip(roles.split(), [said[0].lstrip(), *said[1:]], strict=True))


def _ioi(io: str, s: str, io_first: bool, start: str, moved: str, place: str, gave: str, thing: str) -> Draft | None:
    if io == s:
        return None
    names, order = (f"{io} and {s}", "IO IO+1 S1 S1+1") if io_first else (f"{s} and {io}", "S1 S1+1 IO IO+1")
    clean = _words(
        f"start {order} to the place comma S2 S2+1 a object END",
        f"{start} {names} {moved} to the {place} ~, {s} {gave} a {thing} to",
    )
    return Draft(clean, {"S2": f" {io}"}, f" {io}", f" {s}")


def _agreement(
    subject: str, plural: bool, where: str, attractor: str, plurals: bool, adverb: str, verbs: str
) -> Draft | None:
    if subject == attractor:
        return None
    numbers = (subject, f"{subject}s")
    one, many = (f" {verb}" for verb in verbs.split())
    clean = _words(
        "start subject preposition the attractor END",
        f"The {numbers[plural]} {where} the {attractor}{'s' * plurals} {adverb}",
    )
    return Draft(clean, {"subject": f" {numbers[not plural]}"}, *((many, one) if plural else (one, many)))


def _capitals(country: str, other: str, adjective: str) -> Draft | None:
    if country == other:
        return None
    clean = _words(
        "start adjective capital of country is the city END", f"The {adjective} capital of {country} is the city of"
    )
    return Draft(clean, {"country": f" {other}"}, f" {words.CAPITALS[country]}", f" {words.CAPITALS[other]}")


def _greater_than(event: str, lasted: str, century: str, late: int, early: int, unit: int) -> Draft | None:
    if early + 2 > late:  # else the wrong answer would be no earlier than the clean year's own decade
        return None
    one, two = century
    clean = _words(
        "start event verb from the year space Y1 Y2 decade unit to the2 year2 space2 Y1again END",
        f"The {event} {lasted} from the year  ~{one} ~{two} ~{late} ~{unit} to the year  ~{one} ~{two}",
    )
    return Draft(clean, {"decade": str(early)}, str(late + 1), str(early + 1))


def _pronouns(both: str, female: bool, start: str, adjective: str, end: str) -> Draft:
    people, answers = both.split(":"), (" he", " she")
    clean = _words("start person was adjective END", f"{start} {people[female]} was {adjective} {end}")
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
        both = frozenset(draft.texts)
        if both not in seen:
            seen.add(both)
            yield draft

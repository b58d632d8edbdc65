"""Pairs from what a user gives: a task's name, a CSV, or a list of prompts and answers."""

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from diagnostics.pairs.differences import FLOOR, check_floor, differences
from diagnostics.pairs.pair import Pair, Pairs
from diagnostics.pairs.tasks import continuation, failure, make_pairs
from diagnostics.pairs.templates import TASKS
from interventions.direct_logits import token_text
from interventions.errors import TextError
from interventions.models.causal_model import CausalModel
from interventions.models.wrapping import wrap
from interventions.texts.inputs import check_prompts, read_prompts
from interventions.texts.tables import csv_rows, read_text

COLUMNS = ("clean", "corrupt", "right", "wrong")
"""Of a CSV, and the order in which a list's entries stand; `roles` may come after."""
Answer = Literal["whole", "first token"]
_N_OF_TASK = 100


def pairs_from(
    model: Any, source: Any, *, n: int | None = None, seed: int = 0, floor: float = FLOOR, answer: Answer = "whole"
) -> Pairs:
    """Pairs of prompts, tokenised and measured on the model.

    source: a task's name (see `TASKS`; n pairs of it, default 100, drawn by `seed` as `make_pairs` says); the path of a CSV with columns
    clean, corrupt, right, wrong and perhaps roles (names separated by spaces, one for each token, `-` for none); a list of
    (clean, corrupt, right, wrong), roles last if any, or of `Pair`, or one of these; or `Pairs`, which are measured again. Prompts and answers are both texts
    or both token ids. Of these the first n (None: all).
    answer: `whole`: an answer is one token as it follows the prompt; `first token`: the first token of a longer one stands for it.
    Pairs with |m_clean − m_corrupt| below `floor` logits, m = logit(right) − logit(wrong) at the last position, or not finite, are left out
    and counted. Raises `TextError`, with the line or number of the pair, for prompts of unequal length, the same prompts twice, answers of
    several tokens, ids outside the vocabulary, a missing column, no pair, fewer than n, texts without a tokenizer. Warns of answers that
    are glued to the prompt's last word, and where the corrupt prompt favours the right answer more than the clean one does.
    """
    if answer not in ("whole", "first token"):
        raise TextError(f"answer {answer!r}; expected 'whole' or 'first token'")
    if n is not None and n < 1:
        raise TextError(f"{n} pairs asked for; expected 1 or more, or None for all")
    check_floor(floor)
    model = wrap(model)
    if isinstance(source, str) and source in TASKS:
        return make_pairs(model, source, _N_OF_TASK if n is None else n, seed, floor)
    rows, origin, left_out = _rows(source)
    pairs = _read(model, rows, answer)
    if not pairs:
        raise TextError(f"no pairs in {origin.get('source', 'an empty list')}; expected at least one")
    found = differences(model, pairs)
    kept = []
    for i, (m_clean, m_corrupt) in enumerate(zip(*found, strict=True)):
        if why := failure(m_clean, m_corrupt, floor, right_first=False):
            left_out[why] += 1
        else:
            kept.append(i)
    if len(kept) < (n or 1):
        raise TextError(
            f"{len(kept)} of {len(pairs)} pairs left, expected {n or 1}; left out: {dict(left_out)}; give pairs whose answers the model "
            "tells apart, or lower floor"
        )
    kept = kept[:n]
    m_clean, m_corrupt = (m[kept] for m in found)
    if turned := int((m_clean < m_corrupt).sum()):
        warnings.warn(
            f"in {turned} of {len(kept)} pairs the right answer is further ahead after the corrupt prompt than after the clean one: are right "
            "and wrong, or clean and corrupt, exchanged?",
            stacklevel=2,
        )
    return Pairs(
        tuple(pairs[i] for i in kept), m_clean, m_corrupt, dict(left_out), origin | {"floor": floor, "answer": answer}
    )


def _rows(source: Any) -> tuple[list[tuple[str, Any]], dict[str, Any], Counter[str]]:
    """Place and content of each pair, where they come from, and what was left out before."""
    if isinstance(source, Pairs):
        return _numbered(source.pairs), dict(source.origin), Counter(source.left_out)
    if isinstance(source, str | Path):
        path = Path(source)
        if path.suffix != ".csv":
            raise TextError(
                f"no task {str(source)!r}; known: {', '.join(TASKS)}; or give the path of a .csv, or a list of pairs"
            )
        return list(_csv(path)), {"task": "given", "source": path.name}, Counter()
    if isinstance(source, Pair) or (isinstance(source, list | tuple) and source and isinstance(source[0], str)):
        source = [source]
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise TextError(
            f"pairs are {type(source).__name__}; expected a task, a .csv, or a list of ({', '.join(COLUMNS)})"
        )
    return _numbered(source), {"task": "given"}, Counter()


def _numbered(pairs: Iterable[Any]) -> list[tuple[str, Any]]:
    return [(f"pair {i}", pair) for i, pair in enumerate(pairs)]


def _csv(path: Path) -> Iterator[tuple[str, Sequence[Any]]]:
    for place, row in csv_rows(path, read_text(path)):
        if missing := [name for name in COLUMNS if name not in row]:
            raise TextError(
                f"{path} has no column {missing[0]!r}, but {', '.join(map(repr, row))}; expected {', '.join(COLUMNS)}, and roles if known"
            )
        roles = row.get("roles", "").strip()
        yield place, [*(row[name] for name in COLUMNS), *([roles] if roles else [])]


def _read(model: CausalModel, rows: list[tuple[str, Any]], answer: Answer) -> list[Pair]:
    places: dict[tuple[tuple[int, ...], tuple[int, ...]], str] = {}
    pairs, glued = [], []
    for place, row in rows:
        try:
            pair = row if isinstance(row, Pair) else _pair(model, row, answer, glued)
            check_prompts(model, [pair.clean, pair.corrupt])
            for token in (pair.right, pair.wrong):
                if not 0 <= token < model.vocab_size:
                    raise TextError(
                        f"answer {token} is outside the vocabulary of {model.vocab_size}; was it another tokenizer's?"
                    )
            if (first := places.setdefault((pair.clean, pair.corrupt), place)) != place:
                raise TextError(f"the prompts of {first} again; a pair counts as one independent draw: leave it out")
        except TextError as error:
            raise TextError(f"{place}: {error}") from None
        pairs.append(pair)
    if glued:
        warnings.warn(
            f"{len(glued)} answers go on with the prompt's last word, as in {glued[0]!r}; if they are words of their own, begin them with a "
            "space",
            stacklevel=3,
        )
    return pairs


def _pair(model: CausalModel, row: Any, answer: Answer, glued: list[str]) -> Pair:
    if isinstance(row, str | Mapping) or not isinstance(row, Iterable) or len(row := list(row)) not in (4, 5):
        said = (
            f"{row!r:.60}"
            if isinstance(row, str)
            else f"{type(row).__name__} of {len(row) if isinstance(row, list) else '?'}"
        )
        raise TextError(f"{said}; expected ({', '.join(COLUMNS)}), and roles if known")
    *prompts, right, wrong = row[:4]
    tokens, texts = read_prompts(prompts, model.tokenizer)
    clean, corrupt = tokens
    if len(clean) != len(corrupt):
        raise TextError(_unequal(clean, corrupt, model.tokenizer))
    answers: list[int] = []
    for which, given in (("right", right), ("wrong", wrong)):
        if isinstance(given, str) and texts[0]:
            answers.append(_token(which, given, texts, tokens, answer, model.tokenizer))
            if given[0].isalpha() and texts[0][-1].isalpha():
                glued.append(texts[0].split()[-1] + given)
        elif isinstance(given, str) or texts[0] or isinstance(given, bool) or not hasattr(given, "__index__"):
            raise TextError(
                f"the {which} answer is {given!r}, the prompts are {'texts' if texts[0] else 'token ids'}; give both alike"
            )
        else:
            answers.append(int(given))
    roles = _roles(row[4], clean, model.tokenizer) if len(row) == 5 else None
    return Pair(tuple(clean), tuple(corrupt), answers[0], answers[1], roles, (texts[0], texts[1]) if texts[0] else None)


def _token(
    which: str,
    given: str,
    texts: list[str],
    tokens: list[list[int]],
    answer: Answer,
    tokenizer: PreTrainedTokenizerBase,
) -> int:
    """The token that an answer adds to both prompts."""
    found = {continuation(text, given, ids, tokenizer) for text, ids in zip(texts, tokens, strict=True)}
    if len(found) > 1 or None in found or not given:
        raise TextError(
            f"the {which} answer {given!r} does not begin with a new token after {texts[0][-20:]!r}; leave no space at the prompt's end, and "
            "begin the answer with one"
        )
    ids = [token for some in found for token in some or ()]
    if len(ids) > 1 and answer == "whole":
        raise TextError(
            f"the {which} answer {given!r} is {len(ids)} tokens, {_shown(ids, tokenizer)}; expected one: begin a word with a space, choose "
            "another word, or set answer='first token'"
        )
    return ids[0]


def _roles(given: Any, tokens: list[int], tokenizer: PreTrainedTokenizerBase | None) -> tuple[str | None, ...] | None:
    """Roles as names separated by spaces or as a list; `-` and None: none."""
    if given is None:
        return None
    named = tuple(
        None if role in ("-", None) else str(role) for role in (given.split() if isinstance(given, str) else given)
    )
    if len(named) != len(tokens):
        raise TextError(
            f"{len(named)} roles for {len(tokens)} tokens, {_shown(tokens, tokenizer)}; expected one a token, - for none"
        )
    return named


def _unequal(clean: list[int], corrupt: list[int], tokenizer: PreTrainedTokenizerBase | None) -> str:
    start = next(
        (i for i, (a, b) in enumerate(zip(clean, corrupt, strict=False)) if a != b), min(len(clean), len(corrupt))
    )
    end, shortest = 0, min(len(clean), len(corrupt)) - start
    while end < shortest and clean[-1 - end] == corrupt[-1 - end]:
        end += 1
    parts = [_shown(ids[start : len(ids) - end], tokenizer) or "nothing" for ids in (clean, corrupt)]
    return (
        f"the clean prompt has {len(clean)} tokens, the corrupt prompt {len(corrupt)}: {parts[0]} against {parts[1]}; expected as many, so "
        "that each position has a counterpart: choose words of as many tokens"
    )


def _shown(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase | None) -> str:
    return " ".join(repr(token_text(i, tokenizer)) for i in ids)

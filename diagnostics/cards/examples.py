"""Example texts of a latent, and the text of each token."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from diagnostics.cards.corpus import LatentCorpus
from diagnostics.sampling.tokens import hash_keys
from interventions.direct_logits import has_token, token_text

BANDS = {"upper quarter": (0.75, 1.0), "around the median": (0.4, 0.6)}
"""Quantiles of |z| where the latent is active with one sign, from which examples beside the top ones are drawn."""
TOP = "top"
PARTIAL = "\ufffd"


@dataclass(frozen=True)
class Example:
    """A run of tokens of one prompt around its peak. Tuples hold one value for each token of the run."""

    group: str
    """`top` or one of `BANDS`"""
    sign: int
    """of z at the peak"""
    prompt: int
    position: int
    """of the peak in its prompt"""
    start: int
    """position of the first token shown"""
    stop: int
    """position after the last one"""
    n_prompt: int
    """tokens of the prompt"""
    texts: tuple[str, ...]
    z: tuple[float, ...]
    kl: tuple[float, ...]
    """exact effect of removing z·d at each token, nats; nan where the latent is not active or the token does not count"""
    following: str
    """the token that follows the peak; empty at the prompt's end"""
    clean_top1: str
    """the most likely next token at the peak"""
    top1: str
    """the same with z·d subtracted there"""
    kl_placebo: float
    """at the peak, nats; nan where there is none"""
    dose: float
    """‖Δx‖/‖x‖ at the peak"""

    @property
    def peak(self) -> int:
        """Index of the peak in the run."""
        return self.position - self.start


def choose(corpus: LatentCorpus, latent: int, top: int, few: int) -> list[tuple[str, int, int]]:
    """(group, sign, token) of the examples: for each sign that the latent takes the `top` prompts with the largest |z|, each at its
    largest, then `few` drawn by seed from each band of |z|; no prompt twice."""
    z = np.where(corpus.usable, corpus.of(latent), 0)
    found: list[tuple[str, int, int]] = []
    for sign in (1, -1):
        token = np.flatnonzero(sign * z > 0)
        order = token[np.argsort(-np.abs(z[token]), kind="stable")]
        _, first = np.unique(corpus.prompt[order], return_index=True)
        best = order[np.sort(first)][:top]
        taken = set(corpus.prompt[best].tolist())
        found += [(TOP, sign, int(t)) for t in best]
        rank = (len(order) - 0.5 - np.arange(len(order))) / max(1, len(order))
        for group, (low, high) in BANDS.items():
            band = order[(rank >= low) & (rank <= high)]
            keys = hash_keys(corpus.seed, f"latent card/{group}/{latent}", corpus.prompt[band], corpus.position[band])
            drawn: list[int] = []
            for t in band[np.argsort(keys, kind="stable")].tolist():
                if len(drawn) < few and int(corpus.prompt[t]) not in taken:
                    drawn.append(t)
                    taken.add(int(corpus.prompt[t]))
            drawn.sort(key=lambda t: -abs(z[t]))
            found += [(group, sign, t) for t in drawn]
    return found


def window(position: int, n_prompt: int, width: int) -> tuple[int, int]:
    """First and last (exclusive) position of a run of at most `width` tokens about a token, three quarters of it before."""
    start = max(0, min(position - (3 * (width - 1)) // 4, n_prompt - width))
    return start, min(n_prompt, start + width)


def token_texts(ids: list[int], tokenizer: Any) -> tuple[str, ...]:
    """What each token adds to the decoded text; joined they are the text.

    A token that ends within a character adds nothing; the one that completes it adds the character. Ids that the tokenizer does not know
    (all, without a tokenizer) are shown in angle brackets.
    """
    texts, before = [], ""
    known: list[int] = []
    for n, i in enumerate(ids, 1):
        if not has_token(i, tokenizer):
            texts.append(token_text(i, tokenizer))
            continue
        known.append(i)
        whole = str(tokenizer.decode(known, clean_up_tokenization_spaces=False))
        now = whole if n == len(ids) else whole.rstrip(PARTIAL)
        now = now if now.startswith(before) else before
        texts.append(now[len(before) :])
        before = now
    return tuple(texts)


def tokens_shown(
    corpus: LatentCorpus, chosen: list[tuple[str, int, int]], width: int, z: Float[ndarray, "token"]
) -> Int[ndarray, "row"]:
    """The usable tokens of the examples at which the latent is active; their effects are shown."""
    shown = set()
    for _, _, t in chosen:
        prompt, position = int(corpus.prompt[t]), int(corpus.position[t])
        start, stop = window(position, int(corpus.clean.length[prompt]), width)
        shown.update(i for i in range(t - position + start, t - position + stop) if z[i] != 0 and corpus.usable[i])
    return np.array(sorted(shown), dtype=int)

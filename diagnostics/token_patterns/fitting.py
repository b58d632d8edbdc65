"""Patterns of a latent from its activating examples: the shortest suffix that keeps half, then wildcards."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from diagnostics.running.text_latents import run_sequences
from diagnostics.token_patterns.tries import ANY, Pattern
from interventions.models.causal_model import CausalModel
from interventions.sites import Site

KEPT = 0.5
"""Share of its activation that an example keeps in a suffix, and beside a replaced token."""
Read = Callable[[Float[Tensor, "row d_model"]], Float[Tensor, "row"]]
"""The activation as a function of x."""
Probe = Callable[[Sequence[tuple[int, ...]]], Float[ndarray, "sequence"]]
"""The activation at the last token of each sequence."""


@dataclass
class ModelProbe:
    """z at the last token of sequences, by passes that end with the site; each different sequence of a call runs once."""

    model: CausalModel
    site: Site
    read: Read
    passes: int = 0
    tokens: int = 0
    """without padding"""

    def __call__(self, sequences: Sequence[tuple[int, ...]]) -> Float[ndarray, "sequence"]:
        different = {sequence: i for i, sequence in enumerate(dict.fromkeys(sequences))}
        length = np.array([len(sequence) for sequence in different])
        z = np.full(len(different), np.nan)

        def see(site: Site, which: ndarray, hidden: Tensor) -> None:
            last = torch.from_numpy(length[which] - 1).to(hidden.device)
            x = hidden[torch.arange(len(which), device=hidden.device), last]
            z[which] = self.read(x).float().cpu().numpy()

        self.passes += run_sequences(self.model, list(different), [self.site], see)
        self.tokens += int(length.sum())
        return z[[different[sequence] for sequence in sequences]]


@dataclass(frozen=True)
class Example:
    """A token at which the latent is active, with what stands before it."""

    tokens: tuple[int, ...]
    """of its prompt, up to the active one"""
    z: float
    lead: int
    """what stands in front of every suffix: the prompt's own first token where that is a special one, else the padding token"""


@dataclass
class Fitted:
    """What examples gave."""

    patterns: Counter[Pattern] = field(default_factory=Counter)
    """and how many examples each came from"""
    no_suffix: int = 0
    """examples of which no suffix within the limit keeps half"""
    no_token: int = 0
    """examples of which every token may be replaced: a pattern of wildcards alone would match everywhere"""


def fit_patterns(examples: Sequence[Example], probe: Probe, pad: int, longest: int) -> Fitted:
    """The pattern of each example.

        suffix:     the fewest last tokens with z(lead, suffix) ≥ ½ z(whole prompt)
        wildcards:  tokens of the suffix with z(lead, suffix with padding there) > ½ z(lead, suffix)

    Source: arXiv:2305.19911, and the released code of arXiv:2406.04093. Ours: a leading token before each suffix, for models treat a
    prompt's first position as no other (there a pattern may say instead that it must begin the text); suffixes of up to `longest`
    tokens, an example without one counted and left out (there the whole text becomes its pattern); patterns of wildcards alone likewise.
    """
    found, left = Fitted(), list(examples)
    suffixes: list[tuple[Example, tuple[int, ...], float]] = []
    tried, step = 0, 4
    while left and tried < longest:
        upto = min(tried + step, longest)
        asked = [(e, e.tokens[-n:]) for e in left for n in range(tried + 1, min(upto, len(e.tokens)) + 1)]
        z = probe([(e.lead, *suffix) for e, suffix in asked])
        enough: dict[int, tuple[Example, tuple[int, ...], float]] = {}
        for (e, suffix), value in zip(asked, z.tolist(), strict=True):
            if value / e.z >= KEPT:
                enough.setdefault(id(e), (e, suffix, value))  # the shortest comes first
        suffixes += enough.values()
        left = [e for e in left if id(e) not in enough and len(e.tokens) > upto]
        tried, step = upto, 2 * step
    found.no_suffix = len(examples) - len(suffixes)
    asked = [
        (e.lead, *suffix[:i], pad, *suffix[i + 1 :]) for e, suffix, _ in suffixes for i in reversed(range(len(suffix)))
    ]
    z, at = (probe(asked) if asked else np.zeros(0)), 0
    for _, suffix, own in suffixes:
        kept = z[at : at + len(suffix)] / own > KEPT
        at += len(suffix)
        pattern = tuple(ANY if free else token for token, free in zip(suffix[::-1], kept, strict=True))
        if all(kept):
            found.no_token += 1
        else:
            found.patterns[pattern] += 1
    return found

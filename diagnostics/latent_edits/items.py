"""The tokens at which a diagnostic of single latents edits, and checks of its numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.latent_edits.firings import Firings
from diagnostics.running.clean import CleanActivations
from diagnostics.sampling.tokens import ranked_tokens
from interventions.errors import ResultError


@dataclass(frozen=True)
class Items:
    """At which tokens a diagnostic asks."""

    table: pd.DataFrame
    """`target_prompt`, `target_position`, and columns of the diagnostic's own; one line an item"""
    said: dict[str, Any]
    """what was drawn and what was dropped"""


def check_numbers(least: int = 1, **numbers: int) -> None:
    """Raise `ResultError` where one of the numbers named is below `least`."""
    if low := {name: n for name, n in numbers.items() if n < least}:
        said = ", ".join(f"{name} {n}" for name, n in low.items())
        raise ResultError(f"{said}; expected {least} or more")


def asked_latents(latents: int | Sequence[int]) -> int | list[int]:
    """How many, or which, as JSON can hold it. Raises `ResultError` for none."""
    if isinstance(latents, int):
        check_numbers(latents=latents)
        return latents
    if not len(latents):
        raise ResultError("no latents; give at least one, or how many")
    return [int(i) for i in latents]


def token_items(clean: CleanActivations, firings: Firings, n_tokens: int, among: np.ndarray | None = None) -> Items:
    """The first usable tokens of an order fixed by the seed; with `among`, of those at which two of these latents are active."""
    prompt, position = ranked_tokens(clean.length, clean.settings.seed, "target")
    good = clean.usable.copy()
    if among is not None:
        entry = np.isin(firings.active.latent, among)
        met = np.bincount(firings.active.token[entry], minlength=firings.active.n_tokens) >= 2
        good[firings.prompt, firings.position] &= met
    some = np.flatnonzero(good[prompt, position])[:n_tokens]
    said: dict[str, Any] = {"tokens": len(some), "asked": n_tokens, "usable": int(clean.usable.sum())}
    said["tokens left out"] = clean.filter.left_out()
    said |= {} if among is None else {"tokens with two of the latents": int(good.sum())}
    return Items(pd.DataFrame({"target_prompt": prompt[some], "target_position": position[some]}), said)

"""Which tokens are measured: drawn once by seeded hash, on the CPU, the same at every depth and on every device."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt64
from numpy import ndarray
from torch import Tensor

from interventions.edits import norm
from interventions.errors import ResultError, TextError


def _seed(*labels: object) -> int:
    digest = hashlib.blake2b("/".join(map(str, labels)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def generator(*labels: object) -> torch.Generator:
    """A CPU generator whose stream depends on its labels alone: adding a layer does not reshuffle the others."""
    return torch.Generator().manual_seed(_seed(*labels) >> 1)


def hash_keys(seed: int, label: str, *columns: Int[ndarray, "row"]) -> UInt64[ndarray, "row"]:
    """A pseudo-random key of each row, a function of its own entries, the seed and the label alone (splitmix64)."""
    with np.errstate(over="ignore"):
        key = np.full(np.shape(columns[0]), _seed(seed, label), dtype=np.uint64)
        for column in columns:
            key = key + np.asarray(column).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(1)
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
                key = (key ^ (key >> np.uint64(shift))) * np.uint64(factor)
            key = key ^ (key >> np.uint64(31))
    return key


@dataclass(frozen=True)
class Pairs:
    """Target tokens (B, whose activation is edited) and source tokens (A) of other prompts; all `[pair]`."""

    target_prompt: Int[ndarray, "pair"]
    target_position: Int[ndarray, "pair"]
    source_prompt: Int[ndarray, "pair"]
    source_position: Int[ndarray, "pair"]

    def __len__(self) -> int:
        return len(self.target_prompt)

    def take(self, which: ndarray) -> "Pairs":
        """Some of the pairs, by index or mask."""
        return Pairs(*(getattr(self, name)[which] for name in self.__dataclass_fields__))


def ranked_tokens(length: Int[ndarray, "prompt"], seed: int, label: str) -> tuple[ndarray, ndarray]:
    """Every (prompt, position), in an order fixed by seed and label: prompt `[token]`, position `[token]`."""
    prompt = np.repeat(np.arange(len(length)), length)
    position = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
    order = np.argsort(hash_keys(seed, label, prompt, position), kind="stable")
    return prompt[order], position[order]


def cross_prompt_pairs(length: Int[ndarray, "prompt"], n_pairs: int, seed: int) -> Pairs:
    """The first `n_pairs` of a fixed order of pairs; asking for more pairs extends the list.

    Targets and sources run through two orders of all tokens; a target's source is the next unused one of another
    prompt. Raises `TextError` when the text has too few tokens or fewer than two prompts.
    """
    length = np.asarray(length)
    if len(length) < 2:
        raise TextError(f"{len(length)} prompt; pairs join tokens of different prompts: give two or more")
    if length.sum() < 2 * n_pairs and length.sum() < n_pairs + length.max():
        raise TextError(f"{length.sum()} tokens for {n_pairs} pairs; give more text or ask for fewer pairs")
    target_prompt, target_position = (x[:n_pairs] for x in ranked_tokens(length, seed, "target"))
    prompt, position = ranked_tokens(length, seed, "source")
    chosen, waiting, next_source = [], [], 0
    for target in target_prompt:
        found = next((i for i, s in enumerate(waiting) if prompt[s] != target), None)
        if found is not None:
            chosen.append(waiting.pop(found))
            continue
        while next_source < len(prompt) and prompt[next_source] == target:
            waiting.append(next_source)
            next_source += 1
        if next_source == len(prompt):
            raise TextError(
                f"no source left for pair {len(chosen)} of {n_pairs}; give more prompts or ask for fewer pairs"
            )
        chosen.append(next_source)
        next_source += 1
    source = np.array(chosen, dtype=int)
    return Pairs(target_prompt, target_position, prompt[source], position[source])


@dataclass(frozen=True)
class TokenFilter:
    """Which tokens are unusable, and why: the first reason that holds counts."""

    reasons: dict[str, Bool[ndarray, "prompt pos"]]

    @property
    def usable(self) -> Bool[ndarray, "prompt pos"]:
        return ~np.logical_or.reduce(list(self.reasons.values()))

    def left_out(self, among: Int[ndarray, "some_prompt"] | None = None) -> dict[str, int]:
        """How many tokens (of some prompts) are unusable, each under the first reason that holds; padding is no token."""
        reasons = {reason: bad if among is None else bad[among] for reason, bad in self.reasons.items()}
        left, found = ~reasons["padding"], {}
        for reason, bad in reasons.items():
            found[reason] = int((left & bad).sum())
            left = left & ~bad
        return {reason: n for reason, n in found.items() if n}

    def keep(self, pairs: Pairs) -> tuple[Bool[ndarray, "pair"], dict[str, int]]:
        """Pairs of two usable tokens, and how many were dropped for each reason. Dropped pairs are not redrawn."""
        left = np.ones(len(pairs), dtype=bool)
        dropped = {}
        for reason, bad in self.reasons.items():
            hit = bad[pairs.target_prompt, pairs.target_position] | bad[pairs.source_prompt, pairs.source_position]
            dropped[reason] = int((left & hit).sum())
            left &= ~hit
        return left, dropped


def token_filter(
    activations: Sequence[Float[Tensor, "prompt pos d_model"]],
    length: Int[ndarray, "prompt"],
    special: Bool[ndarray, "prompt pos"],
    sink_filter: float | None,
) -> TokenFilter:
    """Position 0, special tokens, activations of norm 0 or not finite, and sinks, at any of the layers given.

    A sink is a token with ‖x‖ > sink_filter · median ‖x‖ of its layer (finite norms of all tokens); None: no sink filter.
    """
    return filter_by_norms([norm(x).squeeze(-1).cpu().numpy() for x in activations], length, special, sink_filter)


def filter_by_norms(
    norms: Sequence[Float[ndarray, "prompt pos"]],
    length: Int[ndarray, "prompt"],
    special: Bool[ndarray, "prompt pos"],
    sink_filter: float | None,
) -> TokenFilter:
    """`token_filter` of activations of which the norms are known."""
    inside = np.arange(special.shape[1]) < np.asarray(length)[:, None]
    non_finite, no_norm, sink = (np.zeros(special.shape, dtype=bool) for _ in range(3))
    for size in norms:
        known = inside & np.isfinite(size)
        non_finite |= inside & ~np.isfinite(size)
        no_norm |= inside & (size == 0)
        if sink_filter is not None and known.any():
            sink |= known & (size > sink_filter * np.median(size[known]))
    return TokenFilter(
        {
            "position 0": inside & (np.arange(special.shape[1]) == 0),
            "special token": special & inside,
            "non-finite activation": non_finite,
            "zero norm": no_norm,
            "sink": sink,
            "padding": ~inside,
        }
    )


def matching_pairs(
    x: Float[Tensor, "prompt pos d_model"],
    usable: Bool[ndarray, "prompt pos"],
    length: Int[ndarray, "prompt"],
    n_pairs: int,
    seed: int,
    kind: str,
    pool: int = 4096,
) -> tuple[Pairs, int]:
    """Cross-prompt pairs at one layer that meet a condition, and how many targets have such a source.

    `same_norm`: |‖x_A‖/‖x_B‖ − 1| < 0.1 and cos < 0.5.  `high_cosine`: cos > 0.7 and a norm ratio above 1.5 either way.
    Looked for among the first `pool` usable tokens of the target order; each target at most once, its source one of
    those that fit, by seeded draw. Source of the conditions: arXiv:2606.15054.
    """
    prompt, position = ranked_tokens(np.asarray(length), seed, "target")
    good = np.flatnonzero(usable[prompt, position])[:pool]
    prompt, position = prompt[good], position[good]
    device = x.device
    at = torch.from_numpy(prompt).to(device), torch.from_numpy(position).to(device)
    vectors = x[at].float()
    size = vectors.norm(dim=-1)
    unit = vectors / size[:, None]
    # A source's place in a fixed order, turned by another amount for each target: a cheap draw without storing pairs.
    turn = generator(seed, kind)
    rank = torch.randperm(len(good), generator=turn).to(device)
    shift = torch.randint(max(1, len(good)), (len(good),), generator=turn).to(device)
    best = []
    for start in range(0, len(good), 512):
        part = slice(start, start + 512)
        ratio, cos = size[None, :] / size[part, None], unit[part] @ unit.T
        if kind == "same_norm":
            fits = ((ratio - 1).abs() < 0.1) & (cos < 0.5)
        elif kind == "high_cosine":
            fits = (cos > 0.7) & (torch.maximum(ratio, 1 / ratio) > 1.5)
        else:
            raise ResultError(f"no kind of pairs {kind!r}; known: same_norm, high_cosine")
        fits &= at[0][None, :] != at[0][part, None]
        key = torch.where(fits, (rank[None, :] + shift[part, None]) % len(good), len(good))
        value, source = key.min(dim=1)
        best.append(torch.where(value < len(good), source, -1))
    chosen = torch.cat(best).cpu().numpy() if best else np.zeros(0, dtype=int)
    target = np.flatnonzero(chosen >= 0)
    first, source = target[:n_pairs], chosen[target[:n_pairs]]
    return Pairs(prompt[first], position[first], prompt[source], position[source]), len(target)

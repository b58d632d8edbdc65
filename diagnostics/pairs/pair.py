"""One pair of prompts, and several that belong to one experiment: where their prompts differ, and which positions pool."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from interventions.errors import TextError


@dataclass(frozen=True)
class Pair:
    """Two prompts of equal length that differ in some tokens, and one token that answers each.

    Raises `TextError` for prompts that are empty, equal or of unequal length, equal answers, and roles that do not fit the tokens.
    """

    clean: tuple[int, ...]
    """token ids of the prompt that `right` answers"""
    corrupt: tuple[int, ...]
    """token ids of the prompt that `wrong` answers"""
    right: int
    wrong: int
    roles: tuple[str | None, ...] | None = None
    """what each position is, the same in both prompts, each name once (IO, S2, END, …); None: not named"""
    texts: tuple[str, str] | None = None
    """clean and corrupt prompt as text, if known"""
    task: str = "given"

    def __post_init__(self) -> None:
        if len(self.clean) != len(self.corrupt) or not self.clean:
            raise TextError(
                f"the clean prompt has {len(self.clean)} tokens, the corrupt prompt {len(self.corrupt)}; expected as many, 1 or more"
            )
        if self.clean == self.corrupt:
            raise TextError("clean and corrupt prompt are the same; expected them to differ in at least one token")
        if self.right == self.wrong:
            raise TextError(f"both answers are token {self.right}; expected two different tokens")
        if self.roles is None:
            return
        if len(self.roles) != len(self.clean):
            raise TextError(f"{len(self.roles)} roles for {len(self.clean)} tokens; expected one a token")
        named = [role for role in self.roles if role is not None]
        if twice := [role for role, n in Counter(named).items() if n > 1]:
            raise TextError(f"role {twice[0]!r} stands at two positions; give each its own name, such as {twice[0]}+1")
        if wrong := [role for role in named if not role or role.isdigit()]:
            raise TextError(f"role {wrong[0]!r} reads as a position; expected a name")

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def differing(self) -> tuple[int, ...]:
        """Positions where the two prompts differ."""
        return tuple(i for i, (a, b) in enumerate(zip(self.clean, self.corrupt, strict=True)) if a != b)

    @property
    def pool(self) -> str:
        """Cells of pairs with equal `pool` may be averaged, label by label (see `labels`).

        Pairs with a role at every position pool, whatever their lengths. Others pool only at equal length, equal differing positions and
        equal roles.
        """
        if self.roles is not None and None not in self.roles:
            return "roles"
        where = f"{len(self)} tokens, differing at {', '.join(map(str, self.differing))}"
        if self.roles is None:
            return where
        return f"{where}, roles {' '.join(role or '-' for role in self.roles)}"


def labels(pair: Pair) -> list[str]:
    """The name of each position: its role, or its index from 0 where it has none."""
    roles = pair.roles or (None,) * len(pair)
    return [role or str(i) for i, role in enumerate(roles)]


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of one experiment, with what the model says to each. Lists and tensors are on the CPU.

    m = logit(right) − logit(wrong) at a prompt's last position. Pairs share words, so they are exchangeable draws rather than wholly
    independent.
    """

    pairs: tuple[Pair, ...]
    m_clean: Float[ndarray, "pair"]
    """m of the clean prompts, logits"""
    m_corrupt: Float[ndarray, "pair"]
    """m of the corrupt prompts, logits"""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """how many pairs were left out, by reason"""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """where the pairs come from: task and seed, or file; the floor"""

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> Pair:
        return self.pairs[i]

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.pairs)

    def first(self, n: int) -> "Pairs":
        """The first n pairs. Raises `TextError` where there are fewer, and for n below 1."""
        if not 1 <= n <= len(self):
            raise TextError(f"{n} pairs asked for; there are {len(self)}")
        return replace(self, pairs=self.pairs[:n], m_clean=self.m_clean[:n], m_corrupt=self.m_corrupt[:n])

    @property
    def clean(self) -> list[list[int]]:
        """Token ids of the clean prompts, `[pair, pos]`, ragged."""
        return [list(pair.clean) for pair in self.pairs]

    @property
    def corrupt(self) -> list[list[int]]:
        """Token ids of the corrupt prompts, `[pair, pos]`, ragged."""
        return [list(pair.corrupt) for pair in self.pairs]

    @cached_property
    def right(self) -> Int[Tensor, "pair"]:
        return torch.tensor([pair.right for pair in self.pairs])

    @cached_property
    def wrong(self) -> Int[Tensor, "pair"]:
        return torch.tensor([pair.wrong for pair in self.pairs])

    @cached_property
    def length(self) -> Int[Tensor, "pair"]:
        """Tokens of each prompt of the pair."""
        return torch.tensor([len(pair) for pair in self.pairs])

    @cached_property
    def differs(self) -> Bool[Tensor, "pair pos"]:
        """Where clean and corrupt tokens differ; False beyond a prompt's end."""
        found = torch.zeros(len(self), int(self.length.max()), dtype=torch.bool)
        for row, pair in zip(found, self.pairs, strict=True):
            row[list(pair.differing)] = True
        return found

    @cached_property
    def first_difference(self) -> Int[Tensor, "pair"]:
        """The first differing position of each pair: before it both runs are the same at every site."""
        return torch.tensor([pair.differing[0] for pair in self.pairs])

    @property
    def pools(self) -> list[str]:
        """`Pair.pool` of each pair."""
        return [pair.pool for pair in self.pairs]

    @property
    def sha256(self) -> str:
        """Of tokens, answers and roles, in hexadecimal."""
        said = json.dumps([[p.clean, p.corrupt, p.right, p.wrong, p.roles] for p in self.pairs])
        return hashlib.sha256(said.encode()).hexdigest()

    @property
    def description(self) -> dict[str, Any]:
        """For provenance: origin, hash, how many pairs and tokens, how many of each pool, what was left out, mean m."""
        return {
            **self.origin,
            "sha256": self.sha256,
            "pairs": len(self),
            "tokens": [int(self.length.min()), int(self.length.max())],
            "pools": dict(Counter(self.pools)),
            "left_out": dict(self.left_out),
            "mean_logit_difference_clean": float(np.mean(self.m_clean)),
            "mean_logit_difference_corrupt": float(np.mean(self.m_corrupt)),
        }

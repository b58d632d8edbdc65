"""Examples that explain a latent, and held-out snippets in which it is active or not."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy import ndarray

from diagnostics.running.text_latents import Asked, TextLatents
from diagnostics.sampling.latents import from_strata
from diagnostics.sampling.tokens import generator, hash_keys

ALIKE = 2.0
"""Latents of like density: a frequency of up to so many times more or less."""


@dataclass(frozen=True)
class Snippet:
    """A run of tokens about a token of a prompt."""

    prompt: int
    position: int
    """of the token about which it lies"""
    active: bool


def window(position: int, length: int, width: int) -> slice:
    """Positions of the run about one: as many on either side as the prompt has."""
    return slice(max(0, position - width // 2), min(length, position + (width + 1) // 2))


class Snippets:
    """Where one polarity of a latent is active in a text, `z > 0`, and what is drawn of it."""

    def __init__(
        self, text: TextLatents, test: Bool[ndarray, "token"], asked: Asked, length: Int[ndarray, "prompt"], width: int,
        seed: int, label: str,
    ):  # fmt: skip
        self.text, self.test, self.asked, self.length, self.width = text, test, asked, length, width
        self.z = np.maximum(asked.polarity * text.of(asked.latent), 0)
        self.seed, self.label = seed, f"{label}/{asked.name}"
        self.at = np.zeros((len(length), int(length.max())))
        self.at[text.prompt, text.position] = self.z

    def examples(self, top: int, more: int) -> Int[ndarray, "example"]:
        """Fitting tokens: the `top` of largest z, one of a prompt, then `more` of other prompts' largest, drawn with weights z;
        strongest first."""
        token = np.flatnonzero((self.z > 0) & ~self.test)
        token = token[np.argsort(-self.z[token], kind="stable")]
        _, first = np.unique(self.text.prompt[token], return_index=True)
        token = token[np.sort(first)]
        best, rest = token[:top], token[top:]
        if len(rest) > more > 0:
            stream = generator(self.seed, "examples", self.label)
            drawn = torch.multinomial(torch.from_numpy(self.z[rest]), more, generator=stream).numpy()
            rest = rest[np.sort(drawn)]
        return np.concatenate([best, rest[:more]])

    def held_out(self, n: int) -> tuple[list[Snippet], bool]:
        """`n` held-out snippets in which it is active at the middle, and as many in which it is active nowhere; and whether the latter
        lie about tokens of like density.

        Active: in equal numbers from quarters of z. Not active: about tokens at which latents of like density (`ALIKE`) are active, as
        often as they are; where there are too few, about any token. At most one of a prompt and class where there are enough prompts.
        """
        text, active = self.text, np.flatnonzero((self.z > 0) & self.test)
        active, key = self._spread(active, n, "active")
        quarter = np.argsort(np.argsort(self.z[active], kind="stable"), kind="stable") * 4 // max(1, len(active))
        active = active[from_strata(quarter, key, n).index]
        clear = self.test & ~self._near()
        count = np.diff(text.z.indptr)
        fires = np.maximum(count / max(1, len(text.prompt)), 1e-30)
        mine = count[self.asked.latent] / max(1, len(text.prompt))
        alike = np.flatnonzero(
            (fires <= mine * ALIKE) & (fires >= mine / ALIKE) & (np.arange(len(count)) != self.asked.latent)
        )
        among = text.z[:, alike].tocoo().row
        among = among[clear[among]]
        matched = len(np.unique(among)) >= n
        inactive, key = self._spread(among if matched else np.flatnonzero(clear), n, "not active")
        inactive = inactive[np.argsort(key, kind="stable")][:n]
        found = [
            Snippet(int(text.prompt[t]), int(text.position[t]), a)
            for some, a in ((active, True), (inactive, False))
            for t in some
        ]
        order = np.argsort(hash_keys(self.seed, f"order/{self.label}", np.arange(len(found))), kind="stable")
        return [found[i] for i in order], matched

    def _near(self) -> Bool[ndarray, "token"]:
        """Tokens whose window holds an active one."""
        before, after = self.width // 2, (self.width + 1) // 2
        active = np.pad(self.at > 0, ((0, 0), (before, after)))
        near = np.logical_or.reduce([active[:, i : i + self.at.shape[1]] for i in range(self.width)])
        return near[self.text.prompt, self.text.position]

    def _spread(self, token: Int[ndarray, "token"], n: int, what: str) -> tuple[ndarray, ndarray]:
        """Tokens, each once, and their keys; one of a prompt where n prompts or more have one. What occurs often is likelier."""
        number = np.arange(len(token))
        key = hash_keys(self.seed, f"{what}/{self.label}", token, number)
        order = np.argsort(key, kind="stable")
        token, key = token[order], key[order]
        _, first = np.unique(token, return_index=True)
        token, key = token[np.sort(first)], key[np.sort(first)]
        _, first = np.unique(self.text.prompt[token], return_index=True)
        return (token[first], key[first]) if len(first) >= n else (token, key)

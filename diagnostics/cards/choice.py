"""The latents that get a card: by number, by their effect, or by how often they fire."""

from collections.abc import Sequence

import numpy as np

from diagnostics.cards.atlas_rows import AtlasRows
from diagnostics.cards.corpus import LatentCorpus
from interventions.errors import ResultError
from sae_models.errors import SAEError

KINDS = {
    "top": "those of the largest summed KL at the even prompts of the atlas",
    "frequent": "those that fire on the most usable tokens",
}


def parsed(word: int | str) -> tuple[str, int]:
    """`("", number)` of a latent's number, `(kind, how many)` of `top:5` or `frequent:5`. Raises `ResultError` for anything else."""
    kind, _, n = str(word).rpartition(":")
    if not (n.isascii() and n.isdecimal()) or (kind and (kind not in KINDS or int(n) < 1)):
        raise ResultError(f"latent {word!r}; expected a number from 0, {' or '.join(f'{name}:N' for name in KINDS)}")
    return kind, int(n)


def chosen(words: Sequence[int | str], corpus: LatentCorpus, atlas: AtlasRows | None) -> dict[int, str]:
    """The latents in the order asked for, each once, and what chose each: `number` or one of `KINDS`, `top` before the others.

    The largest of many noisy sums are large partly by chance. `top` therefore ranks by half of the atlas' prompts
    (`AtlasRows.ranking`), and effects are reported on the prompts held back. Raises `ResultError` for `top` without an atlas or
    without prompts held back, and where no latent is chosen.
    """
    found: dict[int, str] = {}
    for kind, n in map(parsed, words):
        if kind == "top":
            if atlas is None:
                raise ResultError(f"top:{n} asks for the largest effects of an atlas; give one, or frequent:{n}")
            if not atlas.held_back.any():
                raise ResultError(
                    f"top:{n} ranks by the even prompts of the atlas and shows effects at others, and this text has no others; "
                    f"give more prompts, or frequent:{n}"
                )
            found |= dict.fromkeys(map(int, atlas.ranking.index[:n]), kind)
        elif kind == "frequent":
            fires = np.diff(corpus.z[np.flatnonzero(corpus.usable)].indptr)
            order = np.argsort(-fires, kind="stable")[:n]
            for i in order[fires[order] > 0]:
                found.setdefault(int(i), kind)
        else:
            found.setdefault(n, "number")
    if not found:
        raise ResultError(f"no latent of {', '.join(map(str, words))} fires on this text; give more text, or a number")
    return found


def check_exist(words: Sequence[int | str], name: str, d_sae: int) -> None:
    """Raise `SAEError` for a latent that does not exist, `ResultError` for unknown words and for no words."""
    if not words:
        raise ResultError("no latent; give at least one")
    if absent := [n for kind, n in map(parsed, words) if not kind and n >= d_sae]:
        raise SAEError(f"latent {absent[0]} does not exist; {name} has {d_sae}, from 0")

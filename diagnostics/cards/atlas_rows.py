"""Rows of a causal atlas, or of the effects of a whole dictionary, joined to the tokens of a corpus."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import pandas as pd
from jaxtyping import Bool
from numpy import ndarray

from diagnostics.cards.corpus import LatentCorpus
from interventions.errors import ResultError

COLUMNS = (
    "layer", "point", "sae", "prompt", "position", "latent", "z", "delta_norm", "kl", "kl_direct", "top1_changed", "top1",
    "clean_top1",
)  # fmt: skip
"""Columns that an atlas must have; a row subtracts z_i·d_i at one token and keeps the SAE's error."""
_WEIGHT = "weight"
"""a column of rows that are a sample: of how many of the latent's active tokens each stands for; in sums it counts so often"""
_DISAGREEING = 0.01


class Atlas(Protocol):
    """The parts of an atlas that cards use."""

    @property
    def frame(self) -> pd.DataFrame: ...

    @property
    def tokens(self) -> list[list[int]]: ...

    @property
    def provenance(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class AtlasRows:
    """The rows of one SAE at usable tokens of the corpus."""

    frame: pd.DataFrame
    """`token` (of the corpus), latent, z, delta_norm, kl, kl_direct, top1_changed, top1, clean_top1"""
    totals: pd.Series
    """Σ kl of each latent over all of the SAE's rows in the atlas (a sample's by weight), nats, the largest first"""
    ranking: pd.Series
    """the same over its even prompts (0, 2, …); `top:N` chooses by it"""
    confirming: pd.Series
    """the same over its odd prompts that do not repeat an even one"""
    held_back: Bool[ndarray, "prompt"]
    """prompts of the corpus that repeat no even prompt of the atlas, so that `ranking` does not depend on them"""
    provenance: dict[str, Any]
    """the SAE's name in the atlas; numbers of prompts and rows, joined and left out"""

    def of(self, latent: int) -> pd.DataFrame:
        """Rows of one latent."""
        return cast(pd.DataFrame, self.frame.loc[self.frame.latent == latent].reset_index(drop=True))

    def summary(self, latent: int, kl: pd.Series, chosen_by: str) -> dict[str, Any]:
        """Rank of a latent, its share of the effect, numbers of rows, and the largest difference from KLs measured again (`kl`, by token).

        Rank and share are over the whole atlas; for a latent that `top` chose, over the prompts held back.
        """
        totals, rows = self.confirming if chosen_by == "top" else self.totals, self.of(latent)
        there = latent in totals.index
        off = (rows.set_index("token").kl - kl).abs().dropna()
        return {
            "rank": int(np.flatnonzero(totals.index == latent)[0]) + 1 if there else None,
            "latents": len(totals),
            "share_of_effect": float(totals[latent] / totals.sum()) if there else 0.0,
            "rows_of_latent": len(rows),
            "rows_not_finite": int((~np.isfinite(rows[["kl", "kl_direct"]].to_numpy(float))).any(axis=1).sum()),
            "measured_again": len(off),
            "largest_difference": float(off.max()) if len(off) else None,
            **self.provenance,
        }


def atlas_rows(atlas: Atlas, corpus: LatentCorpus) -> AtlasRows:
    """The atlas' rows of the corpus' SAE. Prompts are joined by their tokens; of equal prompts the k-th copies are joined.

    Weights (`weights_sha256`) and SAE (`saes[name]["sha256"]`) must be the same, and z must agree at the joined tokens. Raises
    `ResultError` for an atlas of another model, SAE or text, and for missing columns.
    """
    frame, p = atlas.frame, atlas.provenance
    if missing := [name for name in COLUMNS if name not in frame]:
        raise ResultError(f"the atlas has no column {missing[0]!r}; expected {', '.join(COLUMNS)}")
    model, dictionary = corpus.model, corpus.dictionary
    if p.get("weights_sha256") != model.weights_hash:
        raise ResultError(
            f"an atlas of weights {str(p.get('weights_sha256'))[:12]}… ({p.get('model')}) for weights {model.weights_hash[:12]}… "
            f"({model.name}); take the atlas of this model"
        )
    digest, known = dictionary.provenance()["sha256"], p.get("saes", {})
    site = dictionary.site
    here = (frame.layer == site.layer) & (frame.point == site.point)
    named = [name for name, of in known.items() if of.get("sha256") == digest and of.get("site") == str(site)]
    if not named:
        raise ResultError(
            f"the atlas has no rows of this SAE ({dictionary.name} at {site}, {digest}); it has {', '.join(known) or 'none'}"
        )
    own = frame.loc[here & (frame.sae == named[0]), [name for name in (*COLUMNS[3:], _WEIGHT) if name in frame]]
    place = {copy: i for i, copy in enumerate(_copies(corpus.prompts.tokens))}
    ours = np.array([place.get(copy, -1) for copy in _copies(atlas.tokens)], dtype=int)
    prompt = ours[own.prompt.to_numpy(int)]
    if not (prompt >= 0).any():
        raise ResultError(
            f"none of the atlas' {len(ours)} prompts ({_text(p)}) is among the {len(place)} of this text "
            f"({corpus.prompts.provenance.get('name', 'given')}) at this length; give both the same text, length and seed"
        )
    joined = own.loc[prompt >= 0, list(COLUMNS[5:])].reset_index(drop=True)
    token = corpus.token_at(prompt[prompt >= 0], own.position.to_numpy(int)[prompt >= 0])
    joined.insert(0, "token", token)
    z = np.asarray(corpus.z[token, joined.latent.to_numpy(int)]).reshape(-1)
    off = ~np.isclose(joined.z.to_numpy(float), z, rtol=0.01, atol=0.01 * float(np.abs(z).max(initial=0)))
    if off.mean() > _DISAGREEING:
        raise ResultError(
            f"z of the atlas differ from the SAE's own at {off.mean():.0%} of {len(off)} joined rows; it is of other activations "
            "(dtype, site or text): make it again"
        )
    counted = corpus.usable[token]
    even = {tuple(ids) for ids in atlas.tokens[::2]}
    odd = np.array([tuple(ids) not in even for ids in atlas.tokens])
    held_back = np.array([tuple(ids) not in even for ids in corpus.prompts.tokens])
    return AtlasRows(
        joined.loc[counted].reset_index(drop=True),
        _totals(own),
        _totals(own.loc[own.prompt % 2 == 0]),
        _totals(own.loc[odd[own.prompt.to_numpy(int)]]),
        held_back,
        {
            "sae": named[0],
            "text": _text(p),
            "prompts": len(ours),
            "prompts_joined": int((ours >= 0).sum()),
            "prompts_joined_and_held_back": int(held_back[ours[ours >= 0]].sum()),
            "rows": len(own),
            "rows_joined": int(counted.sum()),
            "rows_at_tokens_left_out": int((~counted).sum()),
            "rows_of_other_prompts": len(own) - len(joined),
        },
    )


def _copies(tokens: Sequence[Sequence[int]]) -> list[tuple[tuple[int, ...], int]]:
    """Tokens of each prompt, and how many earlier prompts equal it."""
    seen: Counter[tuple[int, ...]] = Counter()
    found = []
    for ids in map(tuple, tokens):
        found.append((ids, seen[ids]))
        seen[ids] += 1
    return found


def _totals(rows: pd.DataFrame) -> pd.Series:
    weighted = rows.kl * rows[_WEIGHT] if _WEIGHT in rows else rows.kl
    return weighted.groupby(rows.latent).sum().sort_values(ascending=False, kind="stable")


def _text(provenance: dict[str, Any]) -> str:
    text = provenance.get("text", {})
    return str(text.get("name", "given")) if isinstance(text, dict) else str(text)

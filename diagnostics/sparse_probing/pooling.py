"""Activations and latents of texts, averaged over tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from diagnostics.sampling.tokens import TokenFilter
from interventions.activations import run_to_sites
from interventions.errors import ResultError, TextError
from interventions.models.anatomy import check_site
from interventions.models.causal_model import CausalModel
from interventions.models.fingerprint import depends_on_batch
from interventions.models.wrapping import wrap
from interventions.sites import Site
from interventions.texts.inputs import check_prompts
from interventions.texts.labelled import Labelled
from interventions.texts.prompts import Prompts, tokenize
from sae_models.sae import SAE

_TOKENS, _TOKENS_GPU = 1024, 16_384  # of one forward pass, with padding
_LATENTS, _LATENTS_GPU = 2**23, 2**26  # formed at once


@dataclass(frozen=True, eq=False)
class PooledTexts:
    """Activations of labelled texts at some sites, token by token.

    Tokens that do not count at a site: position 0, special tokens, norm 0 or not finite, and sinks, ‖x‖ > sink_filter · median ‖x‖
    of the site's tokens; each token is counted under the first reason that applies.
    """

    prompts: Prompts
    """tokens of the texts, in the order in which `tokenize` draws them"""
    labels: list[str]
    """the class of each prompt"""
    groups: list[str]
    """the group of each prompt"""
    activations: dict[Site, Float[Tensor, "token d_model"]]
    """all tokens, prompt after prompt, in the model's dtype and on its device"""
    sink_filter: float | None
    """None: no such filter"""

    @property
    def prompt(self) -> Int[ndarray, "token"]:
        """The prompt of each token."""
        return np.repeat(np.arange(len(self.prompts.tokens)), [len(ids) for ids in self.prompts.tokens])

    def counted(self, site: Site) -> tuple[Bool[ndarray, "token"], dict[str, int]]:
        """Which tokens count at a site, and numbers of those that do not, by reason. Raises `ResultError` where none is left."""
        x = self.activations[site]
        norm = x.to(torch.promote_types(x.dtype, torch.float32)).norm(dim=-1).cpu().numpy()
        finite = np.isfinite(norm)
        limit = np.inf if self.sink_filter is None or not finite.any() else self.sink_filter * np.median(norm[finite])
        reasons = {
            "position 0": np.concatenate([np.arange(len(ids)) == 0 for ids in self.prompts.tokens]),
            "special token": np.concatenate([np.asarray(marks, dtype=bool) for marks in self.prompts.special]),
            "non-finite activation": ~finite,
            "zero norm": norm == 0,
            "sink": norm > limit,
        }
        found = TokenFilter(reasons | {"padding": np.zeros_like(finite)})
        left, dropped = found.usable, dict.fromkeys(reasons, 0) | found.left_out()
        if not left.any():
            raise ResultError(
                f"no token is left at {site}: {dropped} of {len(norm)}; give longer texts or another sink filter"
            )
        return left, dropped

    def usable(self, site: Site) -> Bool[ndarray, "text"]:
        """The texts with a token that counts at a site."""
        return np.bincount(self.prompt[self.counted(site)[0]], minlength=len(self.labels)) > 0

    @torch.no_grad()
    def mean_activations(self, site: Site) -> Float[Tensor, "text d_model"]:
        """x averaged over the tokens of each text that count, float32 (float64 for a float64 model); nan where there are none."""
        return self._mean(site, self.activations[site].shape[1], lambda x: x)

    @torch.no_grad()
    def mean_latents(self, sae: SAE, site: Site) -> Float[Tensor, "text d_sae"]:
        """z averaged over the tokens of each text that count, zeros among them; nan where there are none."""
        return self._mean(site, sae.d_sae, sae.encode)

    def _mean(self, site: Site, width: int, of: Any) -> Tensor:
        x, prompt = self.activations[site], self.prompt
        left = self.counted(site)[0]
        which, owner = (torch.from_numpy(part).to(x.device) for part in (np.flatnonzero(left), prompt[left]))
        total = torch.zeros(len(self.labels), width, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        few = max(1, (_LATENTS if x.device.type == "cpu" else _LATENTS_GPU) // width)
        for some, to in zip(which.split(few), owner.split(few), strict=True):
            total.index_add_(0, to, of(x[some]).to(total))
        n = torch.from_numpy(np.bincount(prompt[left], minlength=len(self.labels))).to(total)
        return total / torch.where(n > 0, n, torch.nan)[:, None]

    def left_out(self, site: Site) -> dict[str, int]:
        """Numbers of tokens that do not count at a site, by reason, and of texts without a token that counts."""
        texts = len(self.labels) - int(self.usable(site).sum())
        return {why: n for why, n in self.counted(site)[1].items() if n} | ({"whole texts": texts} if texts else {})


@torch.no_grad()
def pooled_texts(
    model: Any,
    labelled: Labelled,
    sites: Sequence[Site],
    *,
    max_length: int = 128,
    sink_filter: float | None = 10.0,
    seed: int = 0,
) -> PooledTexts:
    """Run the texts, cut at `max_length` tokens, through the model and keep the activations at the sites.

    Memory: a number for each token, site and dimension, on the model's device; no block above the deepest site runs.
    Raises `TextError` for a model without a tokenizer and where no text is left, `SiteError` for a site that the model has not.
    """
    model = wrap(model)
    for site in sites:  # before any hook: it runs forward passes of its own
        check_site(model, site)
    prompts, labels, groups = labelled_prompts(model, labelled, max_length=max_length, seed=seed)
    length = [len(ids) for ids in prompts.tokens]
    start = np.cumsum(length) - length
    kept: dict[Site, Tensor] = {}
    most = _TOKENS if model.device.type == "cpu" else _TOKENS_GPU
    for batch in _batches(length, 1 if depends_on_batch(model.hf, max(length)) else most):
        seen = _seen(model, [prompts.tokens[i] for i in batch], sites)
        for site, hidden in seen.items():
            if site not in kept:
                kept[site] = hidden.new_empty(sum(length), hidden.shape[-1])
            for row, i in zip(hidden, batch, strict=True):
                kept[site][start[i] : start[i] + length[i]] = row[: length[i]]
    return PooledTexts(prompts, labels, groups, kept, sink_filter or None)


def labelled_prompts(
    model: CausalModel, labelled: Labelled, *, max_length: int = 128, seed: int = 0
) -> tuple[Prompts, list[str], list[str]]:
    """Tokens, class and group of each text, in an order by `seed`. Raises `TextError` as `tokenize` does."""
    if model.tokenizer is None:
        raise TextError(f"model {model.name!r} has no tokenizer, so it cannot read texts; give one with a tokenizer")
    prompts = tokenize(labelled.texts, model.tokenizer, max_length=max_length, seed=seed)
    check_prompts(model, prompts.tokens)
    place = {text: i for i, text in enumerate(labelled.texts)}
    where = [place[text] for text in prompts.texts]
    return prompts, [labelled.labels[i] for i in where], [labelled.groups[i] for i in where]


def _batches(length: Sequence[int], most: int) -> Iterator[list[int]]:
    """Prompts of similar length, `most` tokens with their padding."""
    left = sorted(range(len(length)), key=lambda i: -length[i])
    while left:
        n = max(1, most // length[left[0]])
        yield left[:n]
        left = left[n:]


def _seen(model: CausalModel, tokens: list[list[int]], sites: Sequence[Site]) -> dict[Site, Tensor]:
    """Activations at the sites, `[prompt, pos, d_model]`, with padding on the right, which causal attention ignores."""
    found: dict[Site, Tensor] = {}
    ids = pad_sequence([torch.tensor(row, dtype=torch.long) for row in tokens], batch_first=True).to(model.device)
    run_to_sites(model, ids, sites, lambda site, hidden: found.update({site: hidden.clone()}))
    return found

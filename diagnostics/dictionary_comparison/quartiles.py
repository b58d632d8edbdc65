"""Firing and gradients of latents by quartile of the activation's norm."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from diagnostics.dictionary_comparison.gradients import quartile_ratio
from diagnostics.sampling.counted import Tokens
from diagnostics.statistics.estimate import Estimate
from diagnostics.statistics.jackknife import from_deletions
from diagnostics.statistics.tables import few_prompts
from sae_models.active_latents import ActiveLatents

QUARTILES = ("q1", "q2", "q3", "q4")
"""Of ‖x‖ over the tokens that count."""


@dataclass(frozen=True)
class Sample:
    """The tokens that count at one site, prompt after prompt."""

    prompt: Int[ndarray, "token"]
    position: Int[ndarray, "token"]
    x: Tensor
    """`[token, d_model]`"""
    quartile: Int[ndarray, "token"]
    """of ‖x‖, 0 to 3"""


def counted(tokens: Tokens) -> tuple[Sample, dict[str, Any]]:
    """The tokens that count at a site, without sinks, and what was left out."""
    keep = tokens.counted[tokens.strict]
    length = tokens.recording.length.tolist()
    position = np.concatenate([np.arange(n) for n in length])
    sample = Sample(
        tokens.prompt[keep],
        position[keep],
        tokens.x[torch.from_numpy(keep).to(tokens.x.device)],
        tokens.quartile[tokens.strict][keep] - 1,
    )
    edges = np.quantile(tokens.norm[keep], (0.25, 0.5, 0.75)).tolist()
    return sample, {"counted": int(keep.sum()), "left_out": tokens.left_out, "quartile_edges": edges}


def without_each(
    prompt: Int[ndarray, "entry"],
    cell: Int[ndarray, "entry"],
    n_cells: int,
    prompts: Iterable[int],
    *weights: Float[ndarray, "entry"],
) -> Iterator[list[Float[ndarray, "cell"]]]:
    """Sums of entries by cell, of 1 and of each weight: over all prompts, then without each. `prompt` is ascending."""
    every: list[ndarray | None] = [None, *weights]
    total = [np.bincount(cell, weight, n_cells).astype(float) for weight in every]
    yield total
    for one in prompts:
        some = slice(*np.searchsorted(prompt, (one, one + 1)))
        own = [np.bincount(cell[some], None if w is None else w[some], n_cells) for w in every]
        yield [t - o for t, o in zip(total, own, strict=True)]


@few_prompts()
def quartile_shares(active: ActiveLatents, sample: Sample, members: Bool[ndarray, "latent"]) -> list[Estimate]:
    """Mean over some latents of the share of their firing in each quartile of ‖x‖, by delete-one-prompt jackknife.

    Latents and quartiles are held fixed; a latent that does not fire after a deletion is left out of that mean. nan without latents.
    """
    inside, place = members[active.latent], np.cumsum(members) - 1
    token, n = active.token[inside], int(members.sum())
    cell = place[active.latent[inside]] * 4 + sample.quartile[token]
    prompts, deletions = np.unique(sample.prompt), []
    for (count,) in without_each(sample.prompt[token], cell, 4 * n, prompts):
        count = count.reshape(n, 4)
        fired = count.sum(axis=1)
        some = fired > 0
        deletions.append((count[some] / fired[some, None]).mean(axis=0) if some.any() else np.full(4, np.nan))
    table, sizes = np.array(deletions), (sample.prompt[token][:, None] == prompts).sum(axis=0)
    return [from_deletions(float(table[0, q]), table[1:, q], sizes, transform="logit") for q in range(4)]


@few_prompts()
def gradient_ratios(
    prompt: ndarray, cell: ndarray, values: ndarray, n: int, prompts: ndarray, at_least: int
) -> tuple[Float[ndarray, "latent"], Estimate]:
    """The ratio of each latent, and the share of latents above 2 (of those with enough tokens) by jackknife."""
    ratio, shares = None, []
    for count, total in without_each(prompt, cell, 4 * n, prompts, values):
        found = quartile_ratio(total.reshape(n, 4), count.reshape(n, 4), at_least)
        ratio = found if ratio is None else ratio
        known = found[np.isfinite(found)]
        shares.append(float((known > 2).mean()) if len(known) else np.nan)
    assert ratio is not None
    return ratio, from_deletions(
        shares[0], np.array(shares[1:]), (prompt[:, None] == prompts).sum(axis=0), transform="logit"
    )

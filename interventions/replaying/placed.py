"""Vectors put in place: which numbers of which tokens of some branches a row edits, at any sites of any blocks."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interventions.models.anatomy import n_heads, site_columns
from interventions.models.uploads import upload
from interventions.recording import Recording
from interventions.sites import Site


class Placed(NamedTuple):
    """Vectors at one site of some tokens."""

    site: Site
    """of all heads or neurons"""
    token: Int[np.ndarray, "edit"]
    """among the tokens of all branches, end to end"""
    columns: Int[Tensor, "edit width"] | None
    """which of the site's numbers each vector replaces; None: all"""
    vectors: Float[Tensor, "edit width"]
    n_heads: int = 1
    """of a `pattern`, whose rows of weights are as many"""


def placed(recording: Recording, site: Site, token: Int[np.ndarray, "edit"], vectors: Tensor) -> Placed:
    """Vectors at one site, head or neurons of some tokens."""
    columns = site_columns(recording.model, site, recording.tokens.shape[1])
    if columns is not None:
        columns = upload(columns, vectors.device).expand(len(vectors), -1)
    return Placed(site.whole, token, columns, vectors, n_heads(recording.model, site) if site.point == "pattern" else 1)


def merged(several: Sequence[Placed]) -> list[Placed]:
    """Those of one site and width together, sites in the order in which a forward pass reaches them."""
    by: dict[tuple[Site, int], list[Placed]] = {}
    for each in several:
        by.setdefault((each.site, each.vectors.shape[1]), []).append(each)
    found = []
    for (site, _), parts in sorted(by.items(), key=lambda item: (item[0][0].rank, item[0][1])):
        token = np.concatenate([part.token for part in parts])
        vectors = torch.cat([part.vectors for part in parts])
        some = [part.columns for part in parts if part.columns is not None]
        columns = torch.cat(some) if len(some) == len(parts) else None  # a model of one head: all of it is that head
        found.append(Placed(site, token, columns, vectors, parts[0].n_heads))
    return found


def overwritten(
    value: Float[Tensor, "slot width"], slot: Int[Tensor, "edit"], each: Placed
) -> Float[Tensor, "slot width"]:
    """A copy with the vectors put in."""
    vectors = each.vectors.to(value.dtype)
    if each.columns is None:
        return value.index_copy(0, slot, vectors)
    return value.index_put((slot[:, None], each.columns), vectors)

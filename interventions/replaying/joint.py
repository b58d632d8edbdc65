"""Rows that edit several sites of several blocks at once: circuits, their complements, coalitions; or one site each, of any block."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interventions.errors import EditError, SiteError
from interventions.models.anatomy import check_site, n_heads, site_columns, site_width
from interventions.models.uploads import as_vectors, token_rows, upload
from interventions.recording import Recording
from interventions.replaying.placed import Placed
from interventions.replaying.replay import Branches
from interventions.replaying.rows import Horizon, Rows, check_finite, given_reads
from interventions.sites import HEADS, Site, SiteLike, as_site


class Put(NamedTuple):
    """Vectors to be put at one site: `vectors[i]` in row `row[i]`, at token `position[i]` of that row's prompt."""

    site: SiteLike
    row: Int[Tensor, "edit"] | Sequence[int]
    position: Int[Tensor, "edit"] | Sequence[int]
    vectors: Float[Tensor, "edit width"] | Sequence[Any]


_COVERED = {
    "q": ("pattern", "z", "attn_out", "resid_mid"),
    "pattern": ("z", "attn_out", "resid_mid"),
    "z": ("attn_out", "resid_mid"),
    "attn_out": ("resid_mid",),
    "neurons": ("mlp_out",),
}
"""What an edit at one token takes the effect of, by edits of the same block and token. `resid_post` covers all of these and
`resid_mid`, `mlp_out`; keys, values and what a block reads still act on later tokens."""
_BY_HEAD = ("q", "pattern", "z")


@dataclass
class _Group:
    """All edits of one site and width, sorted by row."""

    site: Site
    row: Int[np.ndarray, "edit"]
    position: Int[np.ndarray, "edit"]
    vectors: Float[Tensor, "edit width"]
    part: Int[np.ndarray, "edit"]
    """which line of `columns` each edit takes"""
    columns: Int[Tensor, "part width"] | None
    n_heads: int

    def of(self, rows: np.ndarray) -> Int[np.ndarray, "some_edit"]:
        """The edits of some rows."""
        first, last = (np.searchsorted(self.row, rows, side=side) for side in ("left", "right"))
        counts = last - first
        return np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())


class JointRows(Rows):
    """Rows of several edits, checked, sorted by the block and the prompt in which they begin.

    Raises `SiteError` for tokens and sites that do not exist, `EditError` for vectors that do not fit, for edits that another one
    of the same row takes the effect of, and for edits that nothing reads.
    """

    def __init__(
        self, recording: Recording, prompt: Int[Tensor, "row"], puts: Sequence[Put], horizon: Horizon = "last"
    ):
        if prompt.ndim != 1:
            raise SiteError(f"prompts of shape {list(prompt.shape)}; expected one a row")
        self.recording, self.prompt, n_pos = recording, prompt.numpy(), recording.tokens.shape[1]
        self.groups = _grouped(recording, puts, len(prompt))
        self.reference, self.along, self.attention = None, None, None
        row = np.concatenate([group.row for group in self.groups])
        position = np.concatenate([group.position for group in self.groups])
        recording.check_rows(prompt[torch.from_numpy(row)], torch.from_numpy(position))
        n_edits = np.bincount(row, minlength=len(prompt))
        if (bare := np.flatnonzero(n_edits == 0)).size:
            raise EditError(f"row {int(bare[0])} edits nothing; give each row one edit at least")
        self.start, last = np.full(len(prompt), n_pos), np.full(len(prompt), -1)
        np.minimum.at(self.start, row, position)
        np.maximum.at(last, row, position)
        self.entry = np.full(len(prompt), recording.model.n_layers)
        for group in self.groups:
            np.minimum.at(self.entry, group.row, group.site.first_block)
        self._read_at(horizon, given_reads(recording, horizon))
        if (unread := np.flatnonzero(last >= self.stop)).size:
            i = int(unread[0])
            raise EditError(
                f"row {i} edits position {int(last[i])}, but its effect is read at positions {int(self.start[i])} to "
                f"{int(self.stop[i]) - 1}; use a longer horizon, or 'last'"
            )
        _check_overlaps(self.groups, n_pos)
        self.clean_key = self.prompt * n_pos + self.start
        self.order = np.lexsort((self.start, self.prompt, self.entry))

    def check_finite(self) -> None:
        """Raise `EditError` for vectors that are not finite in the dtype of the stream."""
        dtype, given = self.recording.model.stream_dtype, [g.vectors.detach() for g in self.groups if g.vectors.numel()]
        largest = [vectors.norm(p=torch.inf).to(given[0].device, non_blocking=True) for vectors in given]
        if not given or bool(
            torch.stack(largest).amax() <= torch.finfo(dtype).max
        ):  # one wait for all; of a nan it is nan
            return
        for group in self.groups:
            check_finite(group.vectors, dtype, group.site, group.row, np.ones((len(group.row), 1), dtype=bool))

    @property
    def first_block(self) -> int:
        return int(min(group.site.first_block for group in self.groups))

    @property
    def sites(self) -> list[Site]:
        return [group.site for group in self.groups]

    @property
    def label(self) -> str:
        return f"joint {'+'.join(sorted({group.site.point for group in self.groups}))}"

    def branches(self, rows: np.ndarray) -> Branches:
        """Rows in ascending order of prompt, as branches. What they edit, `placed` says."""
        return Branches(self.prompt[rows], self.start[rows], (self.stop - self.start)[rows], np.zeros(0, dtype=int))

    def placed(self, rows: np.ndarray, vectors: Tensor | None = None, branches: Branches | None = None) -> list[Placed]:
        assert vectors is None
        branches, model = self.branches(rows) if branches is None else branches, self.recording.model
        found, order = [], np.argsort(rows, kind="stable")
        for group in self.groups:
            if not len(which := group.of(rows)):
                continue
            branch = order[np.searchsorted(rows[order], group.row[which])]
            token = branches.first[branch] + group.position[which] - branches.start[branch]
            values = upload(group.vectors[upload(which, group.vectors.device)], model.device)
            columns = group.columns
            if columns is not None:
                columns = upload(columns[torch.from_numpy(group.part[which])], model.device)
            found.append(Placed(group.site, token, columns, values.to(model.stream_dtype), group.n_heads))
        return found


class _Part(NamedTuple):
    """A `Put` in one form."""

    site: Site
    row: Int[np.ndarray, "edit"]
    position: Int[np.ndarray, "edit"]
    vectors: Float[Tensor, "edit width"]


def _grouped(recording: Recording, puts: Sequence[Put], n_rows: int) -> list[_Group]:
    model, n_pos = recording.model, recording.tokens.shape[1]
    by: dict[tuple[Site, int], list[_Part]] = {}
    for put in puts:
        site, vectors = as_site(put.site), as_vectors(put.vectors)
        check_site(model, site)
        row, position = (x.numpy() for x in token_rows(put.row, put.position, "rows"))
        width = site_width(model, site, n_pos)
        if row.ndim != 1 or row.shape != position.shape or vectors.shape != (len(row), width):
            raise EditError(
                f"rows {list(row.shape)}, positions {list(position.shape)} and vectors {list(vectors.shape)} at {site}; "
                f"expected [edit], [edit] and [edit, {width}]"
            )
        if len(row) and not 0 <= row.min() <= row.max() < n_rows:
            raise EditError(f"rows from {row.min()} to {row.max()} at {site}; there are {n_rows}, from 0")
        if site.point == "pattern" and len(row):
            _check_pattern(vectors, position, n_pos)
        if len(row):
            by.setdefault((site.whole, width), []).append(_Part(site, row, position, vectors))
    if not by:
        raise EditError("no edits; give each row one at least")
    return [_group(recording, site, parts) for (site, _), parts in by.items()]


def _check_pattern(vectors: Tensor, position: np.ndarray, n_pos: int) -> None:
    later = torch.arange(vectors.shape[1]) % n_pos > torch.from_numpy(position)[:, None]
    if bool((vectors.cpu() * later).any()):
        raise EditError("a pattern with weight on tokens after the one that attends; expected 0 there")


def _group(recording: Recording, site: Site, parts: list[_Part]) -> _Group:
    model, n_pos = recording.model, recording.tokens.shape[1]
    row = np.concatenate([part.row for part in parts])
    order = np.argsort(row, kind="stable")
    lines = [site_columns(model, part.site, n_pos) for part in parts]
    columns = None
    if any(line is not None for line in lines):
        every = torch.arange(parts[0].vectors.shape[1])  # a model of one head: all of it is that head
        columns = torch.stack([every if line is None else line for line in lines])
    vectors = torch.cat([part.vectors for part in parts])
    return _Group(
        site,
        row[order],
        np.concatenate([part.position for part in parts])[order],
        vectors[upload(order, vectors.device)],
        np.repeat(np.arange(len(parts)), [len(part.row) for part in parts])[order],
        columns,
        n_heads(model, site) if site.point in HEADS else 1,
    )


def _check_overlaps(groups: list[_Group], n_pos: int) -> None:
    """Raise `EditError` where an edit has no effect because another one of its row takes its place."""
    by_site: dict[Site, list[_Group]] = {}
    for group in groups:
        by_site.setdefault(group.site, []).append(group)
    for site, several in by_site.items():
        places = np.concatenate(_places(several, n_pos))
        if len(np.unique(places)) < len(places):
            raise EditError(f"a row edits {site} of one token twice, or all of it and a part; give each place once")
    tokens = {site: np.concatenate([g.row * n_pos + g.position for g in several]) for site, several in by_site.items()}
    for site, several in by_site.items():
        others = [Site(site.layer, point) for point in _COVERED.get(site.point, ())]
        if site.point in (*_COVERED, "resid_mid", "mlp_out"):
            others.append(Site(site.layer, "resid_post"))
        if site.point == "resid_pre" and site.layer:
            others.append(Site(site.layer - 1))
        for other in [other for other in others if other in by_site]:
            here, there = tokens[site], tokens[other]
            if {site.point, other.point} <= set(_BY_HEAD):
                here, there = (np.concatenate([_by_head(g, n_pos) for g in x]) for x in (several, by_site[other]))
            if np.isin(here, there).any():
                raise EditError(
                    f"a row edits {site} and {other} of the same token, and the one leaves the other without effect; give one of them"
                )


def _places(several: list[_Group], n_pos: int) -> list[np.ndarray]:
    """A number for each place that the groups of one site edit: for each head, or where they differ in width for each number."""
    if len(several) == 1 and (several[0].site.point != "neurons" or several[0].columns is None):
        return [_by_head(several[0], n_pos)]
    width = max(g.vectors.shape[1] if g.columns is None else int(g.columns.max()) + 1 for g in several)
    found = []
    for g in several:
        columns = np.arange(width)[None] if g.columns is None else g.columns.numpy()[g.part]
        found.append(((g.row * n_pos + g.position)[:, None] * width + columns).reshape(-1))
    return found


def _by_head(group: _Group, n_pos: int) -> np.ndarray:
    """Places by head; an edit of all heads takes each."""
    token = group.row * n_pos + group.position
    if group.columns is None:
        return (token[:, None] * group.n_heads + np.arange(group.n_heads)).reshape(-1)
    return token * group.n_heads + group.columns[:, 0].numpy()[group.part] // group.vectors.shape[1]

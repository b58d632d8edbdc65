"""The effects of as many rows as memory holds, by replay or by full forward passes; the clean side of a token is formed once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interventions import fused
from interventions.errors import MechdiagError
from interventions.metrics import METRICS, NOT_FLOATS, CleanRows, CleanSide, Comparison, TokenMetric
from interventions.models.memory import logits_at_once
from interventions.models.spilled import FINAL
from interventions.models.uploads import download, upload, upload_all
from interventions.replaying.hooks import Forwarded, full_forwards
from interventions.replaying.placed import Placed, placed
from interventions.replaying.replay import Branches, Replayed, gives_some_logits, replayed, unembed
from interventions.replaying.rows import Reads, Rows
from interventions.sites import Site

DIRECT = "kl_direct"
"""A metric beside `METRICS`: the KL of the change carried straight to the final norm and unembedding, later writes frozen."""
Metric = Callable[[Comparison, Tensor, Tensor | None], Tensor]
"""Of a comparison, the rows of the call it is of, and the tokens of its columns (None: the whole vocabulary)."""
FINITE = "finite"
"""Kept beside values that cannot be nan: whether they are of distributions."""


class Asked:
    """The metrics asked for, and their values so far."""

    def __init__(self, metrics: Sequence[str | TokenMetric], n_rows: int):
        self.by_name: dict[str, Metric] = {}
        self.names: list[str] = []
        self.of_tokens: list[TokenMetric] = []
        self.direct = False
        self.some_suffice: bool | None = None
        """whether the model's head gives the logits of some tokens alone; None: not looked at yet"""
        for metric in metrics:
            if isinstance(metric, TokenMetric):
                metric.check(n_rows)
                self.of_tokens.append(metric)
                self.by_name[metric.name] = lambda c, *which, m=metric: m(c.intervened, *which)
                self.by_name[f"clean_{metric.name}"] = lambda c, *which, m=metric: m(c.clean.logits, *which)
                self.names += [metric.name, f"clean_{metric.name}"]
            elif metric == DIRECT:
                self.direct = True
                self.names.append(DIRECT)
            elif metric in METRICS:
                self.by_name[metric] = lambda c, *_, m=METRICS[metric]: m(c)
                self.names.append(metric)
            else:
                raise MechdiagError(
                    f"unknown metric {metric!r}; known: {', '.join([*METRICS, DIRECT])}, metrics of tokens"
                )
        if twice := [name for i, name in enumerate(self.names) if name in self.names[:i]]:
            raise MechdiagError(f"two metrics have the name {twice[0]!r}; give one of them another name")
        if set(self.names) & set(NOT_FLOATS):
            self.by_name[FINITE] = lambda c, *_: c.finite
        self.chunks: list[tuple[np.ndarray, Reads, dict[str, Tensor]]] = []

    def columns(self, rows: Int[Tensor, "row"]) -> Int[Tensor, "token"] | None:
        """The tokens whose logits some rows need, ascending; None: the whole vocabulary."""
        if len(self.by_name) > 2 * len(self.of_tokens) or self.direct:
            return None
        read = [ids for metric in self.of_tokens if (ids := metric.reads(rows)) is not None]
        return torch.cat(read).unique() if len(read) == len(self.of_tokens) else None

    def store(self, chunk: np.ndarray, reads: Reads, values: dict[str, Tensor]) -> None:
        self.chunks.append((chunk[reads.row], reads, values))

    def values(self, rows: Rows) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Each metric, the positions read, and where all values of a read are finite, in the order of the rows."""
        row, column, position = (
            torch.from_numpy(np.concatenate(parts))
            for parts in zip(*((row, reads.column, reads.position) for row, reads, _ in self.chunks), strict=True)
        )
        shape = (len(rows),) if rows.one_read else (len(rows), rows.n_columns)
        at = (row,) if rows.one_read else (row, column)
        values, finite = {}, torch.ones(len(row), dtype=torch.bool)
        names = [*self.names, *[FINITE] * (FINITE in self.by_name)]
        every = download({name: torch.cat([part[name] for _, _, part in self.chunks]) for name in names})
        for name, found in every.items():
            finite &= found if name == FINITE else found.isfinite()
            if name == FINITE:
                continue
            beyond = float("nan") if found.is_floating_point() else 0 if found.dtype == torch.bool else -1
            empty = torch.full(shape, beyond, dtype=found.dtype)
            values[name] = empty.index_put(at, found)
        finite = torch.zeros(shape, dtype=torch.bool).index_put(at, finite)
        return values, torch.full(shape, -1).index_put(at, position), finite


def replay_rows(rows: Rows, which: np.ndarray, vectors: Tensor | None = None) -> tuple[Branches, Replayed]:
    """Rows in ascending order of prompt, with their edits, or with `vectors` at their edited tokens."""
    assert rows.attention is not None
    branches = rows.branches(which)
    return branches, replayed(rows.recording, branches, rows.placed(which, vectors, branches), rows.attention)


def read_tokens(branches: Branches, reads: Reads) -> Int[np.ndarray, "read"]:
    """The token at which each effect is read."""
    return branches.first[reads.row] + reads.position - branches.start[reads.row]


def _compare(
    clean: CleanSide,
    index: np.ndarray,
    logits: Tensor,
    rows: Tensor,
    metrics: dict[str, Metric],
    columns: Tensor | None = None,
) -> dict[str, Tensor]:
    """Metrics of some reads; `index`: the clean row of each, ascending; `rows`: the row of each; `columns`: see `Metric`.

    A few reads at a time on the CPU, where what fits its caches is several times faster; edits of one token share its row.
    """
    some = max(1, (2**18 if logits.device.type == "cpu" else 2**27) // logits.shape[1])
    parts: list[list[Tensor]] = []
    start, of = 0, upload(index, logits.device)
    while start < len(logits):
        alike = int(np.searchsorted(index, index[start], side="right"))
        stop = alike if some // 2 <= alike - start <= 2 * some else min(start + some, len(logits))
        if index[start] == index[stop - 1]:
            which: Tensor | slice = slice(int(index[start]), int(index[start]) + 1)
        else:
            which = of[start:stop]
        comparison = Comparison(CleanRows(clean, which), logits[start:stop], js="js" in metrics)
        parts.append([metric(comparison, rows[start:stop], columns) for metric in metrics.values()])
        start = stop
    return {name: torch.cat(column) for name, column in zip(metrics, zip(*parts, strict=True), strict=True)}


def _clean_side(logits: Tensor, metrics: dict[str, Metric]) -> CleanSide:
    """With everything formed that `metrics` will read, a few rows at a time on the CPU; nothing where one kernel forms it."""
    clean = CleanSide(logits)
    some = max(1, 2**18 // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    if fused.usable(logits):
        return clean
    parts = [CleanSide(clean.logits[start : start + some]) for start in range(0, len(logits), some)]
    needed = ["log_p", "p"] if {"kl", "js", "top1_drop", "clean_entropy", DIRECT} & set(metrics) else []
    needed += ["top1"] * bool({"top1_changed", "top1_drop", "top1", "clean_top1"} & set(metrics)) + ["entropy"] * (
        "clean_entropy" in metrics
    )
    for name in needed:
        clean.__dict__[name] = torch.cat([getattr(part, name) for part in parts])
    return clean


_KL: dict[str, Metric] = {DIRECT: lambda c, *_: c.kl}


@dataclass
class _Sides:
    """Final hidden states to be compared: clean ones, and of each read and each directly carried change which is its own."""

    clean: Float[Tensor, "clean d_model"]
    hidden: Float[Tensor, "read d_model"]
    index: Int[np.ndarray, "read"]
    """the clean side of each read, ascending"""
    direct: Float[Tensor, "some_read d_model"] | None
    direct_of: Int[np.ndarray, "some_read"]
    """which reads were edited themselves, ascending"""


def replay_chunk(rows: Rows, chunk: np.ndarray, asked: Asked) -> tuple[Reads, dict[str, Tensor]]:
    model = rows.recording.model
    sides, reads = _sides(rows, chunk, asked.direct)
    row = torch.from_numpy(chunk[reads.row])
    columns = _columns(rows, row, asked, sides.clean)
    width = model.vocab_size if columns is None else len(columns)
    most = max(3, logits_at_once(model) // width)  # logits held at once
    carried = np.searchsorted(sides.direct_of, np.arange(len(row) + 1))  # direct changes among the reads before
    every = {**asked.by_name, **(_KL if asked.direct else {})}
    found: list[dict[str, Tensor]] = []
    start = 0
    while start < len(row):
        first = sides.index[start]
        cost = (
            np.arange(1, len(row) - start + 1)
            + (sides.index[start:] - first + 1)
            + carried[start + 1 :]
            - carried[start]
        )
        stop = start + max(1, int(np.searchsorted(cost, most, side="right")))
        n_clean = sides.index[stop - 1] - first + 1
        states = sides.clean[first : first + n_clean]
        logits = unembed(rows.recording, torch.cat([states, sides.hidden[start:stop]]), columns)
        clean = _clean_side(logits[:n_clean], every)
        index = sides.index[start:stop] - first
        values = _compare(clean, index, logits[n_clean:], row[start:stop], asked.by_name, columns)
        if sides.direct is not None:
            moved = sides.direct[carried[start] : carried[stop]]
            which = sides.direct_of[carried[start] : carried[stop]] - start
            of = upload(index[which], states.device)
            direct = _direct_logits(rows, row[start:stop][torch.from_numpy(which)], moved, states, logits[:n_clean], of)
            values[DIRECT] = _spread(clean, index, direct, which, stop - start)
        found.append(values)
        start = stop
    return reads, {name: torch.cat([part[name] for part in found]) for name in found[0]}


def _columns(rows: Rows, which: Tensor, asked: Asked, clean: Tensor) -> Tensor | None:
    """The tokens whose logits `which` rows need, if the model's head can give these alone; checked once on a clean state."""
    columns = asked.columns(which)
    if columns is None or asked.some_suffice is False:
        return None
    if columns[0] < 0 or columns[-1] >= rows.recording.model.vocab_size:
        return None  # the metric says so
    if asked.some_suffice is None:
        asked.some_suffice = gives_some_logits(rows.recording, clean[:1], columns)
    return columns if asked.some_suffice else None


def _direct_logits(rows: Rows, which: Tensor, moved: Tensor, clean: Tensor, clean_logits: Tensor, of: Tensor) -> Tensor:
    """Logits of changes carried straight to the final norm: from those of their directions where that is exact."""
    if not len(moved):
        return clean_logits[:0]
    along = None if rows.along is None else rows.along.logits(rows.recording, which, moved, clean, clean_logits, of)
    return unembed(rows.recording, moved) if along is None else along


def _spread(clean: CleanSide, index: np.ndarray, logits: Tensor, which: np.ndarray, n_read: int) -> Tensor:
    """The KL of directly carried changes at the reads `which`, 0 at those that were not edited."""
    kl = logits.new_zeros(n_read, dtype=torch.promote_types(clean.given.dtype, torch.float32))
    if len(which) == 0:
        return kl
    found = _compare(clean, index[which], logits, torch.from_numpy(which), _KL)[DIRECT]
    return kl.index_copy(0, upload(which, kl.device), found)


def _sides(rows: Rows, chunk: np.ndarray, direct: bool) -> tuple[_Sides, Reads]:
    """Everything up to the unembedding, by replay; reads in the order of their clean sides."""
    recording, device = rows.recording, rows.recording.model.device
    vectors, last = rows.edited(chunk) if direct else None, Site(rows.recording.model.n_layers - 1)
    branches, found = replay_rows(rows, chunk, vectors)
    reads = rows.reads(chunk)
    if rows.reference is None:
        key = rows.prompt[chunk][reads.row] * recording.tokens.shape[1] + reads.position
        order = np.argsort(key, kind="stable")
        reads = Reads(*(x[order] for x in reads))
        place, index = np.unique(key[order], return_inverse=True)
        at = np.stack(np.divmod(place, recording.tokens.shape[1]))
        clean, stream = recording.rows((FINAL, last), at)
    else:
        distinct, which = rows.distinct_clean(chunk)
        width = int(reads.column.max()) + 1
        key = which[reads.row] * width + reads.column
        order = np.argsort(key, kind="stable")
        reads = Reads(*(x[order] for x in reads))
        place, one, index = np.unique(key[order], return_index=True, return_inverse=True)
        own, made = replay_rows(rows, distinct, rows.reference_vectors(distinct))
        at = own.first[place // width] + reads.position[one] - own.start[place // width]
        at = upload(at, device)
        clean, stream = (x[at] for x in made)
    token = read_tokens(branches, reads)
    carried, direct_of = None, np.zeros(0, dtype=int)
    if direct:
        assert vectors is not None
        edit, direct_of = _edits_read(branches, token)
        edit, of = upload_all([edit, index[direct_of]], device)
        moved = stream[of] + (vectors - rows.clean_at_site(chunk))[edit]
        alone = Branches.single(np.zeros(len(direct_of), dtype=int), np.zeros(len(direct_of), dtype=int))
        moved_there = [placed(recording, last, alone.edited, moved)]
        carried = replayed(recording, alone, moved_there).hidden if len(direct_of) else moved
    return _Sides(clean, found.hidden[upload(token, device)], index, carried, direct_of), reads


def _edits_read(branches: Branches, read: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the tokens read those that were edited themselves: which edit each is, and which read."""
    edit = np.minimum(np.searchsorted(branches.edited, read), len(branches.edited) - 1)
    own = np.flatnonzero(branches.edited[edit] == read)
    return edit[own], own


def hooked(rows: Rows, which: np.ndarray, edits: Sequence[Placed]) -> Forwarded:
    """Full forward passes of rows with edits at their tokens (none: clean)."""
    branches = rows.branches(which)
    return full_forwards(rows.recording, branches, edits, read_tokens(branches, rows.reads(which)))


def hooks_chunk(rows: Rows, chunk: np.ndarray, asked: Asked) -> tuple[Reads, dict[str, Tensor]]:
    """The reference path, 16 rows at a time."""
    found, all_reads = [], []
    for start in range(0, len(chunk), 16):
        part = chunk[start : start + 16]
        reads, edits = rows.reads(part), rows.placed(part)
        forwarded = hooked(
            rows, part, [] if rows.reference is None else rows.placed(part, rows.reference_vectors(part))
        )
        clean, index = CleanSide(forwarded.logits), np.arange(len(reads.row))
        row = torch.from_numpy(part[reads.row])
        values = _compare(clean, index, hooked(rows, part, edits).logits, row, asked.by_name)
        if asked.direct:
            vectors = edits[0].vectors
            branches = rows.branches(part)
            edit, own = _edits_read(branches, read_tokens(branches, reads))
            edits_at, reads_at = upload_all([edit, own], vectors.device)
            moved = forwarded.stream[reads_at] + (vectors - rows.clean_at_site(part))[edits_at]
            alone = Branches.single(rows.prompt[part][reads.row[own]], reads.position[own])
            last = Site(rows.recording.model.n_layers - 1)
            there = [placed(rows.recording, last, alone.edited, moved)]
            logits = full_forwards(rows.recording, alone, there, np.arange(len(own))).logits if len(own) else moved
            values[DIRECT] = _spread(clean, index, logits, own, len(index))
        found.append(values)
        all_reads.append(Reads(reads.row + start, reads.column, reads.position))
    reads = Reads(*(np.concatenate(column) for column in zip(*all_reads, strict=True)))
    return reads, {name: torch.cat([values[name] for values in found]) for name in found[0]}

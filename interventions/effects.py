"""Rows in, effects out: replay where it is exact, full forward passes where it is not, in bounded memory."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interventions.errors import EditError, MechdiagError, ReplayError, count, is_out_of_memory
from interventions.metrics import METRICS, TokenMetric
from interventions.models.anatomy import check_site
from interventions.models.memory import rows_at_once
from interventions.models.uploads import upload, upload_all
from interventions.recording import Recording
from interventions.replaying.chunks import DIRECT, Asked, hooked, hooks_chunk, read_tokens, replay_chunk, replay_rows
from interventions.replaying.joint import JointRows, Put
from interventions.replaying.remote import remote_chunk
from interventions.replaying.replay import unembed
from interventions.replaying.replay_check import warn_of_full_passes, why_not_replay
from interventions.replaying.rows import Horizon, Reference, Rows, Vectors
from interventions.shared_directions import Along
from interventions.sites import Site

PATHS = ("auto", "replay", "hooks")


@dataclass(frozen=True)
class Effects:
    """One number for each metric and each place where a row's effect is read, on the CPU, and how they were made."""

    values: dict[str, Tensor]
    """metric -> `[row]`, with a horizon above 1 `[row, horizon]`: float32 (float64 for a float64 model; bool for truth
    values, int64 for token ids), nan (False, −1) beyond the prompt's end and where logits are no distribution"""
    position: Int[Tensor, "row"] | Int[Tensor, "row horizon"]
    """where each was read; −1 beyond the prompt's end"""
    path: str
    """`replay` or `hooks` (full forward passes)"""
    delta: float
    """largest logit difference between replay and full forward passes of the rows that these were checked with (nan: not replayed)"""
    why_hooks: str | None
    """why replay was not used, or None"""
    halvings: int
    """how many times a chunk ran out of memory and was halved"""
    n_nonfinite: int
    """reads with a value that is not finite, or of logits that are no distribution"""
    finite: Bool[Tensor, "row"] | Bool[Tensor, "row horizon"]
    """the other reads; False beyond the prompt's end"""
    recorded_again: int = field(default=0, kw_only=True)
    """prompts beyond the recording's budget that were recorded again, each time"""

    def __getitem__(self, metric: str) -> Tensor:
        return self.values[metric]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({count(len(self.position), 'row')}, {', '.join(self.values)}, by {self.path})"


@torch.no_grad()
def measure(
    recording: Recording,
    site: Site,
    prompt: Int[Tensor, "row"],
    position: Int[Tensor, "row"] | Int[Tensor, "row edit"],
    vectors: Vectors | Along,
    *,
    metrics: Sequence[str | TokenMetric] = ("kl",),
    horizon: Horizon = 1,
    reference: Reference | None = None,
    path: str = "auto",
    batch_rows: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Effects:
    """The effect of putting `vectors[row]` at `site` of token (prompt, position).

    prompt, position: `[row]`, any order, repeats welcome: edits of one token are put side by side and its clean
    distribution is formed once. A row may edit several positions of its prompt at once: position `[row, edit]`, padded
    with −1, and vectors `[row, edit, d_model]`. Changes along the same few directions (an SAE's latents removed) may be given as
    `Directions.times`; their direct effects then cost less. horizon: where the effect is read, at the first edited position and the
    h − 1 after it (values `[row, h]`), at the prompt's `last` position, or at given positions `[row, read]`, padded with −1
    (values `[row, read]`); an edit that nothing reads is an error.
    metrics: names in `METRICS`, `kl_direct` (the same change carried straight to the final norm and unembedding; 0 where
    a position is read that was not edited), or metrics of tokens (`LogitDifference`, `Probability`, `Rank`), which give
    `name` and `clean_name`. reference: compare with another vector in the same place instead of with the prompt as it
    stands. path: `auto` (replay, checked against full forward passes on the longest positions; these, with a warning,
    where it is not exact), `replay` (an error where it is not exact) or `hooks`. batch_rows: tokens that a chunk replays (default 512 on
    the CPU; on a GPU up to 4096, by its memory: see `rows_at_once`; remotely what 1024 rows have): as many rows where each is read at
    its own position; halved when memory runs out.

    Raises `SiteError` for a site or row that does not exist, `EditError` for vectors of the wrong shape, `ReplayError` where
    replay was asked for and is not exact, `ModelError` where the model changed after it was recorded.
    Last bits depend on which rows share a chunk: equal to tolerance, not to the bit, where `batch_rows` changed.
    """
    _check_how(path, batch_rows)
    with recording.held(traces=True):
        rows = check_rows(recording, site, prompt, position, vectors, horizon, reference)
        return _effects(rows, metrics, path, batch_rows, progress)


@torch.no_grad()
def measure_joint(
    recording: Recording,
    prompt: Int[Tensor, "row"],
    puts: Sequence[Put],
    *,
    metrics: Sequence[str | TokenMetric] = ("kl",),
    horizon: Horizon = "last",
    path: str = "auto",
    batch_rows: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Effects:
    """The effects of rows that edit several sites of any blocks at once: each row all the edits of `puts` that name it.

        measure_joint(recording, prompt, [Put(Site(12, "z", head=3), row, position, vectors), …], metrics=…)

    prompt: `[row]`. A row begins at the lowest block and the first position that it edits; each later block puts its own edits
    in. Rows of one edit each at different blocks or heads may share a call too. What is put in is what stands there, whatever
    the row's other edits have done before it. Other arguments as for `measure`; `kl_direct` is not known here.
    Raises `SiteError` and `ReplayError` as `measure` does, `EditError` for vectors of the wrong shape, rows without an edit, and
    edits of one token of which one leaves the other without effect (a head's `z` and `attn_out`).
    """
    if DIRECT in metrics:
        raise MechdiagError(f"{DIRECT} of joint edits is not defined; known: {', '.join(METRICS)}, metrics of tokens")
    _check_how(path, batch_rows)
    with recording.held(traces=True):
        rows = JointRows(recording, torch.as_tensor(prompt).cpu(), puts, horizon)
        return _effects(rows, metrics, path, batch_rows, progress)


def _check_how(path: str, batch_rows: int | None) -> None:
    if path not in PATHS or (batch_rows is not None and batch_rows < 1):
        raise MechdiagError(
            f"path {path!r}, batch_rows {batch_rows}; expected one of {', '.join(PATHS)}, and 1 row or more"
        )


def _effects(
    rows: Rows,
    metrics: Sequence[str | TokenMetric],
    path: str,
    batch_rows: int | None,
    progress: Callable[[int], object] | None,
) -> Effects:
    asked, before = Asked(metrics, len(rows)), rows.recording.recorded_again
    size = batch_rows or _usual_size(rows)
    chosen = choose_path(rows, path, size)
    size, halvings = in_chunks(rows, asked, chosen.one_chunk, size, progress)
    if halvings:
        warnings.warn(f"out of memory: chunks halved {halvings} times, to {size} tokens", stacklevel=3)
    values, where, finite = asked.values(rows)
    bad = int(((where >= 0) & ~finite).sum())
    return Effects(
        values, where, chosen.path, chosen.delta, chosen.why_hooks, halvings, bad, finite,
        recorded_again=rows.recording.recorded_again - before,
    )  # fmt: skip


def _usual_size(rows: Rows) -> int:
    """Tokens of a chunk: of remote models 1024 rows, as a chunk is a job that waits its turn."""
    model = rows.recording.model
    if model.remote:
        return 1024 * rows.width
    return rows_at_once(model, rows.recording.tokens.shape[1])


def in_chunks(
    rows: Rows, asked: Asked, one_chunk: Callable, size: int, progress: Callable[[int], object] | None
) -> tuple[int, int]:
    """Run all rows, `size` tokens at a time; smaller chunks where memory runs out. The size at the end, and how often it was halved."""
    reached = np.cumsum((rows.stop - rows.start)[rows.order])
    done, halvings = 0, 0
    while done < len(rows):
        before = reached[done - 1] if done else 0
        stop = max(done + 1, int(np.searchsorted(reached, before + size, side="right")))
        if rows.entry is not None:  # rows of a chunk enter at the same block
            entry = rows.entry[rows.order[done:stop]]
            stop = done + int(np.searchsorted(entry, entry[0], side="right"))
        chunk = rows.order[done:stop]
        found = None
        try:
            found = one_chunk(rows, chunk, asked)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or size == 1:
                raise
        if found is None:  # here, where the error no longer holds the chunk's tensors
            size, halvings = max(1, size // 2), halvings + 1
            if rows.recording.model.device.type == "cuda":
                torch.cuda.empty_cache()
            continue
        asked.store(chunk, *found)
        done = stop
        if progress is not None:
            progress(len(chunk))
    return size, halvings


@torch.no_grad()
def intervened_logits(
    recording: Recording,
    site: Site,
    prompt: Tensor,
    position: Tensor,
    vectors: Tensor,
    *,
    horizon: Horizon = 1,
    path: str = "auto",
) -> Float[Tensor, "row vocab"] | Float[Tensor, "row horizon vocab"]:
    """Next-token logits where the effects of rows are read, for rows few enough to hold them. See `measure`.

    With a horizon above 1 nan beyond the prompt's end.
    """
    with recording.held():
        rows = check_rows(recording, site, prompt, position, vectors, horizon)
        everything = rows.order
        reads = rows.reads(everything)
        if choose_path(rows, path, len(rows), [everything]).path == "replay":
            branches, found = replay_rows(rows, everything)
            logits = unembed(recording, found.hidden[upload(read_tokens(branches, reads), found.hidden.device)])
        else:
            logits = hooked(rows, everything, rows.placed(everything)).logits
    if rows.one_read:
        return torch.empty_like(logits).index_copy(0, upload(everything, logits.device), logits)
    whole = logits.new_full((len(rows), rows.n_columns, logits.shape[-1]), torch.nan)
    row, column = upload_all([everything[reads.row], reads.column], logits.device)
    return whole.index_put((row, column), logits)


def check_rows(
    recording: Recording,
    site: Site,
    prompt: Tensor,
    position: Tensor,
    vectors: Vectors | Along,
    horizon: Horizon = 1,
    reference: Reference | None = None,
) -> Rows:
    """The rows of a call, checked (see `measure`)."""
    check_site(recording.model, site)
    prompt, position = torch.as_tensor(prompt).cpu(), torch.as_tensor(position).cpu()
    if not isinstance(vectors, Along):
        return Rows(recording, site, prompt, position, vectors, reference, horizon)
    if position.ndim != 1 or len(position) != len(vectors.index) or reference is not None:
        raise EditError(
            f"changes along directions for {len(vectors.index)} rows, positions {list(position.shape)}; give one position for each, "
            "and no reference"
        )

    def edited(which: Tensor, along: Along = vectors) -> Tensor:
        x = recording.at(site, prompt[which], position[which])
        wide = torch.promote_types(x.dtype, torch.float32)
        return (x.to(wide) + along.change(which).to(x.device, wide)).to(x.dtype)

    rows = Rows(recording, site, prompt, position, edited, None, horizon)
    rows.along = vectors
    return rows


class Path(NamedTuple):
    """How rows are to be run."""

    path: str
    """`replay` or `hooks`"""
    delta: float
    """largest logit difference from full forward passes (nan: not replayed)"""
    why_hooks: str | None
    remote: bool = False
    """full forward passes elsewhere"""

    @property
    def one_chunk(self) -> Callable:
        if self.remote:
            return remote_chunk
        return replay_chunk if self.path == "replay" else hooks_chunk


def choose_path(rows: Rows, path: str, size: int, chunks: Sequence[np.ndarray] | None = None) -> Path:
    """Replay where it is exact for these rows, `size` tokens at a time, and full forward passes, with a warning, where it is not.

    chunks: the rows of each chunk, where they are not cut by `size`. Raises `ReplayError` where replay was asked for by name and is not exact.
    """
    remote = bool(rows.recording.model.remote)
    if path == "hooks":
        return Path("hooks", float("nan"), None, remote)
    why, certificate = why_not_replay(rows, size, chunks)
    if why is None:
        assert certificate is not None
        return Path("replay", certificate.delta, None)
    if path == "replay":
        raise ReplayError(f"replay is not exact here: {why}; use path='auto' or 'hooks'")
    warn_of_full_passes(rows, why)
    return Path("hooks", float("nan"), why, remote)

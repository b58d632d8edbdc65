"""Rows in, effects out: replay where it is exact, full forward passes where it is not, in bounded memory."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interventions.errors import EditError, MechdiagError, ReplayError
from interventions.hooks import full_forwards
from interventions.metrics import METRICS, CleanRows, CleanSide, Comparison
from interventions.recording import Recording
from interventions.replay import final_hidden, unembed
from interventions.sites import Site
from interventions.trust import is_out_of_memory, why_not_replay

Vectors = Float[Tensor, "row d_model"] | Callable[[Int[Tensor, "some_row"]], Float[Tensor, "some_row d_model"]]
"""Edited vectors of all rows, or a function that forms those of the rows asked for (indices on the CPU)."""


PATHS = ("auto", "replay", "hooks")


@dataclass(frozen=True)
class Reference:
    """What the clean side of a row is, where it is not the prompt as it stands: another vector at the same place."""

    vectors: Float[Tensor, "ref d_model"]
    index: Int[Tensor, "row"]
    """which of `vectors` each row is compared with (CPU)"""


@dataclass(frozen=True)
class Effects:
    """One number a row for each metric, on the CPU, and how they were made."""

    values: dict[str, Tensor]
    """metric -> `[row]`, float32 (float64 for a float64 model; bool for truth values)"""
    path: str
    """`replay` or `hooks` (full forward passes)"""
    delta: float
    """largest logit difference seen between replay and full forward passes of this model (nan: not compared)"""
    why_hooks: str | None
    """why replay did not serve, or None"""
    halvings: int
    """how many times a chunk ran out of memory and was halved"""
    n_nonfinite: int
    """rows with a value that is not finite"""

    def __getitem__(self, metric: str) -> Tensor:
        return self.values[metric]


@torch.no_grad()
def measure(
    recording: Recording,
    site: Site,
    prompt: Int[Tensor, "row"],
    position: Int[Tensor, "row"],
    vectors: Vectors,
    *,
    metrics: Sequence[str] = ("kl",),
    reference: Reference | None = None,
    path: str = "auto",
    batch_rows: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Effects:
    """The effect, read at the intervened position, of putting `vectors[row]` at `site` of token (prompt, position).

    prompt, position: `[row]`, any order, repeats welcome: edits of one token are put side by side and its clean
    distribution is formed once. metrics: names in `METRICS`. reference: compare with another vector in the same place
    instead of with the prompt as it stands. path: `auto` (replay, checked against full forward passes on the longest
    positions; these where it is not exact), `replay` (an error where it is not exact) or `hooks`. batch_rows: rows a
    chunk (default 512 on the CPU, 4096 elsewhere); a chunk that runs out of memory is halved.

    Raises `SiteError` for a site or row that does not exist, `EditError` for vectors of the wrong shape, `ReplayError`.
    Last bits depend on which rows share a chunk: equal to tolerance, not to the bit, where `batch_rows` changed.
    """
    model = recording.model
    model.check_site(site)
    if path not in PATHS or (batch_rows is not None and batch_rows < 1):
        raise MechdiagError(
            f"path {path!r}, batch_rows {batch_rows}; expected one of {', '.join(PATHS)}, and 1 row or more"
        )
    prompt, position = torch.as_tensor(prompt).cpu(), torch.as_tensor(position).cpu()
    recording.check_rows(prompt, position)
    unknown = [name for name in metrics if name not in METRICS]
    if unknown:
        raise MechdiagError(f"unknown metric {unknown[0]!r}; known: {', '.join(METRICS)}")
    rows = _Rows(recording, site, prompt, position, vectors, reference)
    why = None if path == "hooks" else why_not_replay(recording, site, rows.prompt, rows.position, rows.edited)
    if path == "replay" and why:
        raise ReplayError(f"replay is not exact here: {why}; use path='auto' or 'hooks'")
    replaying = path != "hooks" and why is None
    size = batch_rows or (512 if model.device.type == "cpu" else 4096)
    found: list[dict[str, Tensor]] = []
    done, halvings = 0, 0
    while done < len(prompt):
        chunk = rows.order[done : done + size]
        try:
            found.extend(_replay_chunk(rows, chunk, metrics) if replaying else _hooks_chunk(rows, chunk, metrics))
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or size == 1:
                raise
            size, halvings = max(1, size // 2), halvings + 1
            if model.device.type == "cuda":
                torch.cuda.empty_cache()
            continue
        done += len(chunk)
        if progress is not None:
            progress(len(chunk))
    if halvings:
        warnings.warn(f"out of memory: chunks halved {halvings} times, to {size} rows", stacklevel=2)
    back = torch.from_numpy(np.argsort(rows.order, kind="stable"))
    values = {name: torch.cat([part[name] for part in found]).cpu()[back] for name in metrics}
    bad = torch.stack([~v.isfinite() for v in values.values()]).any(0) if values else torch.zeros(len(prompt))
    compared = bool(model.replay_reach)
    return Effects(
        values,
        "replay" if replaying else "hooks",
        model.replay_delta if compared else float("nan"),
        why,
        halvings,
        int(bad.sum()),
    )


@torch.no_grad()
def intervened_logits(
    recording: Recording, site: Site, prompt: Tensor, position: Tensor, vectors: Tensor, *, path: str = "auto"
) -> Float[Tensor, "row vocab"]:
    """Next-token logits at the intervened positions, for rows few enough to hold (row · vocab numbers). See `measure`."""
    prompt, position = torch.as_tensor(prompt).cpu(), torch.as_tensor(position).cpu()
    recording.model.check_site(site)
    recording.check_rows(prompt, position)
    rows = _Rows(recording, site, prompt, position, vectors, None)
    why = None if path == "hooks" else why_not_replay(recording, site, rows.prompt, rows.position, rows.edited)
    if path == "replay" and why:
        raise ReplayError(f"replay is not exact here: {why}; use path='auto' or 'hooks'")
    everything = np.arange(len(prompt))
    if path != "hooks" and why is None:
        return rows.replayed_logits(everything)
    return rows.hooked_logits(everything)


class _Rows:
    """The rows of one call, sorted so that what shares a clean side stands together."""

    def __init__(
        self,
        recording: Recording,
        site: Site,
        prompt: Tensor,
        position: Tensor,
        vectors: Vectors,
        reference: Reference | None,
    ):
        if not callable(vectors) and len(vectors) != len(prompt):
            raise EditError(f"{len(vectors)} edited vectors for {len(prompt)} rows; give one for each")
        if reference is not None and len(reference.index) != len(prompt):
            raise EditError(f"{len(reference.index)} reference indices for {len(prompt)} rows; give one for each")
        self.recording, self.site, self.vectors, self.reference = recording, site, vectors, reference
        self.prompt, self.position = prompt.numpy(), position.numpy()
        self.clean_key = (
            prompt * int(recording.length.max()) + position if reference is None else reference.index
        ).numpy()
        self.order = np.lexsort((self.clean_key, self.position, self.prompt))

    def edited(self, rows: np.ndarray) -> Tensor:
        model = self.recording.model
        index = torch.from_numpy(rows)
        value = self.vectors(index) if callable(self.vectors) else self.vectors[index.to(self.vectors.device)]
        if value.shape != (len(rows), model.d_model):
            raise EditError(f"edited vectors of shape {tuple(value.shape)}; expected {(len(rows), model.d_model)}")
        return value.to(model.device, model.dtype)

    def clean_of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One row for each clean side among `rows`, in their order, and which of these each row belongs to."""
        place = np.stack([self.prompt[rows], self.position[rows], self.clean_key[rows]])
        new = np.r_[True, (place[:, 1:] != place[:, :-1]).any(axis=0)]
        return rows[new], np.cumsum(new) - 1

    def reference_vectors(self, rows: np.ndarray) -> Tensor:
        assert self.reference is not None
        model = self.recording.model
        index = self.reference.index[torch.from_numpy(rows)]
        return self.reference.vectors[index.to(self.reference.vectors.device)].to(model.device, model.dtype)

    def final(self, rows: np.ndarray, vectors: Tensor) -> Tensor:
        """Replayed final hidden states with `vectors` at the site, rows in any order."""
        attention = self.recording.model.replay_attention
        assert attention is not None
        order = np.argsort(self.prompt[rows], kind="stable")
        rows, back = rows[order], torch.from_numpy(order).to(vectors.device)
        first = self.site.first_block
        hidden = final_hidden(self.recording, first, self.prompt[rows], self.position[rows], vectors[back], attention)
        return torch.empty_like(hidden).index_copy(0, back, hidden)

    def hidden(self, rows: np.ndarray, clean_rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Final hidden states of `clean_rows`' clean sides and of the edited `rows`."""
        vectors = self.edited(rows)
        if self.reference is None:
            device = vectors.device
            prompt, position = (torch.from_numpy(x[clean_rows]).to(device) for x in (self.prompt, self.position))
            return self.recording.final_hidden[prompt, position], self.final(rows, vectors)
        both = torch.cat([self.reference_vectors(clean_rows), vectors])
        hidden = self.final(np.concatenate([clean_rows, rows]), both)
        return hidden[: len(clean_rows)], hidden[len(clean_rows) :]

    def replayed_logits(self, rows: np.ndarray) -> Tensor:
        return unembed(self.recording, self.final(rows, self.edited(rows)))

    def hooked_logits(self, rows: np.ndarray, clean: bool = False) -> Tensor:
        """Full forward passes: of the edited rows, or of their clean sides."""
        stands = self.reference_vectors if clean and self.reference is not None else self.edited
        vectors = None if clean and self.reference is None else stands(rows)
        return full_forwards(self.recording, self.site, self.prompt[rows], self.position[rows], vectors)


def _compare(clean: CleanSide, index: np.ndarray, logits: Tensor, metrics: Sequence[str]) -> dict[str, Tensor]:
    """Metrics of some rows; `index`: the clean row of each, ascending.

    A few rows at a time on the CPU, where what fits its caches is several times faster; edits of one token share its row.
    """
    some = max(1, (2**18 if logits.device.type == "cpu" else 2**27) // logits.shape[1])
    parts: list[list[Tensor]] = []
    start = 0
    while start < len(logits):
        alike = int(np.searchsorted(index, index[start], side="right"))
        stop = alike if some // 2 <= alike - start <= 2 * some else min(start + some, len(logits))
        if index[start] == index[stop - 1]:
            which: Tensor | slice = slice(int(index[start]), int(index[start]) + 1)
        else:
            which = torch.from_numpy(index[start:stop]).to(logits.device)
        comparison = Comparison(CleanRows(clean, which), logits[start:stop])
        parts.append([METRICS[name](comparison) for name in metrics])
        start = stop
    return {name: torch.cat(column) for name, column in zip(metrics, zip(*parts, strict=True), strict=True)}


def _clean_side(logits: Tensor, metrics: Sequence[str]) -> CleanSide:
    """With everything formed that `metrics` will read, a few rows at a time on the CPU."""
    clean = CleanSide(logits)
    some = max(1, 2**18 // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    parts = [CleanSide(clean.logits[start : start + some]) for start in range(0, len(logits), some)]
    needed = ["log_p", "p"] + ["top1"] * ("top1_changed" in metrics) + ["entropy"] * ("clean_entropy" in metrics)
    for name in needed:
        clean.__dict__[name] = torch.cat([getattr(part, name) for part in parts])
    return clean


def _replay_chunk(rows: _Rows, chunk: np.ndarray, metrics: Sequence[str]) -> list[dict[str, Tensor]]:
    model = rows.recording.model
    clean_rows, clean_index = rows.clean_of(chunk)
    clean_hidden, hidden = rows.hidden(chunk, clean_rows)
    most = max(2, (2**25 if model.device.type == "cpu" else 2**28) // model.vocab_size)  # logits held at once
    found, start = [], 0
    while start < len(chunk):
        first = clean_index[start]
        cost = np.arange(1, len(chunk) - start + 1) + (clean_index[start:] - first + 1)
        stop = start + max(1, int(np.searchsorted(cost, most, side="right")))
        n_clean = clean_index[stop - 1] - first + 1
        logits = unembed(rows.recording, torch.cat([clean_hidden[first : first + n_clean], hidden[start:stop]]))
        clean = _clean_side(logits[:n_clean], metrics)
        found.append(_compare(clean, clean_index[start:stop] - first, logits[n_clean:], metrics))
        start = stop
    return found


def _hooks_chunk(rows: _Rows, chunk: np.ndarray, metrics: Sequence[str]) -> list[dict[str, Tensor]]:
    found = []
    for start in range(0, len(chunk), 16):
        part = chunk[start : start + 16]
        clean_rows, clean_index = rows.clean_of(part)
        clean = _clean_side(rows.hooked_logits(clean_rows, clean=True), metrics)
        found.append(_compare(clean, clean_index, rows.hooked_logits(part), metrics))
    return found
